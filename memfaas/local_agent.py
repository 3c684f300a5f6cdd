"""Asking the donor of this node over its socket `agent.sock`, without any broker.

Who may is decided by the donor's node: the kernel tells the agent who is at the other end. So there
is no handshake; the connection is a `Channel` from its first byte on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from memfaas import rpc
from memfaas.errors import AccessError, TransportError
from memfaas.messages import Message

SOCKET = "agent.sock"
"""Its name, in the donor's folder (`DonorSettings.home`)."""

R = TypeVar("R", bound=Message)


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[rpc.Channel]:
    """A connection to the agent at this socket. Raises AccessError; TransportError when none answers there."""
    try:
        stream = await trio.open_unix_socket(str(path))
    except PermissionError as error:
        raise AccessError(f"{path}: only the donor's user and root may ask it") from error
    except OSError as error:
        raise TransportError(
            f"no donor answers at {path} ({error.strerror}); does it run, under this name (--node), and with "
            "its sockets in this folder (--runtime-dir)?"
        ) from error
    async with rpc.asking(stream, f"the donor at {path}") as channel:
        yield channel


async def ask(home: Path, message: Message, reply: type[R], timeout_s: float) -> R:
    """One request. Raises the agent's error, DeadlineExceeded, and like `connected`."""
    async with connected(home / SOCKET) as channel:
        return await channel.request(message, reply, timeout_s)
