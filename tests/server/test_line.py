"""The donor's line to the broker: what the next registration cannot tell is said after it, however long that takes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from memfaas import rpc
from memfaas.addresses import Address
from memfaas.auth import Credentials
from memfaas.messages import DonorReport, LeaseGone, Memory, Message, Reclaimed, Register, Registered
from memfaas.server import line as lines
from memfaas.server.line import Line
from memfaas.units import MIB
from tests.server.support import SECRET, Served, eventually, serve_broker

MEMORY = Memory(offered=64 * MIB, leased=0, populated=0, available=64 * MIB, headroom=0)


def reclaimed(size: int) -> Reclaimed:
    return Reclaimed(donor="d", asked=size, freed=size, seconds=0.1, in_time=True, steps=[])


class Handler:
    async def on_request(self, message: Message) -> Message:
        raise AssertionError(message)

    def on_notice(self, message: Message) -> None:
        raise AssertionError(message)


async def register(channel: rpc.Channel, host: str) -> None:
    await channel.request(Register(donor="d", node="n", host=host, memory=MEMORY, held=[]), Registered, 5.0)


@asynccontextmanager
async def line_to(served: Served) -> AsyncIterator[Line]:
    line = Line("d", Address("127.0.0.1", served.port), Credentials.of_donor(SECRET, "d"), Handler(), register)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        await eventually(lambda: line.open)
        yield line
        nursery.cancel_scope.cancel()


def counted(served: Served) -> tuple[int, int]:
    """Reclaims of the donor, and bytes."""
    accounts = served.broker.tables.accounts.report(None).donors
    return sum(one.reclaims for one in accounts), sum(one.reclaimed for one in accounts)


async def test_what_was_reclaimed_while_the_broker_was_away_is_said_when_it_is_back(
    served: Served, nursery: trio.Nursery
) -> None:
    async with line_to(served) as line:
        served.kill()
        await eventually(lambda: not line.open)
        await line.say(reclaimed(3 * MIB))
        await line.say(DonorReport(memory=MEMORY, links={}))
        await line.say(LeaseGone(lease=b"L" * 16, reason="evicted"))
        await line.say(reclaimed(5 * MIB))
        again = await serve_broker(nursery, port=served.port)
        await eventually(lambda: counted(again) == (2, 8 * MIB))


async def test_a_connection_that_breaks_while_it_catches_up_loses_nothing(
    served: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(channel: rpc.Channel, message: Message) -> None:
        await trio.sleep_forever()

    async with line_to(served) as line:
        served.kill()
        await eventually(lambda: not line.open)
        await line.say(reclaimed(3 * MIB))
        await line.say(reclaimed(5 * MIB))
        with monkeypatch.context() as patch:
            patch.setattr(rpc.Channel, "notify", stuck)
            second = await serve_broker(nursery, port=served.port)
            await eventually(lambda: line.open)
            second.kill()
            await eventually(lambda: not line.open)
        third = await serve_broker(nursery, port=served.port)
        await eventually(lambda: counted(third) == (2, 8 * MIB))


async def test_a_broker_that_takes_nothing_hears_it_over_the_next_connection(
    served: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold(channel: rpc.Channel, task_status: trio.TaskStatus[None]) -> None:
        async with channel._send_lock:  # as if something was being sent
            task_status.started()
            await said.wait()

    monkeypatch.setattr(lines, "_SAY_S", 0.01)
    said = trio.Event()
    async with line_to(served) as line:
        channel = line._channel
        assert channel is not None
        await nursery.start(hold, channel)
        await line.say(reclaimed(3 * MIB))
        said.set()
        await eventually(lambda: counted(served) == (1, 3 * MIB))
        assert line._channel is not channel
