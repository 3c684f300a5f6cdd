"""The donor's desk for its own node: a Unix socket at which memory is asked back without any broker.

Whoever may end the donor may ask: its own user, and root. That is told by the kernel, so nobody presents a ticket.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from memfaas import rpc
from memfaas.errors import ProtocolError
from memfaas.messages import Lend, Lent, Message, Reclaim, Reclaimed
from memfaas.server.fds import peer_of

logger = logging.getLogger(__name__)


class Desk:
    """Serves connections within `run`; `reclaim` and `lend` do what they ask."""

    def __init__(
        self,
        path: Path,
        reclaim: Callable[[Reclaim], Awaitable[Reclaimed]],
        lend: Callable[[Lend], Awaitable[Lent]],
    ) -> None:
        self._path = path
        self._reclaim = reclaim
        self._lend = lend

    async def run(self) -> None:
        self._path.unlink(missing_ok=True)  # a killed agent left it
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(self._path))
            os.chmod(self._path, 0o600)
            sock.listen()
            sock.setblocking(False)
            try:
                await trio.serve_listeners(self._serve, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])
            finally:
                self._path.unlink(missing_ok=True)

    async def _serve(self, stream: trio.SocketStream) -> None:
        _, uid = peer_of(stream.socket)
        if uid not in (0, os.getuid()):
            logger.warning("user %d asked for this node's memory and was sent away", uid)
            return
        try:
            await rpc.Channel(stream, self, "a program of this node").run()
        except ProtocolError as error:
            logger.warning("%s", error)

    async def on_request(self, message: Message) -> Message:
        match message:
            case Reclaim():
                # Whoever asked may have given up while this process stood still, and its `Lend` be done: then
                # the connection has ended, and this is cancelled here.
                await trio.lowlevel.checkpoint()
                return await self._reclaim(message)
            case Lend():
                return await self._lend(message)
        raise ProtocolError(f"a donor answers no {type(message).__name__} here")

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"a donor is told no {type(message).__name__}")
