"""A hook's requests: to the broker as its operator, or to the donor's agent on the same node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from memfaas import auth, rpc
from memfaas.addresses import Address
from memfaas.errors import BrokerUnavailable, ProtocolError, TransportError
from memfaas.messages import Message

CONTACT_S = 3.0
"""How long to wait for a broker that lets us in: one that hangs does not hold up the job for longer."""


class _Asker:
    """The side of a channel that is asked nothing."""

    async def on_request(self, message: Message) -> Message:
        raise ProtocolError(f"a hook of Slurm answers no {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        pass


@asynccontextmanager
async def broker(address: Address, credentials: auth.Credentials) -> AsyncIterator[rpc.Channel]:
    """A connection to the broker. Raises BrokerUnavailable, AccessError, ProtocolError."""
    stream = None
    with trio.move_on_after(CONTACT_S):
        stream = await rpc.dial(address.host, address.port, "session", credentials)
    if stream is None:
        raise BrokerUnavailable(f"the broker at {address.host}:{address.port} let nobody in within {CONTACT_S:g} s")
    async with _channel(stream, "the broker") as channel:
        yield channel


@asynccontextmanager
async def agent(socket: Path) -> AsyncIterator[rpc.Channel]:
    """A connection to the donor's agent on this node. Raises TransportError."""
    try:
        stream = await trio.open_unix_socket(str(socket))
    except OSError as error:
        raise TransportError(f"no donor answers at {socket} ({error.strerror})") from error
    async with _channel(stream, "the donor") as channel:
        yield channel


@asynccontextmanager
async def _channel(stream: trio.abc.Stream, peer: str) -> AsyncIterator[rpc.Channel]:
    channel = rpc.Channel(stream, _Asker(), peer)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            try:
                await channel.run()
            except ProtocolError:
                pass  # whoever asks is told that the connection broke

        nursery.start_soon(run)
        try:
            yield channel
        except Exception as error:  # as it is, not in the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
