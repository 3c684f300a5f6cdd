"""Memory is back by the deadline, read from the kernel, and nothing is lost that could be saved, silently never."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.errors import AccessError, CapacityError, KeyAbsent, LeaseLost, UsageError, ValueLost
from memfaas.messages import DonorInfo
from memfaas.units import MIB
from tests import disks
from tests.e2e import moves
from tests.e2e.crew import Crew
from tests.e2e.moves import EVERYTHING, PATIENT_S, Asked, Ledger, copying, operator
from tests.e2e.scene import LIMIT_S, kill, until

pytestmark = pytest.mark.slow

MEMORY = 160 * MIB
STORE = 96 * MIB
LENGTH = 256 * 1024
KEPT = 200


@pytest.fixture
def two() -> Iterator[LocalCluster]:
    with LocalCluster(donors=2, memory=MEMORY) as cluster:
        yield cluster


@pytest.fixture
def one() -> Iterator[LocalCluster]:
    with LocalCluster(donors=1, memory=MEMORY) as cluster:
        yield cluster


def donor_of(session: memfaas.Session, name: str) -> DonorInfo:
    return next(info for info in session.status().donors if info.donor == name)


def lends(session: memfaas.Session, name: str, size: int) -> Callable[[], bool]:
    """Whether the broker knows that the donor lends so many bytes at most."""
    return lambda: donor_of(session, name).memory.offered == size


# --- step by step ---------------------------------------------------------------------------------------


def test_memory_that_nobody_leased_goes_first(two: LocalCluster) -> None:
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        kept = Ledger(user.store("s", size=STORE), KEPT, LENGTH)
        before = {(one.pid, one.lease) for one in moves.functions_of(two)}
        reclaimed = session.reclaim("donor0", 64 * MIB, PATIENT_S, "job 1")
        assert (reclaimed.in_time, reclaimed.freed) == (True, 64 * MIB)
        assert moves.freed(reclaimed, "unlent") == 64 * MIB
        assert {(one.pid, one.lease) for one in moves.functions_of(two)} == before
        until(lends(session, "donor0", MEMORY - 64 * MIB))
        assert donor_of(session, "donor0").reclaimed == {"job 1": 64 * MIB}
        with pytest.raises(CapacityError):
            user.lease("110MiB")  # more than donor0 has left now, and donor1 beside its shard
        session.lend("donor0", "job 1")
        until(lends(session, "donor0", MEMORY))
        assert donor_of(session, "donor0").reclaimed == {}
        assert kept.missing(user.store("s")) == []


def test_free_parts_of_a_shard_go_next_and_it_goes_on(one: LocalCluster, tmp_path: Path) -> None:
    with operator(one.address) as session, memfaas.connect(one.address) as user:
        store = user.store("s", size=128 * MIB)
        kept = Ledger(store, 100, LENGTH)
        with Crew(one.address, tmp_path) as crew:
            crew.join("shm", threads=1)
            crew.join("tcp", threads=1)
            (function,) = moves.functions_of(one)
            with moves.memory_of([function]) as backed:
                until(lambda: backed() > 127 * MIB)  # it grows in the background
                before = backed()
                unlent = unlent_of(session, "donor0")
                crew.goes_on()
                reclaimed = session.reclaim("donor0", unlent + 40 * MIB, PATIENT_S, "job")
                assert reclaimed.in_time
                assert moves.freed(reclaimed, "punched") >= 40 * MIB
                assert moves.freed(reclaimed, "unlent", "punched") == reclaimed.freed
                crew.goes_on()
                assert backed() <= before - 40 * MIB
                assert [f.pid for f in moves.functions_of(one)] == [function.pid]
            session.lend("donor0", "job")
            crew.goes_on()
            crew.finish()
        assert kept.missing(store) == []
        more = Ledger(store, 250, LENGTH, seed=2)  # it has all of its room again
        assert more.missing(store) == []
        moves.check_quiet(one, session)


def unlent_of(session: memfaas.Session, donor: str) -> int:
    memory = donor_of(session, donor).memory
    return memory.offered - memory.leased


def test_whole_leases_move_when_nothing_else_is_left(two: LocalCluster) -> None:
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        kept = Ledger(user.store("s", size=STORE), KEPT, LENGTH)
        functions = moves.of_donor(two, "donor0")
        with moves.memory_of(functions) as backed:
            reclaimed = session.reclaim("donor0", EVERYTHING, PATIENT_S, "job")
            assert backed() == 0
        assert reclaimed.in_time
        assert reclaimed.asked == MEMORY
        assert reclaimed.freed >= MEMORY
        assert [part.what for part in reclaimed.steps if part.how == "migrated"] != []
        assert moves.of_donor(two, "donor0") == []
        assert kept.missing(user.store("s")) == []
        until(lends(session, "donor0", 0))
        # Nothing new goes there until it may be lent again.
        with pytest.raises(CapacityError):
            user.lease(MEMORY - 8 * MIB)
        session.lend("donor0", "job")
        with user.lease(MEMORY - 8 * MIB) as region:
            assert region.donor == "donor0"
        moves.check_quiet(two, session)


# --- what could not be saved ------------------------------------------------------------------------------


@contextmanager
def full_donor(cluster: LocalCluster) -> Iterator[tuple[memfaas.Session, memfaas.Session, memfaas.Store, Ledger]]:
    """A store on the only donor, with values that fill it, and a region."""
    with operator(cluster.address) as session, memfaas.connect(cluster.address) as user:
        store = user.store("s", size=STORE)
        yield session, user, store, Ledger(store, KEPT, LENGTH)


@pytest.mark.parametrize("deadline_s", [0.0, 0.001, 0.3])
def test_without_another_donor_memory_goes_at_the_deadline_and_what_is_lost_is_named(
    one: LocalCluster, deadline_s: float
) -> None:
    with full_donor(one) as (session, user, store, kept):
        region = user.lease("16MiB")
        region.write(0, b"1")
        with moves.memory_of(moves.functions_of(one)) as backed:
            assert backed() > 0
            reclaimed = session.reclaim("donor0", EVERYTHING, deadline_s, "job")
            assert backed() == 0
        assert sorted(moves.lost(reclaimed)) == sorted(
            [f"shard 0 of store 's' of {user.tenant}", f"region {region.lease.hex()[:8]} of {user.tenant}"]
        )
        assert kept.missing(store) == kept.keys
        for operation in (lambda: store.get(kept.keys[0]), lambda: store.get_many(kept.keys)):
            with pytest.raises(ValueLost):
                operation()
        with pytest.raises(LeaseLost):
            region.read(0, 1)
        assert moves.functions_of(one) == []
        assert [store.lost_shards for store in user.stores()] == [[0]]  # it was all of it
        moves.check_quiet(one, session)


def test_a_deadline_that_is_too_short_for_a_copy_takes_the_memory_all_the_same(two: LocalCluster) -> None:
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        store = user.store("s", size=STORE)
        kept = Ledger(store, KEPT, LENGTH)
        with moves.memory_of(moves.of_donor(two, "donor0")) as backed:
            reclaimed = session.reclaim("donor0", EVERYTHING, 0.002, "job")
            assert backed() == 0
        missing = kept.missing(store)
        until(lambda: moves.served_once(two, session))
        assert bool(missing) == bool(moves.lost(reclaimed))
        assert moves.freed(reclaimed, "unlent", "punched", "migrated", "lost") >= MEMORY
        assert moves.of_donor(two, "donor0") == []
        moves.check_quiet(two, session)


def test_both_donors_at_once_lose_what_has_nowhere_to_go(two: LocalCluster) -> None:
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        store = user.store("s", size=STORE)
        kept = Ledger(store, KEPT, LENGTH)
        with (
            moves.memory_of(moves.functions_of(two)) as backed,
            Asked(two.address, "donor0", EVERYTHING, 2.0) as one,
            Asked(two.address, "donor1", EVERYTHING, 2.0) as other,
        ):
            results = [one.result(), other.result()]
            assert backed() == 0
        assert sum(len(moves.lost(reclaimed)) for reclaimed in results) == 2
        assert kept.missing(store) == kept.keys
        assert moves.functions_of(two) == []
        with pytest.raises(CapacityError):
            user.lease("2MiB")
        for donor in ("donor0", "donor1"):
            session.lend(donor, "job")
        with user.lease("2MiB") as region:
            assert region.read(0, 1) == b"\0"
        moves.check_quiet(two, session)


# --- caches -----------------------------------------------------------------------------------------------


def test_a_cache_is_dropped_and_says_so(two: LocalCluster) -> None:
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        store = user.store("cache", size=STORE, on_reclaim="drop")
        kept = Ledger(store, KEPT, LENGTH)
        with moves.memory_of(moves.of_donor(two, "donor0")) as backed:
            reclaimed = session.reclaim("donor0", EVERYTHING, PATIENT_S, "job")
            assert backed() == 0
        assert reclaimed.in_time
        assert moves.freed(reclaimed, "dropped") > 0
        assert moves.freed(reclaimed, "migrated", "lost") == 0
        absent = []
        for key in kept.keys:
            try:
                store.get(key)
            except KeyAbsent:
                absent.append(key)
        assert 0 < len(absent) < len(kept.keys)
        until(lambda: [info.dropped for info in user.stores()] == [len(absent)])
        # The shard is there again, empty, where there is room.
        again = Ledger(store, KEPT, LENGTH, seed=2)
        assert again.missing(store) == []
        moves.check_quiet(two, session)


def test_a_cache_without_a_place_is_full_until_there_is_one(one: LocalCluster) -> None:
    with operator(one.address) as session, memfaas.connect(one.address) as user:
        store = user.store("cache", size=STORE, on_reclaim="drop")
        Ledger(store, KEPT, LENGTH)
        assert moves.freed(session.reclaim("donor0", EVERYTHING, PATIENT_S, "job"), "dropped") > 0
        until(lambda: moves.functions_of(one) == [])  # its keys are counted behind the answer
        with pytest.raises(CapacityError):
            store.put("a", b"1")
        session.lend("donor0", "job")
        until(lambda: takes(store, "a", b"1"))
        assert store.get("a") == b"1"
        assert len(store) == 1
        moves.check_quiet(one, session)


def takes(store: memfaas.Store, key: str, value: bytes) -> bool:
    try:
        store.put(key, value)
    except CapacityError:
        return False
    return True


# --- several who want it ----------------------------------------------------------------------------------


def test_two_reclaims_of_one_donor_get_both_what_they_ask_for(two: LocalCluster) -> None:
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        kept = Ledger(user.store("s", size=STORE), KEPT, LENGTH)
        with (
            moves.memory_of(moves.of_donor(two, "donor0")) as backed,
            Asked(two.address, "donor0", 80 * MIB, PATIENT_S, "job 1") as one,
            Asked(two.address, "donor0", 70 * MIB, PATIENT_S, "job 2") as other,
        ):
            results = [one.result(), other.result()]
            assert backed() <= 10 * MIB
        assert all(reclaimed.in_time for reclaimed in results)
        assert [moves.lost(reclaimed) for reclaimed in results] == [[], []]
        until(lambda: donor_of(session, "donor0").reclaimed == {"job 1": 80 * MIB, "job 2": 70 * MIB})
        assert donor_of(session, "donor0").memory.offered == 10 * MIB
        session.lend("donor0", "job 2")
        until(lends(session, "donor0", 80 * MIB))
        session.lend("donor0", "job 1")
        until(lends(session, "donor0", MEMORY))
        assert kept.missing(user.store("s")) == []
        moves.check_quiet(two, session)


def test_what_one_holder_asks_for_adds_up(two: LocalCluster) -> None:
    with operator(two.address) as session:
        for number in (1, 2, 3):
            assert session.reclaim("donor0", 20 * MIB, PATIENT_S, "job").in_time
            until(lends(session, "donor0", MEMORY - number * 20 * MIB))
        session.lend("donor0", "somebody else")
        session.lend("donor0", "job")
        until(lends(session, "donor0", MEMORY))


def test_only_the_operator_may_and_only_of_donors_that_there_are(two: LocalCluster) -> None:
    with memfaas.connect(two.address, tenant="alice") as user, operator(two.address) as session:
        with pytest.raises(AccessError):
            user.reclaim("donor0", MIB, 1.0, "job")
        with pytest.raises(AccessError):
            user.lend("donor0", "job")
        with pytest.raises(UsageError):
            session.reclaim("donor9", MIB, 1.0, "job")
        assert donor_of(session, "donor0").memory.offered == MEMORY


# --- spill donors -----------------------------------------------------------------------------------------


@pytest.fixture
def spilling() -> Iterator[LocalCluster]:
    """A donor, and one that lends the disk."""
    with LocalCluster(donors=1, memory=MEMORY, spill=2 * MEMORY) as cluster:
        yield cluster


def test_what_has_no_room_in_memory_is_spilled_and_comes_home(spilling: LocalCluster) -> None:
    with full_donor(spilling) as (session, _, store, kept):
        assert {keeper.place.donor for keeper in store.keepers} == {"donor0"}
        with moves.memory_of(moves.of_donor(spilling, "donor0")) as backed:
            reclaimed = session.reclaim("donor0", EVERYTHING, PATIENT_S, "job")
            assert backed() == 0
        assert reclaimed.in_time
        assert moves.freed(reclaimed, "spilled") > 0
        assert moves.lost(reclaimed) == []
        assert kept.missing(store) == []
        spilt = moves.functions_of(spilling)
        assert [one.donor for one in spilt] == ["spill"]
        with moves.memory_of(spilt) as on_disk:
            assert on_disk() >= STORE
            session.lend("donor0", "job")
            until(lambda: [one.donor for one in moves.functions_of(spilling)] == ["donor0"])
            until(lambda: on_disk() == 0)
        assert kept.missing(store) == []
        with memfaas.connect(spilling.address, fabric="tcp") as newcomer:
            assert kept.missing(newcomer.store("s")) == []
        moves.check_quiet(spilling, session)


def test_clients_work_on_while_their_shard_goes_to_the_disk_and_back(spilling: LocalCluster, tmp_path: Path) -> None:
    with (
        full_donor(spilling) as (session, _, store, kept),
        Crew(spilling.address, tmp_path) as crew,
    ):
        crew.join("shm", threads=1)
        crew.join("tcp", threads=1)
        for _ in range(2):
            crew.goes_on()
            assert moves.lost(session.reclaim("donor0", EVERYTHING, PATIENT_S, "job")) == []
            crew.goes_on()
            session.lend("donor0", "job")
            until(lambda: [one.donor for one in moves.functions_of(spilling)] == ["donor0"])
        crew.finish()
        assert kept.missing(store) == []
        moves.check_quiet(spilling, session)


@pytest.mark.parametrize("left", [40 * MIB, 0])
def test_a_full_spill_disk_loses_nothing_silently(one: LocalCluster, own_world: Path, left: int) -> None:
    """Somebody else has filled the disk meanwhile. What cannot be written is lost at the deadline, by name."""
    folder = own_world / "scratch"
    folder.mkdir()
    with disks.small_disk(folder, 2 * MEMORY):
        moves.add_spill_donor(one, "spill", folder, MEMORY)
        room = disks.free(folder)
        with full_donor(one) as (session, _, store, kept):
            with (
                disks.filled_but_for(folder, left),
                moves.memory_of(moves.of_donor(one, "donor0")) as backed,
            ):
                reclaimed = session.reclaim("donor0", EVERYTHING, 3.0, "job")
                assert backed() == 0
            assert moves.freed(reclaimed, "spilled") == 0
            assert moves.lost(reclaimed) != []
            assert kept.missing(store) == kept.keys
            with pytest.raises(ValueLost):
                store.get(kept.keys[0])
            until(lambda: moves.served_once(one, session))
            assert moves.functions_of(one) == []
            assert disks.free(folder) == room
            moves.check_quiet(one, session)
        one._processes.pop("spill").stop(10.0)
    folder.rmdir()


# --- a target that fills up -------------------------------------------------------------------------------

_GROUPS = Path("/sys/fs/cgroup/memory")


@contextmanager
def memory_group(name: str) -> Iterator[Path]:
    """A memory control group; whoever is still in it goes to the root group in the end."""
    folder = _GROUPS / name
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"limits need a memory control group of version 1: {error}")
    try:
        yield folder
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            try:
                (_GROUPS / "cgroup.procs").write_text(pid)
            except OSError:  # it has ended
                pass
        folder.rmdir()


def test_a_target_that_fills_up_midway_costs_nothing_while_there_is_time() -> None:
    """Its node's memory is taken by others while it receives: its function is killed for want of memory."""
    with (
        LocalCluster(donors=2, memory=420 * MIB) as cluster,
        memory_group(f"memfaas-{os.getpid()}") as group,
        operator(cluster.address) as session,
        memfaas.connect(cluster.address) as user,
    ):
        session.reclaim("donor1", EVERYTHING, PATIENT_S, "later")
        store = user.store("s", size=384 * MIB)
        session.lend("donor1", "later")
        kept = Ledger(store, 300, MIB)
        for pid in _family_of(cluster.donor_pid(1)):
            (group / "cgroup.procs").write_text(str(pid))
        source = {function.pid for function in moves.of_donor(cluster, "donor0")}
        with moves.memory_of(moves.of_donor(cluster, "donor0")) as backed:
            with Asked(cluster.address, "donor0", EVERYTHING, PATIENT_S) as asked:
                copying(cluster, asked, "donor0", 16 * MIB)
                usage = int((group / "memory.usage_in_bytes").read_text())
                (group / "memory.limit_in_bytes").write_text(str(usage + 16 * MIB))
                until(lambda: int((group / "memory.failcnt").read_text()) > 0)
                assert source <= {function.pid for function in moves.of_donor(cluster, "donor0")}
                assert kept.missing(store) == []  # served where it was
                (group / "memory.limit_in_bytes").write_text("-1")
                if not cluster_lives(cluster):
                    cluster.restart_donor(1)
                reclaimed = asked.result()
            assert backed() == 0
        assert reclaimed.in_time
        assert moves.lost(reclaimed) == []
        assert kept.missing(store) == []
        until(lambda: moves.served_once(cluster, session))
        moves.check_quiet(cluster, session)


def cluster_lives(cluster: LocalCluster) -> bool:
    """Whether no agent was killed for want of memory."""
    return all(process._child.poll() is None for process in cluster._processes.values())


def _family_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


# --- the broker is away -----------------------------------------------------------------------------------


def test_a_reclaim_ends_by_its_deadline_though_the_broker_has_died(two: LocalCluster) -> None:
    """Nobody can tell where the lease could go, so it goes; who asked hears nothing, but the memory is free."""
    with operator(two.address) as session, memfaas.connect(two.address) as user:
        store = user.store("s", size=STORE)
        kept = Ledger(store, KEPT, LENGTH)
        with moves.memory_of(moves.of_donor(two, "donor0")) as backed:
            with Asked(two.address, "donor0", EVERYTHING, 2.0):
                kill(two.broker_pid)
                until(lambda: backed() == 0 or donor_is_not_asked(two))
                two.restart_broker()
            reclaimed = moves.insist(session, "donor0", EVERYTHING, PATIENT_S, "job")
            assert reclaimed.in_time
            assert backed() == 0
        until(lambda: moves.served_once(two, session))
        missing = kept.missing(store)
        with memfaas.connect(two.address) as newcomer:
            assert kept.missing(newcomer.store("s")) == missing
        moves.check_quiet(two, session)


def donor_is_not_asked(cluster: LocalCluster) -> bool:
    """The broker died before it had passed the request on."""
    return "job" not in (cluster.folder / "donor0.log").read_text()


# --- clocks -----------------------------------------------------------------------------------------------

_SHIFT = """
import os, time
_real, _file = time.time, os.environ["TESTED_CLOCK_FILE"]
def _shifted():
    try:
        with open(_file) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()
time.time = _shifted
"""


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of all processes that start from now on so many seconds ahead, at any time."""
    offset = tmp_path / "offset"
    (tmp_path / "sitecustomize.py").write_text(_SHIFT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TESTED_CLOCK_FILE", str(offset))

    def jump(seconds: float) -> None:
        draft = tmp_path / "draft"
        draft.write_text(str(seconds))
        draft.rename(offset)
        shown = subprocess.check_output([sys.executable, "-P", "-c", "import time; print(time.time())"])
        assert abs(float(shown) - time.time() - seconds) < LIMIT_S

    return jump


@pytest.mark.parametrize("seconds", [7 * 86_400, -7 * 86_400])
def test_a_wall_clock_that_jumps_ends_nothing(jump: Callable[[float], None], tmp_path: Path, seconds: float) -> None:
    """Of the node that all of the cluster is on: forth and back by a week, also in the middle of a move."""
    with (
        LocalCluster(donors=2, memory=420 * MIB) as cluster,
        operator(cluster.address) as session,
        memfaas.connect(cluster.address) as user,
        Crew(cluster.address, tmp_path) as crew,
    ):
        session.reclaim("donor1", EVERYTHING, PATIENT_S, "later")
        store = user.store("s", size=384 * MIB)
        session.lend("donor1", "later")
        kept = Ledger(store, 270, MIB)
        crew.join("shm", threads=1)
        crew.join("tcp", threads=1)
        crew.goes_on()
        with Asked(cluster.address, "donor0", EVERYTHING, PATIENT_S) as asked:
            copying(cluster, asked, "donor0", 8 * MIB)
            jump(seconds)
            assert moves.lost(asked.result()) == []
        crew.goes_on()
        session.lend("donor0", "job")
        jump(0)
        reclaimed = session.reclaim("donor1", EVERYTHING, PATIENT_S, "job")
        assert (reclaimed.in_time, moves.lost(reclaimed)) == (True, [])
        crew.goes_on()
        with memfaas.connect(cluster.address, fabric="tcp") as newcomer:
            assert kept.missing(newcomer.store("s")) == []
        crew.finish()
        moves.check_quiet(cluster, session)
