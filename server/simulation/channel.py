"""A control connection inside one process."""

from __future__ import annotations

import math
from typing import TypeVar

import trio

from memfaas import rpc
from memfaas.errors import DeadlineExceeded, ProtocolError, TransportError
from memfaas.messages import Message

R = TypeVar("R", bound=Message)


class DirectChannel(rpc.Channel):
    """One end: what is asked or said here goes to the handler of the other side, without a stream between."""

    def __init__(self, other_side: rpc.Handler, peer: str) -> None:
        self.peer = peer
        self._other_side = other_side
        self._closed = False

    async def request(
        self, message: Message, reply: type[R], timeout_s: float = math.inf, *, withdraw: bool = False
    ) -> R:
        if self._closed:
            raise TransportError(f"the connection to {self.peer} is closed")
        with trio.move_on_after(timeout_s):
            await trio.lowlevel.checkpoint()
            result = await self._other_side.on_request(message)
            if not isinstance(result, reply):
                raise ProtocolError(f"{self.peer} answered {type(message).__name__} with {type(result).__name__}")
            return result
        raise DeadlineExceeded(f"{self.peer} did not answer {type(message).__name__} within {timeout_s:g} s")

    def tell(self, message: Message) -> None:
        """Says it at once."""
        if self._closed:
            raise TransportError(f"the connection to {self.peer} is closed")
        self._other_side.on_notice(message)

    async def notify(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.tell(message)

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()
