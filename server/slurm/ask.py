"""A hook's connection to the broker, as its operator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from memfaas import auth, rpc
from memfaas.addresses import Address
from memfaas.errors import BrokerUnavailable

CONTACT_S = 3.0
"""How long to wait for a broker that lets us in: one that hangs does not hold up the job for longer."""


@asynccontextmanager
async def broker(address: Address, credentials: auth.Credentials) -> AsyncIterator[rpc.Channel]:
    """Raises BrokerUnavailable, AccessError, ProtocolError."""
    stream = None
    with trio.move_on_after(CONTACT_S):
        stream = await rpc.dial(address.host, address.port, "session", credentials)
    if stream is None:
        raise BrokerUnavailable(f"the broker at {address.host}:{address.port} let nobody in within {CONTACT_S:g} s")
    async with rpc.asking(stream, "the broker") as channel:
        yield channel
