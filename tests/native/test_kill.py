"""Processes are killed at any moment, clients and the function, and nobody else notices.

What each thread of each process did is written down, and the whole history of each key must be
linearizable. Afterwards nothing is held, nothing has leaked, and the shard is whole.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from memfaas.testing import fsck
from memfaas.testing.lease import fill_and_empty
from memfaas.testing.linearizability import check
from memfaas.testing.stage import KEYS, LIMIT_S, Stage, final_reads
from memfaas.testing.values import key_of


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(tmp_path, random.Random(str(request.node.name)))
    yield stage
    stage.close()


def assert_nothing_was_lost_or_left(stage: Stage) -> None:
    stage.wait_until_all_is_put_right()
    stage.end_function()
    assert fsck.faults(stage.data, stage.control) == {}
    by_key = stage.operations()
    store = stage.mapped_store()
    for key, read in final_reads(store):
        by_key[key].append(read)
    for key, operations in by_key.items():
        violation = check(operations)
        assert violation is None, f"key {key}: {violation}"
    for key in range(KEYS):
        store.delete(key_of(key))
    assert stage.memory.stats()["used"] == 0
    fill_and_empty(store)
    assert stage.memory.stats()["used"] == 0
    assert fsck.faults(stage.data, stage.control) == {}


@dataclass(frozen=True)
class Plan:
    deaths: int = 40
    clients: int = 4
    operations: int = 3000


@pytest.fixture
def plan() -> Plan:
    return Plan()


@pytest.fixture(params=["clients", "function", "both"])
def victims(request: pytest.FixtureRequest) -> str:
    who: str = request.param
    return who


@pytest.mark.slow
def test_a_kill_costs_nobody_a_value(stage: Stage, plan: Plan, victims: str) -> None:
    stage.start_function()
    deaths = 0
    while deaths < plan.deaths:
        while len(stage.running()) < plan.clients:
            stage.start_client(plan.operations)
        time.sleep(stage.choose.uniform(0.02, 0.25))
        stage.note_ends()
        if victims != "clients" and stage.choose.random() < (0.3 if victims == "both" else 0.8):
            stage.kill_function()
            deaths += 1
        if victims != "function" and (at_work := stage.at_work()):
            some = stage.choose.sample(at_work, min(stage.choose.choice((1, 1, 2, 4)), len(at_work)))
            stage.kill(some)
            deaths += len(some)
    stage.note_ends(LIMIT_S)
    assert_nothing_was_lost_or_left(stage)
