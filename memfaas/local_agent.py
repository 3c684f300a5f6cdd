"""Asking the donor of this node over its socket `agent.sock`, without any broker.

Who may is decided by the donor's node: the kernel tells the agent who is at the other end. So there
is no handshake; the connection is a `Channel` from its first byte on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import trio

from memfaas import rpc
from memfaas.errors import AccessError, ProtocolError, TransportError
from memfaas.messages import Message

SOCKET = "agent.sock"
"""Its name, in the donor's folder (`DonorSettings.home`)."""

R = TypeVar("R", bound=Message)


async def ask(home: Path, message: Message, reply: type[R], timeout_s: float) -> R:
    """Raises the agent's error; TransportError when none answers there; AccessError; DeadlineExceeded."""
    path = home / SOCKET
    try:
        stream = await trio.open_unix_socket(str(path))
    except PermissionError as error:
        raise AccessError(f"{path}: only the donor's user and root may ask it") from error
    except OSError as error:
        raise TransportError(
            f"no donor answers at {path} ({error.strerror}); is it running, under this name?"
        ) from error
    channel = rpc.Channel(stream, _Asker(), f"the donor at {path}")
    answer: R | Exception = TransportError("not asked yet")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, channel)
        try:
            answer = await channel.request(message, reply, timeout_s)
        except Exception as error:  # as it is, not in the nursery's group
            answer = error
        nursery.cancel_scope.cancel()
    if isinstance(answer, Exception):
        raise answer
    return answer


async def _run(channel: rpc.Channel) -> None:
    try:
        await channel.run()
    except ProtocolError:
        pass  # whoever asks is told that the connection broke


class _Asker:
    """The side of a channel that is asked nothing."""

    async def on_request(self, message: Message) -> Message:
        raise ProtocolError(f"this program answers no {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        pass
