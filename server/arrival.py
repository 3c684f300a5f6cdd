"""A lease arrives: another donor's function sends all of it to ours, which then serves it."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time

import trio

from memfaas import _native, rpc
from memfaas.errors import LeaseLost, MemfaasError, TransportError
from memfaas.messages import Done, Refused, Welcome, short
from memfaas.server import process
from memfaas.server.doorman import Doorman
from memfaas.units import format_size

_DIAL_S = 10.0
"""The sender dials as soon as it hears that we wait. One that has not by now never will, as a rule: it is dead, or
the broker is. If it comes after all, the lease stays where it is."""
_REPLY_S = 5.0

logger = logging.getLogger(__name__)


class Arrival:
    """Waits for the one connection that brings the lease, and fills the memory from it.

    Once the copy is complete it is served, whatever becomes of its sender, who goes on only when the
    broker says that this copy will never be used.
    """

    def __init__(self, memory: _native.Memory, data: int, doorman: Doorman, *, spill: bool) -> None:
        self._memory = memory
        self._data = data
        self._spill = spill
        self._doorman = doorman
        self._name = short(doorman.spec.lease)
        self._sender: trio.Event = trio.Event()
        self._sock: socket.socket | None = None

    async def run(self, listener: trio.SocketListener, timeout_s: float) -> None:
        """Returns when the lease is served. Raises LeaseLost when it does not come in time, or comes torn."""
        deadline = time.monotonic() + timeout_s
        patience = min(timeout_s, _DIAL_S)
        with trio.move_on_after(patience):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._on_connection, [listener])
                await self._sender.wait()
                nursery.cancel_scope.cancel()
        if self._sock is None:
            raise LeaseLost(f"lease {self._name}: nobody began to send it within {patience:g} s")
        with self._sock as sock:
            try:
                await trio.to_thread.run_sync(self._receive, sock, deadline)
            except OSError as error:
                await trio.to_thread.run_sync(_say, sock, TransportError(f"it could not be received: {error}"))
                raise LeaseLost(f"lease {self._name} did not arrive whole: {error.strerror}") from error

    def stop(self) -> None:
        """Makes `run` end soon."""
        if self._sock is not None:
            _shut(self._sock)

    async def _on_connection(self, stream: trio.SocketStream) -> None:
        await self._doorman.guarded(self._welcome, stream)

    async def _welcome(self, stream: trio.SocketStream) -> None:
        if await self._doorman.admit(stream, "move") is None or self._sock is not None:
            return
        process.notice_dead_peers(stream.socket)
        with trio.fail_after(rpc.HANDSHAKE_TIMEOUT_S):
            await rpc.send_message(stream, Welcome())
        descriptor = stream.socket.detach()
        os.set_blocking(descriptor, True)
        self._sock = socket.socket(fileno=descriptor)
        self._sender.set()

    def _receive(self, sock: socket.socket, deadline: float) -> None:
        started = time.monotonic()
        size = self._memory.receive(sock.fileno(), self._data, deadline - started, self._spill)
        if not self._memory.thaw():
            raise OSError(errno.ECANCELED, "its memory was needed")
        # From now on it is ours.
        _say(sock, None)
        seconds = time.monotonic() - started
        logger.info("lease %s: arrived, %s in %.2f s", self._name, format_size(size), seconds)


def _say(sock: socket.socket, error: MemfaasError | None) -> None:
    """To the sender, who may be gone."""
    try:
        sock.settimeout(_REPLY_S)
        rpc.send_message_blocking(sock, Done() if error is None else Refused(code=error.code, text=str(error)))
    except OSError as trouble:
        logger.info("the sender of a lease is gone: %s", trouble)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already
