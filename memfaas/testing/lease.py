"""One lease's memory with nothing around it: no broker, no donor, no tickets.

What the donor agent and the memory function do for a lease is here a few lines in one process, so
that the native core can be tested, and misused, directly.
"""

from __future__ import annotations

import fcntl
import functools
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from memfaas._native import (
    NEED_CONNECTION,
    PART,
    LinkDown,
    Memory,
    RegionCore,
    Server,
    ShmLink,
    StoreCore,
    TcpLink,
    VerbsLink,
    format_memory,
    geometry,
)
from memfaas.fabric.devices import chosen_device

if TYPE_CHECKING:
    from memfaas._native import Value

Kind = Literal["shard", "region"]
Fabric = Literal["shm", "tcp", "verbs"]


def make_memory(kind: Kind, size: int, *, arriving: bool = False) -> tuple[int, int]:
    """Descriptors of fresh data and control memory, sealed as a donor seals them."""
    data_bytes, control_bytes = geometry(kind, size)
    data = os.memfd_create("memfaas-test-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    control = os.memfd_create("memfaas-test-control", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(data, data_bytes)
    os.ftruncate(control, control_bytes)
    format_memory(
        data, control, kind=kind, size=size, lease=b"L" * 16, store=b"S" * 16, shard=0, epoch=1, arriving=arriving
    )
    fcntl.fcntl(data, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    fcntl.fcntl(control, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return data, control


@functools.cache
def any_device() -> bytes:
    """The RDMA device that works. Raises FabricUnavailable. (To look takes long where files are emulated.)"""
    return chosen_device().encode()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one tcp connection on the loopback device."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def _bytes_of(value: Value) -> memoryview:
    return memoryview(cast("Any", value)).cast("B")  # NumPy's stubs know no buffers before Python 3.12


class BareStore(StoreCore):
    """A store of one shard without a session.

    `repair(store, reason)` mends the link; without it, a link that cannot serve is LinkDown(reason).
    Values stay as they are stored, whatever their flags say.
    """

    def __init__(self, part_size: int, repair: Callable[[BareStore, int], None] | None = None) -> None:
        super().__init__([b"the only shard  "], part_size, True)
        self._repair_with = repair
        self.forgotten: list[bytes] = []

    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        if self._repair_with is None:
            raise LinkDown(reason)
        self._repair_with(self, reason)

    def _unpack(self, key: bytes, value: bytes, meta: bytes, flags: int) -> bytes:
        return value

    def _put_rare(self, key: bytes, value: Value) -> None:
        self._save(key, 0, _bytes_of(value), b"", 0)

    def _get_into_rare(self, key: bytes, buffer: Value) -> int:
        found = self._load_into(key, 0, _bytes_of(buffer))
        return found[0] if found else 0

    def _forget(self, manifest: bytes) -> None:
        self.forgotten.append(manifest)

    def scan(self, space: int) -> dict[bytes, tuple[int, int]]:
        """Flags and length of the value of every key."""
        found: dict[bytes, tuple[int, int]] = {}
        cursor = 0
        while True:
            cursor, batch = self._scan(0, cursor, space)
            found.update((key, (flags, length)) for key, flags, length in batch)
            if not cursor:
                return found


class BareRegion(RegionCore):
    """A region without a session; a link that cannot serve is LinkDown(reason)."""

    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        raise LinkDown(reason)


class BareLease:
    """Memory, the function that serves it, and its clients, all in this process.

    `device`: the RDMA device of both ends, for links over verbs, as NAME:PORT:GID; empty: the first that works.
    """

    def __init__(
        self, kind: Kind, size: int, *, timeout_s: float = 30.0, arriving: bool = False, device: str = ""
    ) -> None:
        self.timeout_s = timeout_s
        self._device = device.encode()
        self.data_fd, self.control_fd = make_memory(kind, size, arriving=arriving)
        self.memory = Memory(self.data_fd, self.control_fd)
        self.server = Server(self.memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.hang_up()
        os.close(self.data_fd)
        os.close(self.control_fd)

    def hang_up(self) -> None:
        """Ends all tcp connections; then nothing of the server's is at work any more."""
        if not self.server.stop(self.timeout_s):
            raise AssertionError("a connection's thread did not end")
        self.server = Server(self.memory)

    def connect(self) -> socket.socket:
        """A raw connection to the server."""
        near, far = tcp_pair()
        self.server.serve(far.detach())
        return near

    def link(self, fabric: Fabric) -> ShmLink | TcpLink | VerbsLink:
        if fabric == "shm":
            return self.shm_link()
        return self.tcp_link() if fabric == "tcp" else self.verbs_link()

    def shm_link(self) -> ShmLink:
        participant = self.memory.attach(os.getpid(), 1)
        return ShmLink(self.data_fd, self.control_fd, participant, self.timeout_s)

    def tcp_link(self, connections: int = 1) -> TcpLink:
        link = TcpLink(self.timeout_s)
        for _ in range(connections):
            link.add(self.connect().detach())
        return link

    def verbs_link(self, connections: int = 1) -> VerbsLink:
        link = VerbsLink(self._device or any_device(), self.timeout_s)
        for _ in range(connections):
            self.add_queue_pair(link)
        return link

    def add_queue_pair(self, link: VerbsLink) -> None:
        pair = link.queue_pair()
        end = self.server.verbs_end(self._device or any_device(), pair.address)
        near, far = tcp_pair()
        self.server.serve(far.detach(), end)
        link.add(near.detach(), pair, end.welcome, self.timeout_s)

    def store(self, link: ShmLink | TcpLink | VerbsLink) -> BareStore:
        """On tcp and verbs it gets new connections when it has none left, but what breaks one is an error."""

        def repair(store: BareStore, reason: int) -> None:
            now = store._get_link(0)
            if reason != NEED_CONNECTION:
                raise LinkDown(reason)
            if isinstance(now, VerbsLink):
                self.add_queue_pair(now)
            elif isinstance(now, TcpLink):
                now.add(self.connect().detach())
            else:
                raise LinkDown(reason)

        store = BareStore(self.memory.part_size, repair)
        store._set_link(0, link)
        return store

    def region(self, link: ShmLink | TcpLink | VerbsLink) -> BareRegion:
        region = BareRegion(self.memory.size)
        region._set_link(link)
        return region


class Arrival:
    """A copy of somebody's memory that arrives here: what is sent to `fileno()` fills `lease`.

    It stays frozen; `lease` is closed by whoever asked for it."""

    def __init__(self, kind: Kind, size: int, *, timeout_s: float = 30.0) -> None:
        self.lease = BareLease(kind, size, timeout_s=timeout_s, arriving=True)
        self._near, self._far = tcp_pair()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        try:
            self.lease.memory.receive(self._far.fileno(), self.lease.data_fd, self.lease.timeout_s)
        except OSError as error:
            self._error = error
        self._far.close()  # no mere shutdown: that does not stop a sender who has more to say

    def fileno(self) -> int:
        return self._near.fileno()

    def send(self, stream: bytes) -> None:
        """Instead of a copy. The receiver may end before all of it is sent."""
        with suppress(OSError):
            self._near.sendall(stream)
            self._near.shutdown(socket.SHUT_WR)

    def wait(self) -> None:
        """Until all of it is here. The OSError of the receiver."""
        self._thread.join()
        self._near.close()
        if self._error is not None:
            raise self._error

    def break_off(self) -> None:
        self._near.close()
        self._thread.join()


def move(memory: Memory, to: Arrival, *, rounds: int = 3, between: Callable[[], object] = lambda: None) -> BareLease:
    """Copies memory that is in use, and has the copy serve. The memory itself is left frozen."""
    memory.copy_all()
    for _ in range(rounds):
        memory.copy_written(to.fileno(), to.lease.timeout_s)
        between()
    memory.freeze()
    if not memory.drain(to.lease.timeout_s):
        raise AssertionError("an operation did not end")
    memory.copy_rest(to.fileno(), to.lease.timeout_s)
    to.wait()
    to.lease.memory.thaw()
    if not to.lease.memory.put_right(to.lease.timeout_s):
        raise AssertionError("not everything could be put right")
    return to.lease


def fill_and_empty(store: BareStore) -> None:
    """A heap in which nothing is stored takes values of nearly all its size: nothing has leaked."""
    part = store.part_size
    value = os.urandom(part)
    for i in range(7):  # of eight; the last one's room is for their heads
        store._save(b"part-%d" % i, PART, value, b"", 0)
    for i in range(7):
        found = store._load(b"part-%d" % i, PART)
        if found != (value, b"", 0):
            raise AssertionError(f"part {i} is not what was stored")
    for i in range(7):
        store._remove(b"part-%d" % i, PART)
