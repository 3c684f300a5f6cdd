"""Channels whose two ends are in this process."""

from __future__ import annotations

import logging

import msgpack
import pytest
import trio
import trio.testing

from memfaas import messages, rpc
from memfaas.errors import DeadlineExceeded, MemfaasError, ProtocolError

LIMIT_S = 5.0


class Handler:
    """Answers some requests, and has a fault in the others."""

    async def on_request(self, message: messages.Message) -> messages.Message:
        if isinstance(message, messages.Status):
            raise ZeroDivisionError("a fault")
        return messages.Done()

    def on_notice(self, message: messages.Message) -> None:
        raise AssertionError(message)


async def test_a_fault_in_one_request_is_told_to_the_one_who_asked_and_ends_nothing_else(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = trio.testing.memory_stream_pair()
    asking, answering = rpc.Channel(here, Handler(), "answerer"), rpc.Channel(there, Handler(), "asker")
    nursery.start_soon(asking.run)
    nursery.start_soon(answering.run)
    with caplog.at_level(logging.ERROR), pytest.raises(MemfaasError, match="ZeroDivisionError"):
        await asking.request(messages.Status(), messages.StatusReport, LIMIT_S)
    assert "a fault" in caplog.text
    assert await asking.request(messages.AskUsage(), messages.Done, LIMIT_S) == messages.Done()


async def test_a_nonsensical_answer_ends_the_connection_and_the_wait_at_once(nursery: trio.Nursery) -> None:
    here, there = trio.testing.memory_stream_pair()
    asking = rpc.Channel(here, Handler(), "answerer")
    ended = trio.Event()

    async def serve() -> None:
        with pytest.raises(ProtocolError):
            await asking.run()
        ended.set()

    async def answer() -> None:
        await rpc.receive_frame(there)
        await there.send_all(rpc.frame(msgpack.packb([1, 1, b"nonsense"])))

    nursery.start_soon(serve)
    nursery.start_soon(answer)
    with trio.fail_after(LIMIT_S), pytest.raises(MemfaasError, match="broke before the answer"):
        await asking.request(messages.AskUsage(), messages.Done)
    await ended.wait()


class Slow(Handler):
    """Answers nothing, and says when it is told not to."""

    def __init__(self) -> None:
        self.began = trio.Event()
        self.withdrawn = trio.Event()

    async def on_request(self, message: messages.Message) -> messages.Message:
        self.began.set()
        try:
            await trio.sleep_forever()
        finally:
            self.withdrawn.set()


async def channel_to(slow: Slow, nursery: trio.Nursery) -> rpc.Channel:
    here, there = trio.testing.memory_stream_pair()
    asking, answering = rpc.Channel(here, Handler(), "answerer"), rpc.Channel(there, slow, "asker")
    nursery.start_soon(asking.run)
    nursery.start_soon(answering.run)
    return asking


async def test_a_request_that_its_asker_gave_up_is_withdrawn(nursery: trio.Nursery, autojump_clock: object) -> None:
    slow = Slow()
    asking = await channel_to(slow, nursery)
    with pytest.raises(DeadlineExceeded):
        await asking.request(messages.AskUsage(), messages.Done, 1.0, withdraw=True)
    await slow.withdrawn.wait()
    assert not asking.closed


async def test_a_request_whose_asker_was_cancelled_is_withdrawn(nursery: trio.Nursery, autojump_clock: object) -> None:
    slow = Slow()
    asking = await channel_to(slow, nursery)
    with trio.move_on_after(1.0):
        await asking.request(messages.AskUsage(), messages.Done, withdraw=True)
    await slow.withdrawn.wait()
    assert not asking.closed


async def test_what_only_its_asker_does_not_wait_for_goes_on(nursery: trio.Nursery, autojump_clock: object) -> None:
    slow = Slow()
    asking = await channel_to(slow, nursery)
    with pytest.raises(DeadlineExceeded):
        await asking.request(messages.AskUsage(), messages.Done, 1.0)
    await trio.sleep(1.0)
    assert slow.began.is_set()
    assert not slow.withdrawn.is_set()
