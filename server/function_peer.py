"""A memory function as its agent sees it: what it is told to do, and what it says by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from memfaas import rpc
from memfaas.errors import ProtocolError
from memfaas.messages import (
    Done,
    FunctionReport,
    InDoubt,
    Message,
    Punch,
    Punched,
    Received,
    Resume,
    Send,
    Sent,
    Serve,
    Stop,
    Target,
    Unpunch,
)
from memfaas.server.pool import FunctionProcess

_SERVE_S = 30.0
"""Mending what a killed function left may wait for operations of its clients."""
_STOP_S = 45.0
PUNCH_S = 10.0
_ANSWER_S = 1.0

logger = logging.getLogger(__name__)


class FunctionPeer:
    """The connection to one function; `run` must be running.

    What it is asked raises what it answers, TransportError, DeadlineExceeded.
    """

    def __init__(self, process: FunctionProcess) -> None:
        self.process = process
        self.channel = rpc.Channel(process.stream, self, f"function {process.pid}")
        self.ended = trio.Event()
        self._unheard: list[Message] = []
        self._hear: Callable[[Message], None] = self._unheard.append

    async def run(self) -> None:
        try:
            await self.channel.run()
        except ProtocolError as error:
            logger.error("%s", error)
        finally:
            self.ended.set()

    @property
    def closed(self) -> bool:
        """Whether it can say nothing more."""
        return self.channel.closed

    async def kill(self) -> None:
        """Makes sure that it has ended."""
        await self.process.kill()

    # --- what it says ---------------------------------------------------------------------------

    def listen(self, hear: Callable[[Message], None]) -> None:
        """`hear` is called with all that it says by itself, and has said: FunctionReport, Received, InDoubt."""
        self._hear = hear
        for message in self._unheard:
            hear(message)

    async def on_request(self, message: Message) -> Message:
        raise ProtocolError(f"a function does not ask {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        if not isinstance(message, FunctionReport | Received | InDoubt):
            raise ProtocolError(f"a function does not say {type(message).__name__}")
        self._hear(message)

    # --- what it is told ------------------------------------------------------------------------

    async def serve(self, message: Serve, descriptors: list[int]) -> None:
        self.process.stream.attach(descriptors)
        await self.channel.request(message, Done, _SERVE_S)

    async def send(self, target: Target, timeout_s: float) -> Sent:
        return await self.channel.request(Send(target=target, timeout=timeout_s), Sent, timeout_s + _ANSWER_S)

    async def resume(self, epoch: int, timeout_s: float) -> None:
        await self.channel.request(Resume(epoch=epoch), Done, timeout_s)

    async def punch(self, size: int) -> int:
        return (await self.channel.request(Punch(size=size), Punched, PUNCH_S)).size

    async def unpunch(self) -> None:
        await self.channel.request(Unpunch(), Done, PUNCH_S)

    async def stop(self, reason: str) -> None:
        await self.channel.request(Stop(reason=reason), Done, _STOP_S)
