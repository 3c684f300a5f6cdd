"""A cluster whose clients come over verbs, with a device in software: one node, so they must ask for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.errors import TransportError
from memfaas.units import MIB
from tests.e2e import moves
from tests.e2e.crew import Crew
from tests.e2e.moves import EVERYTHING, Asked, operator
from tests.e2e.scene import functions_of, kill, until

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow, pytest.mark.timeout(900)]

PATIENT_S = 240.0
"""A deadline for a reclaim that is to lose nothing, where all is emulated."""
NOISE = random.Random(6).randbytes(5 * MIB)


@pytest.fixture(name="cluster", scope="module")
def cluster_with_store(cluster: LocalCluster) -> Iterator[LocalCluster]:
    with memfaas.connect(cluster.address) as session:
        session.store("s", size=48 * MIB, persistent=True)
        yield cluster
        session.delete_store("s")


def test_stores_and_regions_are_used_over_verbs(cluster: LocalCluster) -> None:
    with (
        memfaas.connect(cluster.address, fabric="verbs") as session,
        memfaas.connect(cluster.address) as other,
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
    with memfaas.connect(cluster.address, fabric="verbs") as session:
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


def held(cluster: LocalCluster) -> tuple[list[int], str]:
    """Descriptors of each function; and what all processes have of devices: queue pairs, memory, and so on."""
    descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in functions_of(cluster).values()]
    told = subprocess.run(["rdma", "resource"], capture_output=True, text=True, check=True).stdout
    return descriptors, told


def test_sessions_leave_nothing_behind(cluster: LocalCluster) -> None:
    def use() -> None:
        with memfaas.connect(cluster.address, fabric="verbs") as session:
            store = session.store("s")
            store.put("large", NOISE[:MIB])
            assert store.get_many(["large", "absent"]) == [NOISE[:MIB], None]

    use()
    with memfaas.connect(cluster.address) as session:
        until(lambda: not any(lease.links for lease in session.status().leases))
        before = held(cluster)
        for _ in range(10):
            use()
        until(lambda: held(cluster) == before)


def test_a_killed_function_is_replaced_and_nothing_is_lost(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="verbs") as session:
        store = session.store("s")
        for number in range(20):
            store.put(f"k{number}", NOISE[number : number + 5000])
        for pid in functions_of(cluster).values():
            kill(pid)
        for number in range(20):
            assert store.get(f"k{number}") == NOISE[number : number + 5000]
        store.put("k", b"again")
        assert store.get("k") == b"again"


# --- clients of all three fabrics on one store, and what they saw is linearizable ---------------------------


@pytest.fixture
def crew(cluster: LocalCluster, tmp_path: Path) -> Iterator[Crew]:
    with memfaas.connect(cluster.address) as session:
        store = session.store("s")
        for key in list(store.keys()):  # to whose history that of another crew does not belong
            store.delete(key)
    with Crew(cluster.address, tmp_path, fabrics=("shm", "tcp", "verbs")) as crew:
        crew.join("shm", threads=1)
        crew.join("tcp", threads=1)
        crew.join("verbs")
        crew.join("verbs", threads=1)
        crew.goes_on()
        yield crew


def move(cluster: LocalCluster, session: memfaas.Session, donor: str, crew: Crew) -> None:
    """All leases go from one donor to the other one, which takes them."""
    with moves.memory_of(moves.of_donor(cluster, donor)) as backed:
        reclaimed = session.reclaim(donor, EVERYTHING, PATIENT_S, "job")
        assert backed() == 0
    assert moves.lost(reclaimed) == []
    crew.goes_on()
    session.lend(donor, "job")


def test_leases_move_to_and_fro_and_clients_are_killed_meanwhile(cluster: LocalCluster, crew: Crew) -> None:
    with operator(cluster.address) as session:
        for round_ in range(2):
            move(cluster, session, f"donor{round_ % 2}", crew)
            if round_ % 2:
                crew.kill(crew.running()[-1])  # it came over verbs
                crew.join("verbs", threads=1)
    crew.finish()


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """They hang, and then go on."""
    some = list(pids)
    for pid in some:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in some:
            os.kill(pid, signal.SIGCONT)


def test_who_dies_or_hangs_costs_nobody_a_value(cluster: LocalCluster, crew: Crew) -> None:
    functions = functions_of(cluster)
    for pid in functions.values():
        kill(pid)
        crew.goes_on()
    with stopped(functions_of(cluster).values()):
        time.sleep(1)
    crew.goes_on()
    cluster.kill_donor(0)
    crew.goes_on()
    cluster.restart_donor(0)
    cluster.kill_broker()
    crew.goes_on()
    cluster.restart_broker()
    crew.goes_on()
    with operator(cluster.address) as session:
        victim = moves.functions_of(cluster)[0]
        with Asked(cluster.address, victim.donor, EVERYTHING, PATIENT_S):
            kill(victim.pid)
            crew.goes_on()
        reclaimed = moves.insist(session, victim.donor, EVERYTHING, PATIENT_S, "job")
        assert moves.lost(reclaimed) == []
        crew.goes_on()
        session.lend(victim.donor, "job")
    crew.finish()
    assert functions_of(cluster).keys() == functions.keys()


def grows(seen: list[int]) -> None:
    before = len(seen)
    until(lambda: len(seen) > before + 20)


def test_words_of_a_region_that_moves_are_changed_once(cluster: LocalCluster) -> None:
    """Or nobody knows, and that is said: the device that was asked may have done it before it was closed."""
    with (
        operator(cluster.address) as session,
        memfaas.connect(cluster.address, fabric="verbs") as user,
        user.lease(8 * MIB) as region,
    ):
        region.write(1000, b"kept")
        seen: list[int] = []
        unknown: list[TransportError] = []
        stop = threading.Event()

        def count() -> None:
            while not stop.is_set():
                try:
                    seen.append(region.fetch_add(8, 1))
                except TransportError as error:
                    unknown.append(error)

        thread = threading.Thread(target=count)
        thread.start()
        try:
            for _ in range(2):
                donor = region.donor
                grows(seen)
                assert moves.lost(session.reclaim(donor, EVERYTHING, PATIENT_S, "job")) == []
                grows(seen)
                assert region.donor != donor
                assert region.fabric == "verbs"
                session.lend(donor, "job")
        finally:
            stop.set()
            thread.join()
        assert seen == sorted(set(seen))
        assert len(seen) <= region.fetch_add(8, 0) <= len(seen) + len(unknown)
        assert all("may or may not have been changed" in str(error) for error in unknown)
        assert region.read(1000, 4) == b"kept"


def test_processes_count_together(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="verbs") as session, session.lease(MIB) as region:
        region.write(8, bytes(8))
        children = []
        for _ in range(3):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    for _ in range(50):
                        region.fetch_add(0, 1)
                        while (seen := int.from_bytes(region.read(8, 8), "little")) != region.compare_swap(
                            8, seen, seen + 1
                        ):
                            pass
                    status = 0 if region.fabric == "verbs" else 2
                finally:
                    session.close()
                    os._exit(status)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
        assert region.fetch_add(0, 0) == region.fetch_add(8, 0) == 150
