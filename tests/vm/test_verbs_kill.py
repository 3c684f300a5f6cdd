"""Clients of all three fabrics are at work on one shard, and clients and function are killed at any moment."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfaas.testing.lease import BareStore, fill_and_empty
from memfaas.testing.stage import Stage
from tests.e2e.scene import until
from tests.native import test_kill as suite
from tests.native.test_kill import Plan

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    chance = random.Random(str(request.node.name))
    stage = Stage(tmp_path, chance, shm_threads=1, tcp_threads=1, verbs_threads=2)
    yield stage
    stage.close()


@pytest.fixture
def plan() -> Plan:
    return Plan(deaths=6, clients=2, operations=200)


@pytest.fixture(params=["both"])
def victims(request: pytest.FixtureRequest) -> str:
    who: str = request.param
    return who


test_a_kill_costs_nobody_a_value = suite.test_a_kill_costs_nobody_a_value


# --- in the midst of a put ----------------------------------------------------------------------------------

PUTTING = """
import sys
from memfaas.testing.client import connect_verbs
from memfaas.testing.lease import BareStore
port, part = map(int, sys.argv[1:])
store = BareStore(part)
store._set_link(0, connect_verbs(port, 60.0))
value = b"2" * part
print("ready", flush=True)
while True:
    store.put(b"k", value)
"""


def kill_amid_a_put(stage: Stage, store: BareStore) -> None:
    part = stage.memory.part_size
    store.put(b"k", b"1" * part)
    before = stage.memory.stats()
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PUTTING, str(stage.tcp.getsockname()[1]), str(part)], stdout=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        until(lambda: stage.memory.stats()["free_spans"] < before["free_spans"])
        client.kill()
    until(lambda: stage.memory.stats()["used"] == before["used"])
    assert store.get(b"k") in (b"1" * part, b"2" * part)


def test_a_client_that_is_killed_amid_a_put_leaves_a_whole_value_and_takes_no_room(stage: Stage) -> None:
    """What is reserved for the value comes back; and it takes long to write, so a client mostly is amid it."""
    stage.start_function()
    store = stage.mapped_store()
    for _ in range(2):
        kill_amid_a_put(stage, store)
    assert store.delete(b"k")
    fill_and_empty(store)
    assert stage.memory.stats()["used"] == 0
