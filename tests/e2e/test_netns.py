"""Broker and donors on one node, clients on another, and a real network between them.

The two nodes are network namespaces. They share a kernel, so clients could reach the memory by shm;
all of them are told to use tcp.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import memfaas
from memfaas import auth
from memfaas.client.local import _Process
from memfaas.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    FabricUnavailable,
    KeyAbsent,
    LeaseLost,
    TransportError,
    UnknownStore,
)
from memfaas.testing.linearizability import ABSENT, Operation, check
from memfaas.units import KIB, MIB
from tests.e2e import nets
from tests.e2e.crew import Crew
from tests.e2e.nets import NEAR, Node, Wire, join_by_cable
from tests.e2e.scene import LIMIT_S, until

T = TypeVar("T")

TOO_LATE_S = 10.0
"""What an operation may take beyond its deadline on a machine that has other things to do."""


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    nets.skip_without_namespaces()
    with ExitStack() as stack:
        near, far = Node(), Node()
        stack.callback(near.close)
        stack.callback(far.close)
        yield near, far


@pytest.fixture
def cable(nodes: tuple[Node, Node]) -> tuple[Node, Node]:
    join_by_cable(*nodes)
    return nodes


@contextmanager
def cluster(node: Node, folder: Path, *, lease_ttl: float = 30.0) -> Iterator[str]:
    """A broker and two donors on a node; gives the broker's address."""
    auth.create_secret(folder / "secret")
    processes: list[_Process] = []

    def start(role: str, **settings: object) -> dict[str, Any]:
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-P", "-m", "memfaas.cli", "--config", os.devnull, role, "--until-eof", *flags]
        with node.entered():
            process = _Process(role, command, dict(os.environ), folder / f"{role}{len(processes)}.log")
        processes.append(process)
        return process.wait_ready()

    try:
        secret = folder / "secret"
        facts = start("broker", listen_host=NEAR, listen_port=0, secret_file=secret, lease_ttl=lease_ttl)
        address = f"memfaas://{facts['address']}?secret={secret}"
        for name in ("one", "two"):
            start(
                "donor", broker=address, name=name, memory="128MiB", headroom="64MiB",
                listen_host=NEAR, runtime_dir=folder / "run",
            )  # fmt: skip
        yield address
    finally:
        for process in reversed(processes):
            process.stop(TOO_LATE_S)


@pytest.fixture
def folder(own_world: Path) -> Iterator[Path]:
    """A short one: sockets go below it."""
    folder = own_world / "net"
    folder.mkdir(mode=0o700)
    yield folder
    assert not (folder / "run").exists(), "a donor left something behind"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


# --- everything works -----------------------------------------------------------------------------------


def test_values_of_every_kind_cross_the_device(cable: tuple[Node, Node], folder: Path) -> None:
    near, far = cable
    with cluster(near, folder) as address, far.entered(), memfaas.connect(address, fabric="tcp") as session:
        store = session.store("s", size="96MiB")
        assert store.spec.shards == 2
        sizes = [0, 1, 100, 4 * KIB, 64 * KIB, MIB, store.part_size, store.part_size + 1, 20 * MIB + 1]
        values = {b"%d" % size: os.urandom(size) for size in sizes}
        received, sent = far.traffic()
        for key, value in values.items():
            store.put(key, value)
        for key, value in values.items():
            assert store.get(key) == value
            buffer = bytearray(len(value))
            assert store.get_into(key, buffer) == len(value)
            assert buffer == value
        total = sum(sizes)
        assert far.traffic()[1] - sent >= total
        assert far.traffic()[0] - received >= 2 * total

        array = np.arange(300_000, dtype=">f8").reshape(3, -1)
        store.put("array", array)
        back = store.get_array("array")
        assert back.dtype == array.dtype
        assert np.array_equal(back, array)
        batch = {b"batch/%d" % n: os.urandom(n * 7) for n in range(200)}
        store.put_many(batch)
        assert store.get_many([*batch, b"absent"]) == [*batch.values(), None]
        assert sorted(store.keys("batch/")) == sorted(batch)
        assert len(store) == len(values) + 1 + len(batch)
        for key in values:
            assert store.delete(key)
            assert key not in store
        assert {shard.fabric for shard in store.info().shards} == {"tcp"}

        with session.lease("8MiB") as region:
            content = os.urandom(5 * MIB)
            region.write(1000, content)
            assert region.read(1000, len(content)) == content
            assert region.compare_swap(0, 0, 7) == 0
            assert region.fetch_add(0, 3) == 7
            assert region.read(0, 8) == (10).to_bytes(8, "little")
            assert region.fabric == "tcp"


@pytest.mark.slow
def test_a_slow_wire_that_loses_packets_changes_nothing(nodes: tuple[Node, Node], folder: Path, tmp_path: Path) -> None:
    near, far = nodes
    with (
        Wire(near, far, delay_s=0.005, loss=0.01) as wire,
        cluster(near, folder) as address,
        far.entered(),
        memfaas.connect(address, fabric="tcp") as session,
    ):
        store = session.store("s", size="64MiB")
        with Crew(address, tmp_path, fabrics=("tcp",), longest=70_000) as crew:
            for _ in range(2):
                crew.join("tcp")
            crew.goes_on()
            value = os.urandom(MIB)
            store.put("large", value)
            assert store.get("large") == value
            batch = {b"%d" % n: os.urandom(1000) for n in range(100)}
            store.put_many(batch)
            assert store.get_many(batch) == [*batch.values()]
            with session.lease("1MiB") as region:
                assert [region.fetch_add(0, 1) for _ in range(20)] == [*range(20)]
            crew.goes_on()
            crew.finish()
        assert wire.lost > 10


# --- the link goes down ---------------------------------------------------------------------------------


def insist(operation: Callable[[], T]) -> T:
    """For sessions with a short timeout, while there is no reason to fail but a busy machine."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return operation()
        except TransportError:
            if time.monotonic() > deadline:
                raise


class Witness:
    """A thread that puts, gets and deletes one key, and notes what came of it."""

    def __init__(self, store: memfaas.Store, number: int, timeout_s: float) -> None:
        self.operations: list[Operation] = []
        self.failures: list[Exception] = []
        self.unexpected: list[BaseException] = []
        self.longest_s = 0.0
        self.key = f"key-{number}"
        self._store = store
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._value = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self.unexpected == []

    def successes(self) -> int:
        return sum(one.certain for one in self.operations)

    def _run(self) -> None:
        try:
            step = 0
            while not self._stop.is_set():
                self._one(("put", "get", "delete", "put", "get")[step % 5])
                step += 1
        except BaseException as error:
            self.unexpected.append(error)

    def _one(self, kind: str) -> None:
        start, result = time.monotonic_ns(), ABSENT
        try:
            if kind == "put":
                self._value += 1
                self._store.put(self.key, self._bytes(self._value))
            elif kind == "get":
                result = int.from_bytes(self._store.get(self.key)[:8], "little")
            else:
                result = self._store.delete(self.key)
        except KeyAbsent:
            pass
        except (DeadlineExceeded, FabricUnavailable) as error:
            self.failures.append(error)
            self._note(kind, start, None, 0)
            return
        finally:
            self.longest_s = max(self.longest_s, (time.monotonic_ns() - start) / 1e9)
        self._note(kind, start, time.monotonic_ns(), result)

    @staticmethod
    def _bytes(value: int) -> bytes:
        return value.to_bytes(8, "little") * (1 + value % 4 * 5000)

    def _note(self, kind: str, start: int, end: int | None, result: int) -> None:
        certain = end is not None
        if kind == "put":
            one = Operation("put", start, end, self._value, certain=certain)
        elif kind == "get":
            one = Operation("get", start, end, result, certain=certain)
        else:
            one = Operation("delete", start, end, existed=bool(result), certain=certain)
        self.operations.append(one)


def more_of(witnesses: list[Witness], count: int = 10) -> None:
    """Returns when each has succeeded some more times."""
    before = [one.successes() for one in witnesses]
    until(lambda: all(one.successes() >= was + count for one, was in zip(witnesses, before, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(("side", "timeout_s"), [("far", 10.0), ("near", 0.4)])
def test_a_link_that_is_down_for_a_while_loses_nothing(
    cable: tuple[Node, Node], folder: Path, side: str, timeout_s: float
) -> None:
    near, far = cable
    down = near if side == "near" else far
    with (
        cluster(near, folder) as address,
        far.entered(),
        memfaas.connect(address) as patient,
        memfaas.connect(address, fabric="tcp", timeout=timeout_s) as session,
    ):
        patient.store("s", size="32MiB")
        store = insist(lambda: session.store("s"))
        witnesses = [Witness(store, number, timeout_s) for number in range(4)]
        for one in witnesses:
            one.start()
        try:
            more_of(witnesses)
            down.set_link("down")
            time.sleep(2)
            down.set_link("up")
            more_of(witnesses)
        finally:
            for one in witnesses:
                one.stop()
        for one in witnesses:
            assert one.longest_s < timeout_s + TOO_LATE_S
            assert bool(one.failures) == (timeout_s < 2)
            assert check(one.operations) is None
        assert patient.store("new", size="8MiB") is not None
        assert {shard.trouble for shard in store.info().shards} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_link_that_stays_down_is_one_error_in_time(cable: tuple[Node, Node], folder: Path, side: str) -> None:
    near, far = cable
    timeout_s = 0.15
    with (
        cluster(near, folder) as address,
        far.entered(),
        memfaas.connect(address, fabric="tcp", timeout=timeout_s) as session,
    ):
        with memfaas.connect(address) as patient:
            patient.store("s", size="64MiB", persistent=True)
        store = insist(lambda: session.store("s"))
        insist(lambda: store.put("small", b"1"))
        insist(lambda: store.put("large", bytes(20 * MIB)))
        region = insist(lambda: session.lease("1MiB"))
        insist(lambda: region.write(0, b"1"))
        (near if side == "near" else far).set_link("down")
        data: list[Callable[[], object]] = [
            lambda: store.get("small"),
            lambda: store.get("large"),
            lambda: store.put("small", b"2"),
            lambda: store.put("large", bytes(20 * MIB)),
            lambda: store.get_many([b"small", b"other"]),
            lambda: store.put_many({b"%d" % n: b"" for n in range(10)}),
            lambda: store.delete("small"),
            lambda: store.keys(),
            lambda: region.read(0, 1),
            lambda: region.fetch_add(0, 1),
        ]
        broker: list[Callable[[], object]] = [
            lambda: session.store("other", size="8MiB"),
            lambda: session.lease("1MiB"),
            session.status,
        ]
        for operations, errors in ((data, (DeadlineExceeded, FabricUnavailable)), (broker, TransportError)):
            for operation in operations:
                started = time.monotonic()
                with pytest.raises(errors):
                    operation()
                assert time.monotonic() - started < timeout_s + TOO_LATE_S
        with pytest.raises(BrokerUnavailable):
            memfaas.connect(address, fabric="tcp")
        assert all(shard.trouble for shard in store.info().shards)


@pytest.mark.slow
def test_who_is_cut_off_for_longer_than_leases_live_has_lost_them(cable: tuple[Node, Node], folder: Path) -> None:
    near, far = cable
    with cluster(near, folder, lease_ttl=1.0) as address:
        with near.entered():
            watcher = memfaas.connect(address)  # its threads stay on the node
        with watcher, far.entered(), memfaas.connect(address, fabric="tcp", timeout=5) as session:
            store = session.store("s", size="8MiB")
            store.put("a", b"1")
            kept = session.store("kept", size="8MiB", persistent=True)
            kept.put("a", b"2")
            region = session.lease("1MiB")
            region.write(0, b"1")
            far.set_link("down")
            until(lambda: {lease.store for lease in watcher.status().leases} == {"kept"})
            far.set_link("up")
            until(lambda: is_lost(lambda: store.get("a")))  # the donors hear of it a moment later
            until(lambda: is_lost(lambda: region.read(0, 1)))
            assert kept.get("a") == b"2"
            with pytest.raises(UnknownStore):
                session.store("s")
            fresh = session.store("s", size="8MiB")
            assert "a" not in fresh
            fresh.put("a", b"3")
            assert fresh.get("a") == b"3"
            session.delete_store("kept")


def is_lost(operation: Callable[[], object]) -> bool:
    try:
        operation()
    except LeaseLost:
        return True
    return False
