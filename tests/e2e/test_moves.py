"""Leases move from donor to donor while clients are at work, and somebody dies or hangs meanwhile.

Whatever happens, each shard is served in exactly one place afterwards, or is reported as lost, and what
clients saw is linearizable for each key.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import trio

import memfaas
from memfaas import local_agent
from memfaas.client.local import LocalCluster
from memfaas.errors import ClosedError, LeaseLost
from memfaas.fabric import Choice
from memfaas.messages import Reclaim, Reclaimed
from memfaas.units import MIB
from tests.e2e import moves
from tests.e2e.crew import Crew
from tests.e2e.moves import EVERYTHING, PATIENT_S, Asked, Function, Ledger, copying, operator
from tests.e2e.scene import LIMIT_S, kill, until

pytestmark = pytest.mark.slow

MEMORY = 420 * MIB
STORE = 384 * MIB
"""Of two shards, so large that a copy takes some tenths of a second."""
KEPT, LENGTH = 270, MIB
PART = 8 * MIB
"""So much of a lease has come: its copy is under way."""

# --- nobody dies ------------------------------------------------------------------------------------------


@pytest.fixture
def three() -> Iterator[LocalCluster]:
    with LocalCluster(donors=3, memory=160 * MIB) as cluster:
        yield cluster


def test_clients_notice_nothing_of_moves(three: LocalCluster, tmp_path: Path) -> None:
    with (
        operator(three.address) as session,
        memfaas.connect(three.address) as owner,
        Crew(three.address, tmp_path) as crew,
    ):
        owner.store("s", size="96MiB")
        moves.check_quiet(three, session)
        opened = sum(moves.agents_descriptors(three).values())
        crew.join("shm")
        crew.join("tcp")
        pauses = []
        for round_ in range(9):
            donor = f"donor{round_ % 3}"
            crew.goes_on()
            functions = moves.of_donor(three, donor)
            with moves.memory_of(functions) as backed:
                reclaimed = session.reclaim(donor, EVERYTHING, PATIENT_S, f"job {round_}")
                assert backed() == 0
            assert reclaimed.in_time
            assert moves.lost(reclaimed) == []
            assert {part.lease.hex()[:8] for part in reclaimed.steps if part.how == "migrated"} == {
                one.lease for one in functions
            }
            pauses += [part.pause for part in reclaimed.steps if part.how == "migrated"]
            assert moves.of_donor(three, donor) == []
            crew.goes_on()
            session.lend(donor, f"job {round_}")
        assert len(pauses) >= 9
        crew.finish()
        until(lambda: moves.served_once(three, session))
        moves.check_quiet(three, session)
        until(lambda: sum(moves.agents_descriptors(three).values()) == opened)
    shown = sorted(pauses)
    print(
        f"{len(pauses)} moves; pauses: median {shown[len(shown) // 2] * 1e3:.1f} ms, longest {shown[-1] * 1e3:.1f} ms"
    )


class Counting:
    """Threads that count up one word of a region, each noting what it found there."""

    def __init__(self, region: memfaas.Region) -> None:
        self.seen: list[list[int]] = [[], []]
        self.errors: list[BaseException] = []
        self._region = region
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(found,)) for found in self.seen]

    def _run(self, found: list[int]) -> None:
        try:
            while not self._stop.is_set():
                found.append(self._region.fetch_add(8, 1))
        except BaseException as error:
            self.errors.append(error)

    def goes_on(self) -> None:
        before = [len(found) for found in self.seen]
        until(lambda: self.errors or all(len(f) > b + 50 for f, b in zip(self.seen, before, strict=True)))
        assert self.errors == []

    def __enter__(self) -> Counting:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_no_increment_is_lost_or_done_twice_while_a_region_moves(three: LocalCluster, fabric: Choice) -> None:
    with operator(three.address) as session, memfaas.connect(three.address, fabric=fabric) as user:
        region = user.lease("32MiB")
        region.write(1000, b"kept")
        places = []
        with Counting(region) as counting:
            for round_ in range(4):
                counting.goes_on()
                places.append(region.donor)
                reclaimed = session.reclaim(region.donor, EVERYTHING, PATIENT_S, f"job {round_}")
                assert (reclaimed.in_time, moves.lost(reclaimed)) == (True, [])
                counting.goes_on()
                session.lend(places[-1], f"job {round_}")
        assert counting.errors == []
        done = sorted(counting.seen[0] + counting.seen[1])
        assert done == [*range(len(done))]
        assert region.fetch_add(8, 0) == len(done)
        assert region.read(1000, 4) == b"kept"
        assert all(before != after for before, after in pairwise(places))


def test_who_is_connected_later_finds_what_has_moved(three: LocalCluster) -> None:
    """Also by places and tickets of long ago: a session that was idle meanwhile."""
    with operator(three.address) as session, memfaas.connect(three.address, fabric="tcp") as idle:
        store = idle.store("s", size="48MiB")
        kept = Ledger(store, 40, 100_000)
        for donor in ("donor0", "donor1", "donor0"):
            assert session.reclaim(donor, EVERYTHING, PATIENT_S, "job").in_time
            session.lend(donor, "job")
        assert kept.missing(store) == []
        with memfaas.connect(three.address) as newcomer:
            assert kept.missing(newcomer.store("s")) == []


def test_a_broker_that_is_new_knows_where_leases_have_moved(three: LocalCluster) -> None:
    with operator(three.address) as session, memfaas.connect(three.address) as user:
        kept = Ledger(user.store("s", size="48MiB", persistent=True), 40, 100_000)
        for donor in ("donor0", "donor2"):
            assert session.reclaim(donor, EVERYTHING, PATIENT_S, "job").in_time
            session.lend(donor, "job")
        three.kill_broker()
        three.restart_broker()
        until(lambda: moves.served_once(three, session))
        with memfaas.connect(three.address) as newcomer:
            assert kept.missing(newcomer.store("s")) == []
        moves.check_quiet(three, session)


def test_a_broker_that_is_new_knows_what_was_lost_before(three: LocalCluster) -> None:
    """Nobody could say where it might go, so it is lost, by name: no client waits for it."""
    with operator(three.address) as session, memfaas.connect(three.address) as user:
        store = user.store("s", size="48MiB", persistent=True)
        region = user.lease("4MiB")
        kept = Ledger(store, 40, 100_000)
        on_donor = sum(one.donor == region.donor for one in session.status().leases)
        three.kill_broker()
        asked = Reclaim(donor="", size=EVERYTHING, deadline=1.0, holder="job")
        home = three.folder / "run" / region.donor
        reclaimed = trio.run(partial(local_agent.ask, home, asked, Reclaimed, LIMIT_S))
        assert len(moves.lost(reclaimed)) == on_donor
        three.restart_broker()
        missing = kept.missing(store)
        lost_shards = {shard for info in user.stores() for shard in info.lost_shards}
        assert {store._shard_of(key, 0) for key in missing} == lost_shards
        assert 0 < len(missing) < len(kept.keys)
        with pytest.raises(LeaseLost):
            region.read(0, 1)


# --- somebody dies, and comes back ------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[LocalCluster]:
    """Two donors that lend a shard each, and one that lends nothing yet."""
    with LocalCluster(donors=3, memory=MEMORY) as cluster:
        yield cluster


class Scene:
    """A store on two donors, with values that are known and clients at work, and donor0 about to be reclaimed."""

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.session = operator(cluster.address)
        # So that there are two shards, on donor0 and donor1, and donor2 is where they go.
        self.session.reclaim("donor2", EVERYTHING, PATIENT_S, "later")
        self.user = memfaas.connect(cluster.address, timeout=LIMIT_S)
        self.store = self.user.store("s", size=STORE)
        self.session.lend("donor2", "later")
        self.kept = Ledger(self.store, KEPT, LENGTH)
        self.crew = Crew(cluster.address, folder)
        self.crew.join("shm", threads=1)
        self.crew.join("tcp", threads=1)
        self.crew.goes_on()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.crew.__exit__(None, None, None)
        self.user.close()
        self.session.close()

    def reclaim(self) -> Asked:
        return Asked(self.cluster.address, "donor0", EVERYTHING, PATIENT_S)

    def source(self) -> Function:
        return next(one for one in moves.of_donor(self.cluster, "donor0"))

    def nothing_is_lost(self) -> None:
        """Nobody saw an error, all values are there, donor0 is empty, and no trace of the trouble is left."""
        with self.memory_of_donor0() as backed:
            reclaimed = moves.insist(self.session, "donor0", EVERYTHING, PATIENT_S, "once more")
            assert reclaimed.in_time
            assert moves.lost(reclaimed) == []
            assert backed() == 0
        self.crew.goes_on()
        self.crew.finish()
        assert self.kept.missing(self.store) == []
        with memfaas.connect(self.cluster.address, fabric="tcp") as newcomer:
            assert self.kept.missing(newcomer.store("s")) == []
        until(lambda: moves.served_once(self.cluster, self.session))
        moves.check_nothing_lent(self.cluster, "donor0")
        moves.check_quiet(self.cluster, self.session)

    def memory_of_donor0(self) -> moves.ContextOfMemory:
        return moves.memory_of(moves.of_donor(self.cluster, "donor0"))


Moment = Literal["before", "during", "after"]
Who = Literal["source agent", "source function", "target agent", "target function", "broker"]


def victim_of(scene: Scene, who: Who, target: Function) -> tuple[int, Callable[[], None]]:
    """Whom to kill, and what brings it back if nobody else does."""
    cluster = scene.cluster
    number = int(target.donor.removeprefix("donor"))
    match who:
        case "source agent":
            return cluster.donor_pid(0), partial(cluster.restart_donor, 0)
        case "source function":
            return scene.source().pid, lambda: None
        case "target agent":
            return cluster.donor_pid(number), partial(cluster.restart_donor, number)
        case "target function":
            return target.pid, lambda: None
        case "broker":
            return cluster.broker_pid, cluster.restart_broker


@pytest.mark.parametrize("who", ["source agent", "source function", "target agent", "target function", "broker"])
def test_who_dies_during_a_move_costs_nothing(pair: LocalCluster, tmp_path: Path, who: Who) -> None:
    with Scene(pair, tmp_path) as scene:
        with scene.reclaim() as asked:
            target = copying(pair, asked, "donor0", PART)
            pid, bring_back = victim_of(scene, who, target)
            kill(pid)
            if who != "broker":  # who tells clients where it is, once it has moved
                scene.crew.goes_on()
            bring_back()
        scene.nothing_is_lost()


@pytest.mark.parametrize("who", ["source agent", "source function", "broker"])
def test_who_dies_as_a_reclaim_begins_costs_nothing(pair: LocalCluster, tmp_path: Path, who: Who) -> None:
    with Scene(pair, tmp_path) as scene:
        pid, bring_back = victim_of(scene, who, scene.source())
        with scene.reclaim():
            kill(pid)
            scene.crew.goes_on()
            bring_back()
        scene.nothing_is_lost()


@pytest.mark.parametrize("who", ["source agent", "target agent", "target function", "broker"])
def test_who_dies_after_a_move_costs_nothing(pair: LocalCluster, tmp_path: Path, who: Who) -> None:
    with Scene(pair, tmp_path) as scene:
        with scene.reclaim() as asked:
            target = copying(pair, asked, "donor0", PART)
            assert asked.result().in_time
        pid, bring_back = victim_of(scene, who, target)
        kill(pid)
        if who != "broker":  # not every client has heard yet where it is
            scene.crew.goes_on()
        bring_back()
        scene.nothing_is_lost()


@pytest.mark.parametrize("delay", [0, 1, 2, 3])
def test_all_agents_and_the_broker_die_during_moves(pair: LocalCluster, tmp_path: Path, delay: int) -> None:
    """At several stages of a copy; the functions are left alone, and end what they have begun or not."""
    with Scene(pair, tmp_path) as scene:
        with scene.reclaim() as asked:
            copying(pair, asked, "donor0", 1 + delay * 30 * MIB)
            pair.kill_broker()
            for number in range(3):
                pair.kill_donor(number)
            pair.restart_broker()
            for number in range(3):
                pair.restart_donor(number)
        scene.nothing_is_lost()


def test_a_new_agent_knows_what_was_cut_out_of_a_lease() -> None:
    """Else it would believe that it still owes those bytes, and take them once more."""
    with (
        LocalCluster(donors=1, memory=160 * MIB) as cluster,
        operator(cluster.address) as session,
        memfaas.connect(cluster.address) as user,
    ):
        store = user.store("s", size="96MiB")
        kept = Ledger(store, 40, 100_000)
        reclaimed = session.reclaim("donor0", 96 * MIB, PATIENT_S, "job")
        assert {part.how for part in reclaimed.steps} == {"unlent", "punched"}

        def leased() -> int:
            (donor,) = session.status().donors
            return donor.memory.leased if donor.connected else 0

        until(lambda: leased() <= 64 * MIB)
        before = leased()
        cluster.kill_donor(0)
        cluster.restart_donor(0)
        until(lambda: leased() > 0)
        assert leased() == before
        (function,) = moves.functions_of(cluster)
        kill(function.pid)
        assert kept.missing(store) == []
        assert leased() == before
        session.lend("donor0", "job")
        until(lambda: leased() > 96 * MIB)
        assert kept.missing(store) == []


# --- somebody hangs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["source agent", "target agent", "target function", "broker"])
def test_who_hangs_during_a_move_costs_nothing(pair: LocalCluster, tmp_path: Path, who: Who) -> None:
    with Scene(pair, tmp_path) as scene:
        with scene.reclaim() as asked:
            target = copying(pair, asked, "donor0", PART)
            pid, _ = victim_of(scene, who, target)
            os.kill(pid, signal.SIGSTOP)
            try:
                if who != "target function":  # it may be that all of the shard is there, and only there
                    scene.crew.goes_on()
            finally:
                os.kill(pid, signal.SIGCONT)
        scene.nothing_is_lost()


def test_a_target_that_hangs_for_good_costs_only_what_cannot_be_saved_in_time(
    pair: LocalCluster, tmp_path: Path
) -> None:
    """At the deadline the memory goes. What was with the one that hangs is there when it goes on, or lost."""
    with operator(pair.address) as session, memfaas.connect(pair.address, timeout=LIMIT_S) as user:
        session.reclaim("donor2", EVERYTHING, PATIENT_S, "later")
        store = user.store("s", size=STORE)
        session.lend("donor2", "later")
        kept = Ledger(store, KEPT, LENGTH)
        victims = {key for key in kept.keys if store.keepers[store._shard_of(key, 0)].place.donor == "donor0"}
        with (
            moves.memory_of(moves.of_donor(pair, "donor0")) as backed,
            Asked(pair.address, "donor0", EVERYTHING, 4.0) as asked,
        ):
            target = copying(pair, asked, "donor0", PART)
            agent = pair.donor_pid(int(target.donor.removeprefix("donor")))
            for pid in (target.pid, agent):
                os.kill(pid, signal.SIGSTOP)
            try:
                reclaimed = asked.result()
                assert backed() == 0
            finally:
                for pid in (target.pid, agent):
                    os.kill(pid, signal.SIGCONT)
        until(lambda: moves.served_once(pair, session))
        missing = set(kept.missing(store))
        assert missing in (set(), victims)
        if not missing:
            assert moves.freed(reclaimed, "migrated", "lost") > 0
        else:
            assert moves.lost(reclaimed)
        moves.check_quiet(pair, session)


# --- a node dies: agent and function at once --------------------------------------------------------------


def kill_node(cluster: LocalCluster, number: int) -> None:
    functions = moves.of_donor(cluster, f"donor{number}")
    cluster.kill_donor(number)  # first: it would start the functions again
    for one in functions:
        kill(one.pid)


@pytest.mark.parametrize("whose", ["source", "target"])
@pytest.mark.parametrize("least", [PART, 100 * MIB])
def test_a_node_that_dies_during_a_move_loses_what_was_there_alone(
    pair: LocalCluster, whose: Literal["source", "target"], least: int
) -> None:
    with operator(pair.address) as session, memfaas.connect(pair.address, timeout=LIMIT_S) as user:
        session.reclaim("donor2", EVERYTHING, PATIENT_S, "later")
        store = user.store("s", size=STORE)
        session.lend("donor2", "later")
        kept = Ledger(store, KEPT, LENGTH)
        moving = {key for key in kept.keys if store.keepers[store._shard_of(key, 0)].place.donor == "donor0"}
        with Asked(pair.address, "donor0", EVERYTHING, PATIENT_S) as asked:
            target = copying(pair, asked, "donor0", least)
            number = 0 if whose == "source" else int(target.donor.removeprefix("donor"))
            elsewhere = {
                key for key in kept.keys if store.keepers[store._shard_of(key, 0)].place.donor == f"donor{number}"
            } - moving
            kill_node(pair, number)
            pair.restart_donor(number)
        until(lambda: moves.served_once(pair, session))
        missing = set(kept.missing(store))
        # The one that moves: all of it in one place, or lost. The target's own ones are lost in any case.
        assert missing - elsewhere in (set(), moving)
        assert elsewhere <= missing
        if whose == "target" and asked.reclaimed is None:
            assert not missing & moving, "the source was alive and had it"
        lost_shards = {shard for info in user.stores() for shard in info.lost_shards}
        assert lost_shards == {store._shard_of(key, 0) for key in missing}
        moves.check_quiet(pair, session)


# --- many at once -----------------------------------------------------------------------------------------


def test_donors_that_are_reclaimed_at_once_swap_what_they_can(three: LocalCluster, tmp_path: Path) -> None:
    """Each is a target of the others until it hears that it is wanted itself."""
    with (
        operator(three.address) as session,
        memfaas.connect(three.address) as owner,
        Crew(three.address, tmp_path) as crew,
    ):
        owner.store("s", size="48MiB")
        crew.join("shm")
        crew.join("tcp")
        for round_ in range(4):
            crew.goes_on()
            chosen = [f"donor{(round_ + step) % 3}" for step in range(2)]
            with (
                Asked(three.address, chosen[0], EVERYTHING, PATIENT_S) as one,
                Asked(three.address, chosen[1], EVERYTHING, PATIENT_S) as other,
            ):
                for asked in (one, other):
                    reclaimed = asked.result()
                    assert reclaimed.in_time
                    assert moves.lost(reclaimed) == []
            for donor in chosen:
                assert moves.of_donor(three, donor) == []
                session.lend(donor, "job")
        crew.goes_on()
        crew.finish()
        until(lambda: moves.served_once(three, session))
        moves.check_quiet(three, session)


def test_a_lease_that_is_released_while_it_moves_is_nowhere(pair: LocalCluster) -> None:
    with operator(pair.address) as session, memfaas.connect(pair.address) as user:
        region = user.lease("300MiB")
        origin = region.donor
        region.write(0, os.urandom(16 * MIB))
        until(lambda: moves.of_donor(pair, origin)[0].backed > 200 * MIB)
        with Asked(pair.address, origin, EVERYTHING, PATIENT_S) as asked:
            copying(pair, asked, origin, PART)
            region.release()
        until(lambda: moves.functions_of(pair) == [])
        moves.check_quiet(pair, session)
        assert session.status().leases == []
        with pytest.raises(ClosedError):
            region.read(0, 1)
