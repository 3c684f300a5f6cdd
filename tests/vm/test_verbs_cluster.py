"""A cluster whose clients come over verbs, with a device in software: one node, so they must ask for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import memfaas
from memfaas.client import local
from memfaas.client.local import LocalCluster
from memfaas.errors import DeadlineExceeded, TransportError
from memfaas.units import MIB
from tests.e2e import moves
from tests.e2e.crew import Crew
from tests.e2e.moves import EVERYTHING, PATIENT_S, operator
from tests.e2e.scene import functions_of, idle_functions_of, kill, until

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]

PATIENT = 60.0
"""For an operation, in a machine that is emulated."""
NOISE = random.Random(6).randbytes(5 * MIB)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    local.START_S = 100.0  # it is emulated, with a disk that is far away
    with LocalCluster(donors=2, memory=160 * MIB) as cluster:
        until(lambda: idle_functions_of(cluster) == 2 * moves.WARM)
        with memfaas.connect(cluster.address, timeout=PATIENT) as session:
            session.store("s", size=48 * MIB, persistent=True)
        yield cluster


def test_stores_and_regions_are_used_over_verbs(cluster: LocalCluster) -> None:
    with (
        memfaas.connect(cluster.address, fabric="verbs", timeout=PATIENT) as session,
        memfaas.connect(cluster.address, timeout=PATIENT) as other,
    ):
        store, same = session.store("s"), other.store("s")
        for size in (0, 10, 4096, 70_000, 300_000, 5 * MIB):
            store.put(f"v{size}", NOISE[:size])
            assert store.get(f"v{size}") == NOISE[:size]
            assert same.get(f"v{size}") == NOISE[:size]
            same.put(f"v{size}", NOISE[-size - 1 :])
            assert store.get(f"v{size}") == NOISE[-size - 1 :]
        assert sorted(store.keys()) == sorted(same.keys())
        assert {shard.fabric for shard in store.info().shards} == {"verbs"}
        with session.lease(8 * MIB) as region:
            region.write(1000, NOISE[:MIB])
            assert region.read(1000, MIB) == NOISE[:MIB]
            assert region.fetch_add(0, 3) == 0
            assert region.compare_swap(0, 3, 9) == 3
            assert region.fabric == "verbs"
        until(lambda: any(lease.links.get("verbs") for lease in other.status().leases))


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_function_has_no_part_in_gets(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="verbs", timeout=PATIENT) as session:
        store = session.store("s")
        for number in range(50):
            store.put(f"k{number}", NOISE[number : number + 4096])
        functions = functions_of(cluster).values()
        before = {pid: cpu_ticks(pid) for pid in functions}
        for turn in range(3000):
            number = turn % 50
            assert store.get(f"k{number}") == NOISE[number : number + 4096]
        for pid in functions:
            assert cpu_ticks(pid) - before[pid] <= 1
        for pid in functions:
            os.kill(pid, signal.SIGSTOP)
        try:
            for number in range(50):
                assert store.get(f"k{number}") == NOISE[number : number + 4096]
        finally:
            for pid in functions:
                os.kill(pid, signal.SIGCONT)


def test_a_put_to_a_function_that_hangs_ends_within_its_deadline(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="verbs", timeout=8) as session:
        store = session.store("s")
        store.put("k", b"before")
        for pid in functions_of(cluster).values():
            os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        try:
            with pytest.raises((DeadlineExceeded, TransportError)):
                store.put("k", b"after")
        finally:
            for pid in functions_of(cluster).values():
                os.kill(pid, signal.SIGCONT)
        assert time.monotonic() - started < 20
        assert store.get("k") in (b"before", b"after")


def test_a_killed_function_is_replaced_and_nothing_is_lost(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="verbs", timeout=PATIENT) as session:
        store = session.store("s")
        for number in range(20):
            store.put(f"k{number}", NOISE[number : number + 5000])
        for pid in functions_of(cluster).values():
            kill(pid)
        for number in range(20):
            assert store.get(f"k{number}") == NOISE[number : number + 5000]
        store.put("k", b"again")
        assert store.get("k") == b"again"


def test_leases_move_under_clients_that_come_over_verbs(cluster: LocalCluster, tmp_path: Path) -> None:
    with (
        operator(cluster.address) as session,
        memfaas.connect(cluster.address, timeout=PATIENT) as owner,
        Crew(cluster.address, tmp_path, fabrics=("verbs",)) as crew,
    ):
        owner.store("s")
        crew.join("verbs")
        crew.join("verbs")
        crew.goes_on()
        for round_ in range(3):
            donor = f"donor{round_ % 2}"
            functions = moves.of_donor(cluster, donor)
            with moves.memory_of(functions) as backed:
                reclaimed = session.reclaim(donor, EVERYTHING, PATIENT_S, f"job {round_}")
                assert backed() == 0
            assert moves.lost(reclaimed) == []
            crew.goes_on()
            session.lend(donor, f"job {round_}")
        crew.finish()


def test_when_the_link_is_down_operations_end_within_their_deadline(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="verbs", timeout=8) as session:
        store = session.store("s")
        store.put("k", b"value")
        subprocess.run(["ip", "link", "set", "rdma0", "down"], check=True)
        started = time.monotonic()
        try:
            with pytest.raises((TransportError, DeadlineExceeded)):
                store.get("k")
            assert time.monotonic() - started < 20
        finally:
            subprocess.run(["ip", "link", "set", "rdma0", "up"], check=True)
        assert store.get("k") == b"value"
