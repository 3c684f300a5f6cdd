"""A hook's connection to the broker: who it is, and where the broker is."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from memfaas import auth, rpc
from memfaas.addresses import Address, parse_address
from memfaas.errors import BrokerUnavailable

CONTACT_S = 3.0
"""How long to wait for a broker that lets us in: one that hangs does not hold up the job for longer."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the broker is, and the file of the secret that lets a hook in."""
    parser.add_argument("--broker", type=parse_address, required=True)
    parser.add_argument("--secret-file", type=Path, required=True)


def read_secret(options: argparse.Namespace) -> bytes:
    """The cluster's secret, by these options. Raises AccessError."""
    return auth.read_secret(options.broker.secret_file or options.secret_file)


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
