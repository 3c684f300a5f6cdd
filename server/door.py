"""Where clients come in to a lease's memory, over shm, tcp or verbs."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import trio

from memfaas import _native, auth, messages, rpc
from memfaas.errors import AccessError, FabricUnavailable, MemfaasError, ProtocolError
from memfaas.messages import VerbsHello, VerbsWelcome, Welcome, short
from memfaas.server import process
from memfaas.server.doorman import Doorman, refuse
from memfaas.server.fds import FdStream, peer_of

_PUT_RIGHT_S = 10.0
_CONNECTING = 8
"""Queue pairs that are connected at the same time: one to an address that does not answer takes a thread a second."""
_REST = 3.0
"""How long to rest, for each second of registering ahead: whoever works on this node comes first. A lower priority
would not do: a client that needs a chunk, or a reclaim, may have to wait for the one that is being registered."""

logger = logging.getLogger(__name__)


class Door:
    """Admits clients to one lease's memory, and cleans up behind those that die or leave.

    `device` is the RDMA device of this node for clients over verbs, NAME:PORT:GID, or empty.
    `on_change` is called whenever the number of links may have changed.
    """

    def __init__(
        self,
        memory: _native.Memory,
        descriptors: list[int],
        doorman: Doorman,
        device: str,
        on_change: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._server = _native.Server(memory)
        self._descriptors = descriptors
        self._doorman = doorman
        self._device = device
        self._name = short(doorman.spec.lease)
        self._on_change = on_change
        self._attached = 0
        self._reaped = trio.Event()
        self._connecting = trio.CapacityLimiter(_CONNECTING)
        self._closed_for: set[str] = set()
        self._closing = threading.Lock()
        self._limit = ""

    def links(self) -> dict[str, int]:
        verbs = self._server.verbs_connections()
        counts = {"shm": self._attached, "tcp": max(0, self._server.connections() - verbs), "verbs": verbs}
        return {fabric: count for fabric, count in counts.items() if count}

    def cut(self) -> None:
        """Ends the tcp connections of clients that may keep an operation from ending; they connect again."""
        self._server.cut()

    def stop(self, timeout_s: float) -> bool:
        """Ends all tcp connections; False when some did not end in time. Blocks."""
        return self._server.stop(timeout_s)

    async def run(self, unix: trio.SocketListener, tcp: trio.SocketListener) -> None:
        """Serves both listeners, and watches the clients that a killed function has left attached."""
        self._reaped.set()  # a killed function may have left something too
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._put_right)
            for participant, pid, start_time in self._memory.participants():
                nursery.start_soon(self._watch_inherited, participant, pid, start_time)
            nursery.start_soon(trio.serve_listeners, self._on_unix, [unix])
            nursery.start_soon(trio.serve_listeners, self._on_tcp, [tcp])

    async def _on_unix(self, stream: trio.SocketStream) -> None:
        await self._doorman.guarded(self._serve_shm, stream)

    async def _on_tcp(self, stream: trio.SocketStream) -> None:
        await self._doorman.guarded(self._serve_remote, stream)

    # --- shm ------------------------------------------------------------------------------------

    async def _serve_shm(self, stream: trio.SocketStream) -> None:
        admitted = await self._doorman.admit(stream, "shm")
        if admitted is None:
            return
        try:
            pid, pidfd = _identify(stream, admitted.ticket)
        except MemfaasError as error:
            await refuse(stream, error)
            raise
        try:
            await self._lend(stream, pid, pidfd)
        finally:
            os.close(pidfd)

    async def _lend(self, stream: trio.SocketStream, pid: int, pidfd: int) -> None:
        """Passes the memory to a process, and takes it back when that ends or hangs up."""
        try:
            participant = self._memory.attach(pid, start_time_of(pid))
        except OSError as error:
            reason = "all its places are taken" if error.errno == errno.EMFILE else error.strerror
            refusal = FabricUnavailable(f"shm cannot attach one more process to this lease: {reason}")
            await refuse(stream, refusal)
            raise refusal from error
        self._attached += 1
        self._on_change()
        try:
            carrier = FdStream(stream.socket)
            carrier.attach(self._descriptors)
            with trio.fail_after(rpc.HANDSHAKE_TIMEOUT_S):
                await rpc.send_message(carrier, Welcome(participant=participant))
            await _until_gone(stream, pidfd)
        finally:
            await self._detach(participant)

    async def _watch_inherited(self, participant: int, pid: int, start_time: int) -> None:
        self._attached += 1
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # it has ended, and perhaps its parent too
            await self._detach(participant)
            return
        try:
            if start_time_of(pid) == start_time:  # else the id is another process's by now
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
            await self._detach(participant)

    async def _detach(self, participant: int) -> None:
        self._attached -= 1
        self._on_change()
        await trio.to_thread.run_sync(self._memory.reap, participant)
        self._reaped.set()

    async def _put_right(self) -> None:
        """Frees what those that were reaped had taken; once for a burst of them."""
        while True:
            await self._reaped.wait()
            self._reaped = trio.Event()
            while not await trio.to_thread.run_sync(self._memory.put_right, _PUT_RIGHT_S):
                if self._memory.state == "serving":
                    logger.warning(
                        "lease %s: an operation does not end, so what dead clients held stays held", self._name
                    )

    # --- tcp and verbs --------------------------------------------------------------------------

    async def _serve_remote(self, stream: trio.SocketStream) -> None:
        admitted = await self._doorman.admit(stream, "tcp", "verbs")
        if admitted is None:
            return
        process.notice_dead_peers(stream.socket)
        with trio.fail_after(rpc.HANDSHAKE_TIMEOUT_S):
            await rpc.send_message(stream, Welcome())
            end = await self._queue_pair(stream) if admitted.fabric == "verbs" else None
        with socket.socket(fileno=stream.socket.detach()) as sock:
            sock.setblocking(True)
            # Before the client knows of its end: then none of its messages comes too early.
            if end is None:
                self._server.serve(os.dup(sock.fileno()))
            else:  # it may have to wait while others are closed
                await trio.to_thread.run_sync(self._server.serve, os.dup(sock.fileno()), end, limiter=self._connecting)
            if end is not None:
                _welcome(sock, end)
        if end is not None:
            self._register_ahead()
        self._on_change()

    async def _queue_pair(self, stream: trio.SocketStream) -> _native.ServerEnd:
        hello = await rpc.receive_message(stream)
        try:
            if not isinstance(hello, VerbsHello):
                raise ProtocolError(f"expected the address of a queue pair, got {type(hello).__name__}")
            if not self._device:
                raise FabricUnavailable(
                    "verbs: the donor had no RDMA device that works when it granted the lease, or has it on a disk"
                )
            return await trio.to_thread.run_sync(
                self._server.verbs_end, self._device.encode(), hello.address, limiter=self._connecting
            )
        except MemfaasError as error:
            await refuse(stream, error)
            raise

    def _register_ahead(self) -> None:
        """Has a thread do it, unless one does or there is nothing to do; clients are served meanwhile."""
        if self._server.begin_registering():
            threading.Thread(target=self._register, name="register", daemon=True).start()

    def _register(self) -> None:
        try:
            started = time.monotonic()
            while self._server.register_more():
                time.sleep(_REST * (time.monotonic() - started))
                started = time.monotonic()
        except FabricUnavailable as error:
            if self._limit != (limit := str(error)):  # each time that verbs is opened it is met again
                logger.warning("lease %s: %s; the rest is tried when clients ask for it", self._name, limit)
            self._limit = limit

    def close_verbs(self, why: str) -> None:
        """No network device can reach the memory when this returns; clients that come are told why. Blocks.

        It stays closed until it was opened for each reason for which it was closed.
        """
        with self._closing:
            self._closed_for.add(why)
            self._server.close_verbs(why)

    def open_verbs(self, why: str) -> None:
        """`why` it was closed is over. Blocks."""
        with self._closing:
            self._closed_for.discard(why)
            if self._closed_for:
                self._server.close_verbs(next(iter(self._closed_for)))  # clients are to be told what still holds
            else:
                self._server.open_verbs()


def _welcome(sock: socket.socket, end: _native.ServerEnd) -> None:
    """Never blocks: who sent requests before it was welcome, and takes none of the replies, is cut off."""
    frame = rpc.frame(messages.encode(VerbsWelcome(welcome=end.welcome)), rpc.MAX_HANDSHAKE_FRAME)
    try:
        if sock.send(frame, socket.MSG_DONTWAIT) == len(frame):
            return
    except BlockingIOError:
        pass
    sock.shutdown(socket.SHUT_RDWR)


def start_time_of(pid: int) -> int:
    """When a process started, in clock ticks since the node's start; 0 when there is none such.

    With it a process id names one process for ever.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(line.rpartition(")")[2].split()[19])  # the name before it may hold anything


def _identify(stream: trio.SocketStream, ticket: auth.Ticket) -> tuple[int, int]:
    """The client's process: its id, and a descriptor that tells when it has ended."""
    pid, uid = peer_of(stream.socket)
    if ticket.uid is not None and uid not in (0, os.getuid(), ticket.uid):
        raise AccessError(f"the ticket is for user id {ticket.uid}, not {uid}")
    if pid == 0:
        raise FabricUnavailable("shm needs a client in the donor's PID namespace: else its end would go unseen")
    try:
        return pid, os.pidfd_open(pid)
    except OSError as error:
        raise FabricUnavailable(f"shm cannot watch the client's process {pid}: {error.strerror}") from error


async def _until_gone(stream: trio.SocketStream, pidfd: int) -> None:
    """Returns when the process has ended, or has closed its end of the stream.

    A forked child may hold that end open, so the stream alone does not tell.
    """

    async def until_closed() -> None:
        try:
            if await stream.receive_some(1):
                return  # it has nothing to say here, but while it lives it may use the memory
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_closed)
        await trio.lowlevel.wait_readable(pidfd)
        nursery.cancel_scope.cancel()
