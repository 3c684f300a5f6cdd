"""What becomes of clients that came over verbs to a lease that is over, has moved, or cannot be reached."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import memfaas
from memfaas import fabric as fabrics
from memfaas._native import LinkDown
from memfaas.client import local
from memfaas.client.local import LocalCluster
from memfaas.errors import DeadlineExceeded, LeaseLost, MemfaasError, TransportError, ValueLost
from memfaas.fabric import Choice
from memfaas.testing.lease import BareRegion
from memfaas.units import KIB, MIB
from tests.e2e import test_memory_back as suite
from tests.e2e.scene import functions_of, kill, until

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]

TIMEOUT_S = 5.0
TOO_LATE_S = 3 * TIMEOUT_S
"""An operation that has not ended by then has no deadline, however slow the machine is."""
NOISE = random.Random(7).randbytes(5 * MIB)


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[LocalCluster]:
    local.START_S = 250.0  # it is emulated, with a disk that is far away
    with LocalCluster(donors=1, memory=200 * MIB, lease_ttl=6.0) as cluster:
        yield cluster


@pytest.fixture
def session(small_cluster: LocalCluster) -> Iterator[memfaas.Session]:
    with memfaas.connect(small_cluster.address, fabric="verbs", timeout=TIMEOUT_S) as session:
        yield session


@pytest.fixture(params=["verbs"])
def fabric(request: pytest.FixtureRequest) -> Choice:
    chosen: Choice = request.param
    return chosen


def ended_by(error: type[MemfaasError] | tuple[type[MemfaasError], ...], *operations: Callable[[], object]) -> None:
    """Each operation ends with this error, and not long after its deadline."""
    for operation in operations:
        started = time.monotonic()
        with pytest.raises(error):
            operation()
        assert time.monotonic() - started < TOO_LATE_S


# --- it is over -------------------------------------------------------------------------------------------

test_a_session_that_stands_still_cannot_keep_its_memory = suite.test_a_session_that_stands_still_cannot_keep_its_memory


def test_a_store_that_somebody_deletes_is_lost_at_once_and_another_one_is_used(
    small_cluster: LocalCluster, session: memfaas.Session
) -> None:
    store = session.store("s", size=16 * MIB)
    store.put("small", b"value")
    store.put("large", NOISE[: 2 * MIB])
    with memfaas.connect(small_cluster.address) as other:
        other.delete_store("s")
    ended_by(
        ValueLost,
        lambda: store.get("small"),
        lambda: store.get("large"),
        lambda: store.get_many(["small", "large"]),
        lambda: store.put("small", b"new"),
        lambda: store.delete("small"),
    )
    store.close()
    again = session.store("s", size=16 * MIB)
    assert "small" not in again
    again.put("small", b"again")
    assert again.get("small") == b"again"
    assert {shard.fabric for shard in again.info().shards} == {"verbs"}
    again.close()


def test_a_region_that_is_released_is_reached_by_no_link_that_is_left(session: memfaas.Session) -> None:
    region = session.lease(4 * MIB)
    region.write(0, NOISE[:MIB])
    place = region.keeper.place
    opened = fabrics.open_link(place, "verbs", time.monotonic() + TIMEOUT_S, TIMEOUT_S)
    left = BareRegion(place.size)
    left._set_link(opened.link)
    assert left.read(0, MIB) == NOISE[:MIB]
    region.release()
    ended_by(MemfaasError, lambda: region.read(0, 1))
    until(lambda: session.status().leases == [])
    started = time.monotonic()
    with pytest.raises(LinkDown):
        left.read(0, MIB)
    with pytest.raises((LinkDown, TransportError)):
        left.fetch_add(0, 1)
    with pytest.raises((TransportError, LeaseLost)):
        fabrics.open_link(place, "verbs", time.monotonic() + TIMEOUT_S, TIMEOUT_S)
    assert time.monotonic() - started < TOO_LATE_S


# --- its node cannot be reached, or does not answer ---------------------------------------------------------


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_put_waits_for_a_function_that_stands_still_and_takes_effect_once(small_cluster: LocalCluster) -> None:
    with (
        memfaas.connect(small_cluster.address, fabric="verbs", timeout=60) as session,
        memfaas.connect(small_cluster.address, fabric="verbs", timeout=60) as other,
    ):
        store = session.store("s", size=16 * MIB)
        same = other.store("s")  # with a connection of its own, as a put holds its one until it has ended
        same.put("k", b"before")
        assert store.get("k") == b"before"
        ended: list[str] = []

        def put() -> None:
            same.put("k", b"after")
            ended.append("put")

        thread = threading.Thread(target=put)
        with stopped([*functions_of(small_cluster).values()]):
            thread.start()
            for _ in range(20):
                assert store.get("k") == b"before"
                time.sleep(0.05)
            assert ended == []
        thread.join()
        assert ended == ["put"]
        assert store.get("k") == b"after"
        store.put("k", b"last")  # and no second effect of the one before comes later
        time.sleep(0.5)
        assert store.get("k") == b"last"
        store.close()


class Readers:
    """Threads that get values all the time; each get ends in time, with the right value or with an error.

    To make one puts the values.
    """

    def __init__(self, store: memfaas.Store) -> None:
        self.values = {"page": NOISE[: 4 * KIB], "large": NOISE}
        self.longest_s = 0.0
        self.good = dict.fromkeys(self.values, 0)
        self.errors: list[MemfaasError] = []
        self.wrong: list[BaseException] = []
        self._store = store
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(key,)) for key in self.values]
        for key, value in self.values.items():
            store.put(key, value)

    def _run(self, key: str) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                assert self._store.get(key) == self.values[key]
                self.good[key] += 1
            except (TransportError, DeadlineExceeded) as error:
                self.errors.append(error)
            except BaseException as error:
                self.wrong.append(error)
                return
            self.longest_s = max(self.longest_s, time.monotonic() - started)

    def go_on(self) -> None:
        before = dict(self.good)
        until(lambda: self.wrong or all(self.good[key] > before[key] + 2 for key in self.values))
        assert self.wrong == []

    def recover(self) -> bool:
        self.errors.clear()
        self.go_on()
        return self.errors == []

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_link_that_goes_down_amid_reads_is_an_error_in_time_and_works_when_it_is_up_again(
    session: memfaas.Session,
) -> None:
    store = session.store("s", size=32 * MIB)
    with Readers(store) as readers:
        for _ in range(2):
            readers.go_on()
            assert readers.errors == []
            subprocess.run(["ip", "link", "set", "rdma0", "down"], check=True)
            try:
                until(lambda: readers.errors)
            finally:
                subprocess.run(["ip", "link", "set", "rdma0", "up"], check=True)
            until(readers.recover)
    assert readers.wrong == []
    assert readers.longest_s < TOO_LATE_S
    assert {shard.fabric for shard in store.info().shards} == {"verbs"}
    store.close()


def is_lost(store: memfaas.Store) -> bool:
    """Whether that is said; before, its donor cannot be reached."""
    try:
        store.get("k")
    except LeaseLost:
        return True
    except TransportError:
        return False
    raise AssertionError("there is no memory any more that the value could have come from")


def test_a_donor_that_dies_is_an_error_in_time_and_then_a_loss_that_is_said(
    small_cluster: LocalCluster, session: memfaas.Session
) -> None:
    store, region = session.store("s", size=16 * MIB), session.lease(4 * MIB)
    store.put("k", NOISE[:MIB])
    region.write(0, NOISE[:MIB])
    pids = [*functions_of(small_cluster).values()]
    small_cluster.kill_donor(0)
    for pid in pids:
        kill(pid)
    ended_by(
        (TransportError, DeadlineExceeded),
        lambda: store.get("k"),
        lambda: store.put("k", NOISE[:MIB]),
        lambda: region.read(0, MIB),
        lambda: region.fetch_add(0, 1),
    )
    small_cluster.restart_donor(0)
    until(lambda: is_lost(store))
    ended_by(LeaseLost, lambda: store.get("k"), lambda: store.put("k", b"v"), lambda: region.read(0, 1))
    store.close()
    with memfaas.connect(small_cluster.address, fabric="verbs") as patient:
        fresh = patient.store("s", size=16 * MIB)
        fresh.put("k", b"fresh")
        assert fresh.get("k") == b"fresh"
