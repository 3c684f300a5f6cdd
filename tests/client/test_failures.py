"""Bad days: brokers, agents, memory functions and clients that are killed, and what their users see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import memfaas
from memfaas import fabric
from memfaas.client.local import LocalCluster, _processes_with
from memfaas.client.session import Session
from memfaas.errors import BrokerUnavailable, LeaseLost, MemfaasError, TransportError, UnknownStore
from memfaas.units import MIB

pytestmark = pytest.mark.slow


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def functions_of(cluster: LocalCluster) -> set[int]:
    """Processes of all memory functions, idle ones too: what a zygote has forked."""

    def is_zygote(pid: int) -> bool:
        try:
            return b"memfaas.server.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def parent(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 0

    agents = {process.pid for process in cluster._processes.values()}
    found = _processes_with(f"MEMFAAS_LOCAL_CLUSTER={cluster._token}")
    return {pid for pid in found if is_zygote(pid) and parent(pid) not in agents}


def kill_functions(cluster: LocalCluster) -> None:
    for pid in functions_of(cluster):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # an idle one, that ended with its agent
            pass


@pytest.fixture
def own_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(donors=2, memory=128 * MIB) as cluster:
        yield cluster


class Traffic:
    """Threads that put and get all the time, and note what goes wrong."""

    def __init__(self, store: memfaas.Store, threads: int = 2) -> None:
        self._store = store
        self._done = threading.Event()
        self.errors: list[BaseException] = []
        self.rounds = 0
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def _run(self, number: int) -> None:
        step = 0
        try:
            while not self._done.is_set():
                key, value = f"traffic/{number}/{step % 10}", b"%d" % step * 50
                self._store.put(key, value)
                assert self._store.get(key) == value
                step += 1
                self.rounds += 1
                time.sleep(0.001)
        except BaseException as error:
            self.errors.append(error)

    def goes_on(self) -> None:
        """Waits for some more rounds."""
        before = self.rounds
        until(lambda: self.errors or self.rounds > before + 20)
        assert self.errors == []

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def fill(session: Session) -> dict[bytes, bytes]:
    store = session.store("s", size="64MiB")
    content = {b"%d" % n: os.urandom(1000 + n) for n in range(100)} | {b"large": os.urandom(20 * MIB)}
    for key, value in content.items():
        store.put(key, value)
    return content


def check(store: memfaas.Store, content: dict[bytes, bytes]) -> None:
    assert all(store.get(key) == value for key, value in content.items())


def test_who_reads_and_writes_does_not_notice_that_the_broker_is_away(
    own_cluster: LocalCluster, choice: fabric.Choice
) -> None:
    with memfaas.connect(own_cluster.address, fabric=choice, timeout=60) as session:
        content = fill(session)
        store = session.store("s")
        region = session.lease("1MiB")
        region.write(0, b"abc")
        with Traffic(store) as traffic:
            traffic.goes_on()
            own_cluster.kill_broker()
            traffic.goes_on()
            waiting: list[Any] = []
            waiter = threading.Thread(target=lambda: waiting.append(session.store("new", size="8MiB")))
            waiter.start()
            traffic.goes_on()
            assert waiting == []
            own_cluster.restart_broker()
            waiter.join()
            waiting[0].put("a", b"1")
            traffic.goes_on()
        check(store, content)
        assert region.read(0, 3) == b"abc"
        assert session.store("s") is store
        with memfaas.connect(own_cluster.address) as second:
            check(second.store("s"), content)
            assert {one.spec.name for one in second.stores()} == {"s", "new"}
        assert {shard.trouble for shard in store.info().shards} == {None}


def test_what_needs_a_broker_that_stays_away_fails_in_time(own_cluster: LocalCluster) -> None:
    with memfaas.connect(own_cluster.address, timeout=3) as session:
        store = session.store("s", size="8MiB")
        store.put("a", b"1")
        own_cluster.kill_broker()
        until(lambda: session._loop is not None and session._loop.control._channel is None)
        with pytest.raises(BrokerUnavailable):
            session.store("other", size="8MiB")
        assert store.get("a") == b"1"
        with pytest.raises(BrokerUnavailable):
            memfaas.connect(own_cluster.address)


def test_a_persistent_store_survives_the_broker(own_cluster: LocalCluster) -> None:
    with memfaas.connect(own_cluster.address) as session:
        session.store("kept", size="8MiB", persistent=True).put("a", b"1")
    own_cluster.kill_broker()
    own_cluster.restart_broker()
    with memfaas.connect(own_cluster.address) as session:
        assert session.store("kept").get("a") == b"1"
        session.delete_store("kept")
        with pytest.raises(UnknownStore):
            session.store("kept")


def test_memory_functions_that_are_killed_come_back_with_everything(
    own_cluster: LocalCluster, choice: fabric.Choice
) -> None:
    with memfaas.connect(own_cluster.address, fabric=choice) as session:
        content = fill(session)
        store = session.store("s")
        region = session.lease("1MiB")
        region.write(0, b"abc")
        with Traffic(store) as traffic:
            for _ in range(3):
                traffic.goes_on()
                kill_functions(own_cluster)
                traffic.goes_on()
        check(store, content)
        assert region.read(0, 3) == b"abc"
        assert region.fetch_add(8, 1) == 0
        with memfaas.connect(own_cluster.address, fabric="tcp") as second:
            check(second.store("s"), content)


def test_an_agent_that_is_killed_finds_its_functions_again(own_cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(own_cluster.address, fabric=choice) as session:
        content = fill(session)
        store = session.store("s")
        with Traffic(store) as traffic:
            for index in range(2):
                own_cluster.kill_donor(index)
                traffic.goes_on()
                own_cluster.restart_donor(index)
                traffic.goes_on()
        check(store, content)
        assert {shard.trouble for shard in store.info().shards} == {None}
        session.store("new", size="16MiB").put("a", b"1")
        kill_functions(own_cluster)  # the new agents look after them
        check(store, content)


def test_broker_and_agent_killed_together(own_cluster: LocalCluster) -> None:
    with memfaas.connect(own_cluster.address, fabric="tcp") as session:
        content = fill(session)
        store = session.store("s")
        own_cluster.kill_broker()
        own_cluster.kill_donor(0)
        own_cluster.restart_broker()
        own_cluster.restart_donor(0)
        check(store, content)
        assert {shard.trouble for shard in store.info().shards} == {None}


def test_a_donor_that_is_stopped_takes_its_memory_back(own_cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(own_cluster.address, fabric=choice, timeout=3) as session:
        store = session.store("s", size="64MiB")
        shard_of = {b"%d" % n: store._shard_of(b"%d" % n, 0) for n in range(50)}
        donor_of = [keeper.place.donor for keeper in store.keepers]
        assert set(donor_of) == {"donor0", "donor1"}
        store.put_many(dict.fromkeys(shard_of, b"x"))
        own_cluster._processes["donor0"].stop(30)
        for key, shard in shard_of.items():
            if donor_of[shard] == "donor0":
                with pytest.raises(LeaseLost, match=f"shard {shard} of store 's'"):
                    store.get(key)
                with pytest.raises(LeaseLost):
                    store.put(key, b"y")
            else:
                assert store.get(key) == b"x"
        assert [shard.trouble is None for shard in store.info().shards] == [name == "donor1" for name in donor_of]
        (info,) = session.stores()
        assert info.lost_shards == [shard for shard, name in enumerate(donor_of) if name == "donor0"]


def test_a_node_that_dies_is_an_error_in_time(own_cluster: LocalCluster) -> None:
    with memfaas.connect(own_cluster.address, fabric="tcp", timeout=1) as session:
        store = session.store("s", size="64MiB")
        store.put_many({b"%d" % n: b"x" for n in range(50)})
        own_cluster.kill_donor(0)
        own_cluster.kill_donor(1)
        kill_functions(own_cluster)
        with pytest.raises((TransportError, LeaseLost)):
            store.get("1")


KILLED_CLIENT = """
import memfaas, os, sys
with memfaas.connect(sys.argv[1], fabric=sys.argv[2]) as session:
    store = session.store("s")
    number, step = int(sys.argv[3]), 0
    sizes = (10, 3000, 70_000, 600_000)
    while True:
        key, value = f"{number}/{step % 8}", b"%08d" % step * (sizes[step % 4] // 8)
        store.put(key, value)
        os.write(1, b"%d\\n" % step)  # acknowledged
        step += 1
"""


def test_clients_killed_in_the_middle_lose_no_acknowledged_value(
    own_cluster: LocalCluster, choice: fabric.Choice
) -> None:
    sizes = (10, 3000, 70_000, 600_000)
    with memfaas.connect(own_cluster.address, fabric=choice) as session:
        store = session.store("s", size="64MiB")
        with Traffic(store) as traffic:
            for _ in range(3):
                clients = [
                    subprocess.Popen(
                        [sys.executable, "-c", KILLED_CLIENT, own_cluster.address, choice, str(number)],
                        stdout=subprocess.PIPE,
                    )
                    for number in range(3)
                ]
                for client in clients:
                    assert client.stdout is not None
                    for _ in range(20):
                        assert client.stdout.readline()
                for client in clients:
                    client.kill()
                for number, client in enumerate(clients):
                    assert client.stdout is not None
                    acknowledged = 19 + len(client.stdout.read().splitlines())
                    client.stdout.close()
                    client.wait()
                    for step in range(acknowledged - 6, acknowledged + 1):
                        found = store.get(f"{number}/{step % 8}")
                        # The one after the last may have taken effect without having been acknowledged.
                        later = step + 8
                        expected = [b"%08d" % n * (sizes[n % 4] // 8) for n in (step, later)]
                        assert found in (expected if later == acknowledged + 1 else expected[:1])
                traffic.goes_on()
        # No place in the memory stays taken by the dead.
        for number in range(3):
            for slot in range(8):
                store.delete(f"{number}/{slot}")
        for key in store.keys("traffic/"):
            store.delete(key)
        until(lambda: _can_fill(store))


def _can_fill(store: memfaas.Store) -> bool:
    try:
        for number in range(5):
            store.put(f"fill/{number}", bytes(8 * MIB))
    except memfaas.StoreFull:
        return False
    finally:
        for number in range(5):
            store.delete(f"fill/{number}")
    return True


def test_a_cluster_that_is_gone_is_an_error_in_time(own_cluster: LocalCluster) -> None:
    with memfaas.connect(own_cluster.address, timeout=2) as session:
        store = session.store("s", size="16MiB")
        store.put("a", b"1")
        own_cluster.stop()
        calls: list[Callable[[], Any]] = [lambda: store.put("a", b"2"), lambda: store.get("a"), session.status]
        for call in calls:
            with pytest.raises(MemfaasError):
                call()
