"""What a function does that waits for a lease from another donor."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, open_stream_to_socket_listener

from memfaas import _native
from memfaas.errors import LeaseLost
from memfaas.messages import LeaseSpec
from memfaas.server.arrival import Arrival
from memfaas.server.doorman import Doorman
from memfaas.testing.lease import make_memory
from memfaas.units import MIB

HOUR_S = 3600.0


@pytest.fixture
def arrival() -> Iterator[Arrival]:
    spec = LeaseSpec(lease=b"L" * 16, tenant="ann", kind="region", size=MIB, epoch=2)
    data, control = make_memory("region", MIB, arriving=True)
    yield Arrival(_native.Memory(data, control), data, Doorman(spec, "d", bytes(32)), spill=False)
    os.close(data)
    os.close(control)


@pytest.mark.parametrize("strangers", [0, 2])
async def test_a_sender_that_does_not_come_soon_is_not_waited_for(
    arrival: Arrival, autojump_clock: MockClock, strangers: int
) -> None:
    """However long the copy itself might take: its node may be dead, and then somebody waits for our word."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    streams = [await open_stream_to_socket_listener(listener) for _ in range(strangers)]
    with pytest.raises(LeaseLost, match="nobody began to send"):
        await arrival.run(listener, HOUR_S)
    assert trio.current_time() < HOUR_S / 60
    for stream in streams:
        await stream.aclose()
