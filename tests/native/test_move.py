"""A lease moves to other memory while it is used: nothing that was acknowledged is missing there.

Clients on both fabrics follow it. What they did is written down, and the whole history of each key,
over all the memories that it was in, must be linearizable.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from memfaas._native import FROZEN, REVOKED, LinkDown, RegionCore, ShmLink, TcpLink
from memfaas.errors import KeyAbsent
from memfaas.testing import fsck
from memfaas.testing.client import VALUES, WEIGHTS
from memfaas.testing.lease import Arrival, BareLease, BareStore, Kind, fill_and_empty, move, tcp_pair
from memfaas.testing.linearizability import Operation, check
from memfaas.testing.stage import KEYS, LIMIT_S, SIZE, Stage, final_reads
from memfaas.testing.values import key_of

SHARD = 24 << 20
REGION = (3 << 20) + 4321  # no whole number of pages, nor of what is copied as one
BUSY_KEYS = 8


class Residence:
    """Where the lease is now."""

    def __init__(self, kind: Kind, size: int) -> None:
        self.kind = kind
        self.size = size
        self.lease = BareLease(kind, size)
        self._all = [self.lease]
        self._wires: list[socket.socket] = []

    def move(self, *, rounds: int = 3, between: Callable[[], object] = lambda: None) -> None:
        """And the memory is taken away from where it was."""
        old = self.lease
        arrival = Arrival(self.kind, self.size)
        self._all.append(arrival.lease)
        self.lease = move(old.memory, arrival, rounds=rounds, between=between)
        old.memory.revoke()
        os.ftruncate(old.data_fd, 0)

    def follow(self, core: BareStore | RegionCore, reason: int) -> TcpLink | ShmLink:
        """The link for an operation that could not be done for this reason."""
        link = core._get_link(0) if isinstance(core, BareStore) else core._get_link()
        if reason == FROZEN:
            assert isinstance(link, ShmLink | TcpLink)
            return link
        if isinstance(link, ShmLink):
            assert reason == REVOKED
            return self.lease.shm_link()
        return self.tcp_link()

    def tcp_link(self) -> TcpLink:
        link = TcpLink(self.lease.timeout_s)
        wire = self.lease.connect()
        self._wires.append(wire.dup())
        link.add(wire.detach())
        return link

    def break_connections(self) -> None:
        """All that are open, wherever they are in their work."""
        for wire in self._wires:
            with suppress(OSError):  # some have ended
                wire.shutdown(socket.SHUT_RDWR)

    def store(self, fabric: str) -> BareStore:
        def repair(store: BareStore, reason: int) -> None:
            store._set_link(0, self.follow(store, reason))

        store = BareStore(self.lease.memory.part_size, repair)
        store._set_link(0, self.lease.shm_link() if fabric == "shm" else self.tcp_link())
        return store

    def close(self) -> None:
        for wire in self._wires:
            wire.close()
        for lease in self._all:
            lease.close()


@contextmanager
def residence(kind: Kind, size: int) -> Iterator[Residence]:
    home = Residence(kind, size)
    try:
        yield home
    finally:
        home.close()


class Busy:
    """A thread that uses a store until it is told to stop."""

    def __init__(self, store: BareStore, number: int, stop: threading.Event) -> None:
        self._store = store
        self._choose = random.Random(number)
        self._numbers = itertools.count((number + 1) << 32, 8)
        self._stop = stop
        self.done: dict[int, list[Operation]] = defaultdict(list)
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                key = self._choose.randrange(BUSY_KEYS)
                self.done[key].append(self._one(key_of(key), self._choose.random()))
        except BaseException as error:
            self.failed = error

    def _one(self, key: bytes, choice: float) -> Operation:
        start = time.monotonic_ns()
        if choice < 0.4:
            try:
                value = VALUES.number_of(self._store.get(key))
            except KeyAbsent:
                value = 0
            return Operation("get", start, time.monotonic_ns(), value)
        if choice < 0.85:
            number = next(self._numbers) + self._choose.choices(range(8), WEIGHTS)[0]
            self._store.put(key, VALUES.value_of(number))
            return Operation("put", start, time.monotonic_ns(), number)
        existed = self._store.delete(key)
        return Operation("delete", start, time.monotonic_ns(), existed=existed)

    def join(self) -> None:
        self._thread.join()
        if self.failed is not None:
            raise self.failed


def assert_linearizable(by_key: dict[int, list[Operation]]) -> None:
    for key, operations in by_key.items():
        violation = check(operations)
        assert violation is None, f"key {key}: {violation}"


def assert_whole_and_empties(lease: BareLease, store: BareStore) -> None:
    lease.hang_up()
    assert fsck.faults(lease.data_fd, lease.control_fd) == {}
    for key in store.scan(0):
        store.delete(key)
    assert lease.memory.stats()["used"] == 0
    fill_and_empty(store)
    assert lease.memory.stats()["used"] == 0
    assert fsck.faults(lease.data_fd, lease.control_fd) == {}


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [False, True])
def test_a_busy_shard_moves_with_all_that_was_acknowledged(breaks: bool) -> None:
    with residence("shard", SHARD) as home:
        stop = threading.Event()
        users = [Busy(home.store(fabric), i, stop) for i, fabric in enumerate(("shm", "tcp", "shm", "tcp"))]
        for _ in range(6):
            time.sleep(0.1)
            home.move(rounds=4, between=home.break_connections if breaks else lambda: None)
        stop.set()
        for user in users:
            user.join()
        reader = home.store("shm")
        by_key: dict[int, list[Operation]] = defaultdict(list)
        for user in users:
            for key, operations in user.done.items():
                by_key[key] += operations
        assert sum(map(len, by_key.values())) > 100
        for key, read in final_reads(reader):
            by_key[key].append(read)
        assert_linearizable(by_key)
        assert_whole_and_empties(home.lease, reader)


def test_versions_go_on_where_they_were() -> None:
    # A block's version stands 56 bytes before its key; the newest put of a key must have the highest.
    with residence("shard", SHARD) as home:
        store = home.store("shm")
        versions = []
        for turn in range(4):
            for i in range(turn + 1):
                store.put(b"the key whose versions are looked at", b"%d" % i)
            data = os.pread(home.lease.data_fd, os.fstat(home.lease.data_fd).st_size, 0)
            found = [
                struct.unpack_from("<Q", data, at - 56)[0]
                for at in _all_places(data, b"the key whose versions are looked at")
            ]
            versions.append(max(found))
            home.move()
        assert versions == sorted(set(versions))
        assert versions[-1] == 10


def _all_places(data: bytes, what: bytes) -> Iterator[int]:
    at = data.find(what)
    while at >= 0:
        yield at
        at = data.find(what, at + 1)


# --- what connections did ---------------------------------------------------------------------------

_REQUEST = struct.Struct("<BBBBIIIQQQQ")
_REPLY = struct.Struct("<BBHIQQQ")
_PUT, _DELETE, _WRITE, _RESUME = 2, 3, 7, 10


def did_it(sock: socket.socket, writer: int, number: int) -> bool:
    """What the function says to a client that asks what became of a change."""
    sock.sendall(_REQUEST.pack(_RESUME, 0, 0, 0, 0, 0, 0, 0, writer, number, 0))
    status, *_, answer, _ = _REPLY.unpack(sock.recv(_REPLY.size, socket.MSG_WAITALL))
    assert status == 0
    return bool(answer)


class Cable:
    """A client's connection to a function, which breaks behind the request, or before it."""

    def __init__(self, lease: BareLease, *, lose: str) -> None:
        self.client, near = tcp_pair()
        far = lease.connect()
        self._thread = threading.Thread(target=self._run, args=(near, far, lose))
        self._thread.start()
        self.request = b""

    def _run(self, near: socket.socket, far: socket.socket, lose: str) -> None:
        with near, far:
            self.request = near.recv(1 << 16)
            if lose == "reply":
                far.sendall(self.request)
                assert far.recv(1 << 16)

    def join(self) -> None:
        self._thread.join()

    def writer(self) -> tuple[int, int]:
        fields = _REQUEST.unpack_from(self.request)
        return fields[8], fields[9]


@pytest.mark.parametrize("lose", ["request", "reply"])
@pytest.mark.parametrize("what", ["put", "delete"])
def test_a_change_whose_reply_was_lost_is_made_once(what: str, lose: str) -> None:
    with residence("shard", SHARD) as home:
        others = home.store("shm")
        others.put(b"key", b"before")
        cable = Cable(home.lease, lose=lose)
        link = TcpLink(LIMIT_S)
        link.add(cable.client.detach())

        def repair(store: BareStore, reason: int) -> None:
            cable.join()
            if home.lease is first:
                home.move()
                others.put(b"key", b"somebody else's")
            link.add(home.lease.connect().detach())

        first = home.lease
        store = BareStore(home.lease.memory.part_size, repair)
        store._set_link(0, link)
        if what == "put":
            store.put(b"key", b"ours")
        else:
            assert store.delete(b"key")
        assert home.lease is not first
        then = {"put": b"ours", "delete": None}[what] if lose == "request" else b"somebody else's"
        assert others.get_many([b"key"]) == [then]


def test_the_connections_that_were_used_last_are_known_longest() -> None:
    """However long ago they were opened."""
    records = 4096
    early = 10 * records
    others = itertools.count(1)

    def ask_about_others(sock: socket.socket, count: int) -> None:
        for writer in itertools.islice(others, count):
            assert not did_it(sock, writer, 1)

    with residence("shard", 4 << 20) as home, home.lease.connect() as asking:
        store = home.store("shm")
        with home.lease.connect() as sock:
            store.put(b"key", b"value")
            delete_as(sock, early, 1)
            ask_about_others(asking, records - 1)
            store.put(b"key", b"value")
            delete_as(sock, early, 2)
        while home.lease.server.connections() > 1:
            time.sleep(0.001)
        for _ in range(3):
            ask_about_others(asking, records - 10)
            assert did_it(asking, early, 2)  # that is a use, too
        home.move()
        with home.lease.connect() as asking_there:
            ask_about_others(asking_there, records - 10)
            assert did_it(asking_there, early, 2)


def delete_as(sock: socket.socket, writer: int, number: int) -> None:
    sock.sendall(_REQUEST.pack(_DELETE, 0, 0, 0, 3, 0, 0, 0, writer, number, 0) + b"key")
    status, *_ = _REPLY.unpack(sock.recv(_REPLY.size, socket.MSG_WAITALL))
    assert status == 0


def test_the_newest_connections_are_known_longest() -> None:
    records = 4096
    with residence("shard", 4 << 20) as home, home.lease.connect() as asking:
        for writer in range(1, records + 50):  # asked about, and so remembered: the table is full
            assert not did_it(asking, writer, 1)
        cable = Cable(home.lease, lose="reply")
        link = TcpLink(LIMIT_S)
        link.add(cable.client.detach())
        store = BareStore(home.lease.memory.part_size)
        store._set_link(0, link)
        with pytest.raises(LinkDown):
            store.put(b"key", b"value")
        cable.join()
        home.move()
        with home.lease.connect() as asking_there:
            for writer in range(2 * records, 2 * records + 200):
                assert not did_it(asking_there, writer, 1)
            assert did_it(asking_there, *cable.writer())


# --- what the dead left --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["served", "gone"])
def test_frozen_memory_is_put_right_when_it_is_served_again_or_gone(end: str) -> None:
    with residence("shard", SHARD) as home, home.lease.connect() as slow:
        memory, spans = home.lease.memory, home.lease.memory.stats()["free_spans"]
        slow.sendall(_REQUEST.pack(_PUT, 0, 0, 0, 3, 0, 0, 1 << 20, 77, 1, 0) + b"key" + b"some of the value")
        while memory.stats()["free_spans"] == spans:
            time.sleep(0.001)
        arrival = Arrival("shard", SHARD)
        memory.copy_all()
        assert memory.freeze()
        assert memory.drain(LIMIT_S)
        memory.copy_rest(arrival.fileno(), LIMIT_S)  # with what is held there, and never linked here
        arrival.wait()
        there = arrival.lease.memory
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(there.put_right(LIMIT_S)))
        thread.start()
        thread.join(0.1)
        assert done == []
        if end == "served":
            assert there.thaw()
        else:
            there.revoke()
        thread.join()
        assert done == [True]
        if end == "served":
            assert there.stats()["free_spans"] == spans
        arrival.lease.close()


# --- regions ------------------------------------------------------------------------------------------


class FollowingRegion(RegionCore):
    def __init__(self, home: Residence, fabric: str) -> None:
        super().__init__(home.lease.memory.size)
        self._home = home
        self._set_link(home.lease.shm_link() if fabric == "shm" else home.lease.tcp_link())

    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        self._set_link(self._home.follow(self, reason))


class Unbroken(FollowingRegion):
    """Whose connection must never break."""

    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        assert reason == FROZEN
        super()._repair(shard, reason, attempt)


def test_a_slow_client_costs_no_other_its_connection() -> None:
    """Whoever waits for the answer to an atomic could not know whether it happened."""
    with residence("region", REGION) as home, home.lease.connect() as slow:
        memory = home.lease.memory
        at_work, idle = Unbroken(home, "tcp"), Unbroken(home, "tcp")
        assert at_work.fetch_add(0, 1) == 0
        slow.sendall(_REQUEST.pack(_WRITE, 0, 0, 0, 0, 0, 0, 1000, 8, 0, 0) + b"not all of it")
        while memory.drain(0.0):
            time.sleep(0.001)
        assert memory.freeze()
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(at_work.fetch_add(0, 1)))
        thread.start()
        assert not memory.drain(0.05)
        home.lease.server.cut()
        assert memory.drain(LIMIT_S)
        assert memory.thaw()
        thread.join()
        assert seen == [1]
        assert idle.fetch_add(0, 0) == 2


COUNTERS = [0, 8, (256 << 10) - 4096 - 8, (256 << 10) - 4096, REGION // 8 * 8 - 8]
"""Also beside the borders of what is copied as one."""


def count(region: FollowingRegion, number: int, stop: threading.Event, counted: list[int]) -> None:
    choose = random.Random(number)
    own = (512 << 10) + 600_001 * number
    turn = 0
    while not stop.is_set():
        i = choose.randrange(len(COUNTERS))
        if choose.random() < 0.5:
            region.fetch_add(COUNTERS[i], 1)
        else:
            seen = region.fetch_add(COUNTERS[i], 0)
            while (before := region.compare_swap(COUNTERS[i], seen, seen + 1)) != seen:
                seen = before
        counted[i] += 1
        if choose.random() < 0.2:
            turn += 1
            block = turn.to_bytes(8, "little") * choose.choice((1, 100, 40_000))
            region.write(own, block)
            assert region.read(own, len(block)) == block


@pytest.mark.slow
def test_a_busy_region_moves_with_exact_counters() -> None:
    with residence("region", REGION) as home:
        stop = threading.Event()
        counts = [[0] * len(COUNTERS) for _ in range(4)]
        failed: list[BaseException] = []

        def run(region: FollowingRegion, number: int) -> None:
            try:
                count(region, number, stop, counts[number])
            except BaseException as error:
                failed.append(error)

        regions = [FollowingRegion(home, fabric) for fabric in ("shm", "tcp", "shm", "tcp")]
        threads = [threading.Thread(target=run, args=(region, i)) for i, region in enumerate(regions)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            time.sleep(0.05)
            home.move()
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == []
        reader = FollowingRegion(home, "shm")
        assert [reader.fetch_add(at, 0) for at in COUNTERS] == [sum(all_) for all_ in zip(*counts, strict=True)]
        home.lease.hang_up()
        assert fsck.held(home.lease.control_fd, "region", REGION) == {}


# --- clients that die, or stop, while their lease is copied -------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(tmp_path, random.Random(str(request.node.name)))
    yield stage
    stage.close()


def kill_clients(stage: Stage, stop: threading.Event) -> None:
    while not stop.is_set():
        time.sleep(stage.choose.uniform(0.0, 0.05))
        if at_work := stage.at_work():
            stage.kill([stage.choose.choice(at_work)])
        while len(stage.running()) < 3:
            stage.start_client(operations=1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_clients_are_killed_while_their_shard_is_copied(stage: Stage, number: int) -> None:
    stage.start_function()
    arrival = Arrival("shard", SIZE, timeout_s=2 * LIMIT_S)
    stop = threading.Event()
    killer = threading.Thread(target=kill_clients, args=(stage, stop))
    killer.start()
    started = time.monotonic()
    stage.memory.copy_all()
    while (lasted := time.monotonic() - started) < 3.0 or (lasted < LIMIT_S and stage.memory.operations() < 2000):
        stage.memory.copy_written(arrival.fileno(), LIMIT_S)
        time.sleep(stage.choose.uniform(0.0, 0.02))
    stage.memory.freeze()  # some are killed, and reaped, while it drains
    drained = stage.memory.drain(LIMIT_S)
    stop.set()
    killer.join()
    assert drained
    stage.memory.copy_rest(arrival.fileno(), LIMIT_S)
    with arrival.lease as lease:
        arrival.wait()
        deaths = sum(life.killed for life in stage.lives)
        stage.kill(stage.running())  # nothing that they wait for can take effect any more
        lease.memory.thaw()
        assert lease.memory.put_right(LIMIT_S)
        stage.memory.revoke()
        stage.end_function()
        by_key = stage.operations()
        store = lease.store(lease.shm_link())
        for key, read in final_reads(store):
            by_key[key].append(read)
        assert deaths > 3
        assert sum(map(len, by_key.values())) > 500
        assert set(by_key) == set(range(KEYS))
        assert_linearizable(by_key)
        assert_whole_and_empties(lease, store)


def stop_inside_of_an_operation(stage: Stage) -> int:
    """The process of a client that is stopped there."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for life in stage.at_work():
            life.process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)  # until all of its threads have stopped
            if fsck.held(stage.control, "shard", SIZE).get("pins"):
                return life.process.pid
            life.process.send_signal(signal.SIGCONT)
            time.sleep(stage.choose.uniform(0.0, 0.005))
    raise AssertionError("no client was ever stopped inside of an operation")


@pytest.mark.slow
def test_a_stopped_client_keeps_the_shard_where_it_is(stage: Stage) -> None:
    stage.start_function()
    stage.start_client(operations=1_000_000)
    stopped = stop_inside_of_an_operation(stage)
    stage.memory.freeze()
    assert not stage.memory.drain(0.2)
    assert stage.memory.thaw()
    assert stage.memory.state == "serving"
    with another_client(stage) as store:
        store.put(b"from another client", b"goes on")
        assert store.get(b"from another client") == b"goes on"
    before = stage.memory.operations()
    os.kill(stopped, signal.SIGCONT)
    while stage.memory.operations() < before + 100:  # the stopped one as well
        time.sleep(0.01)
    stage.memory.freeze()
    assert stage.memory.drain(LIMIT_S)
    stage.memory.thaw()


@contextmanager
def another_client(stage: Stage) -> Iterator[BareStore]:
    participant = stage.memory.attach(os.getpid(), 1)
    store = BareStore(stage.memory.part_size)
    store._set_link(0, ShmLink(stage.data, stage.control, participant, LIMIT_S))
    yield store
    stage.memory.reap(participant)


# --- copies that break off -----------------------------------------------------------------------------------


def test_a_copy_that_broke_off_does_not_count() -> None:
    with residence("shard", SHARD) as home:
        store = home.store("shm")
        values = {b"key-%d" % i: random.Random(i).randbytes(1000 * i) for i in range(100)}
        store.put_many(values)
        memory = home.lease.memory
        arrival = Arrival("shard", SHARD)
        with arrival.lease:
            memory.copy_all()
            first = memory.copy_written(arrival.fileno(), LIMIT_S)
            assert first > sum(map(len, values.values()))
            assert memory.copy_written(arrival.fileno(), LIMIT_S) == 0
            arrival.break_off()
        near, far = tcp_pair()
        with near:
            far.close()
            memory.copy_all()
            with pytest.raises(ConnectionError):  # reset, or a pipe that is broken
                memory.copy_written(near.fileno(), LIMIT_S)
        assert memory.state == "serving"
        assert store.get_many(list(values)) == list(values.values())
        home.move(rounds=1)
        assert home.store("tcp").get_many(list(values)) == list(values.values())


def test_time_is_up_for_a_receiver_that_takes_a_little_at_a_time() -> None:
    with BareLease("shard", SHARD) as lease:
        lease.store(lease.shm_link()).put_many({b"%d" % i: bytes(1 << 20) for i in range(16)})
        near, far = tcp_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        taken = 0

        def sip() -> None:
            nonlocal taken
            while part := far.recv(100_000):
                taken += len(part)
                time.sleep(0.05)

        thread = threading.Thread(target=sip)
        thread.start()
        lease.memory.copy_all()
        with near, far:
            with pytest.raises(TimeoutError):
                lease.memory.copy_written(near.fileno(), 0.4)
            near.shutdown(socket.SHUT_WR)
            thread.join()
    assert taken < 3 << 20  # not even the first piece


def test_a_receiver_that_takes_nothing_is_given_up_long_before_time_is_up() -> None:
    hour_s = 3600.0
    with BareLease("shard", SHARD) as lease:
        lease.store(lease.shm_link()).put_many({b"%d" % i: bytes(1 << 20) for i in range(16)})
        near, far = tcp_pair()
        with near, far:
            lease.memory.copy_all()
            with pytest.raises(TimeoutError):
                lease.memory.copy_written(near.fileno(), hour_s, 0.2)


def test_a_receiver_that_takes_a_little_at_a_time_is_not_given_up() -> None:
    with BareLease("shard", SHARD) as lease:
        lease.store(lease.shm_link()).put_many({b"%d" % i: bytes(1 << 20) for i in range(16)})
        near, far = tcp_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)

        def sip() -> None:
            while far.recv(256 << 10):
                time.sleep(0.02)  # 64 times at least

        thread = threading.Thread(target=sip)
        thread.start()
        lease.memory.copy_all()
        with near, far:
            assert lease.memory.copy_written(near.fileno(), LIMIT_S, 0.7) > 16 << 20
            near.shutdown(socket.SHUT_WR)
            thread.join()


def test_time_is_up_for_a_sender_that_says_nothing() -> None:
    arrival = Arrival("shard", SHARD, timeout_s=0.2)
    with arrival.lease, pytest.raises(TimeoutError):
        arrival.wait()


def test_what_is_revoked_stays_so() -> None:
    """Whoever freezes it, or has it served again, comes too late."""
    with residence("shard", SHARD) as home:
        memory = home.lease.memory
        assert (memory.thaw(), memory.freeze(), memory.freeze()) == (False, True, False)
        assert (memory.state, memory.thaw(), memory.state) == ("frozen", True, "serving")
        assert memory.revoke() == "serving"
        assert (memory.freeze(), memory.thaw(), memory.state) == (False, False, "revoked")


def test_nothing_is_served_before_all_of_it_is_here() -> None:
    with residence("shard", SHARD) as home, ExitStack() as stack:
        home.store("shm").put(b"key", b"value")
        arrival = Arrival("shard", SHARD)
        lease = stack.enter_context(arrival.lease)
        assert lease.memory.state == "frozen"
        link = ShmLink(lease.data_fd, lease.control_fd, lease.memory.attach(os.getpid(), 1), 0.1)
        with pytest.raises(LinkDown) as caught:
            lease.store(link).get(b"key")
        assert caught.value.args == (FROZEN,)
        move(home.lease.memory, arrival)
        assert lease.store(link).get(b"key") == b"value"
        link.close()


def test_an_empty_lease_moves() -> None:
    for kind, size in (("shard", 4 << 20), ("region", 1)):
        with residence(kind, size) as home:  # type: ignore[arg-type]
            home.move()
            assert home.lease.memory.state == "serving"
            if kind == "shard":
                assert_whole_and_empties(home.lease, home.store("shm"))


@pytest.mark.parametrize("size", [1, (256 << 10) - 4096, (256 << 10) - 4095, (4 << 20) - 4097, 5 << 20])
def test_every_byte_of_a_region_moves(size: int) -> None:
    with residence("region", size) as home:
        noise = random.Random(size).randbytes(size)
        FollowingRegion(home, "tcp").write(0, noise)
        home.move(rounds=1)
        assert FollowingRegion(home, "shm").read(0, size) == noise
