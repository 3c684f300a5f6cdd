"""Channels whose two ends are in this process."""

from __future__ import annotations

import logging

import msgpack
import pytest
import trio
import trio.testing

from memfaas import messages, rpc
from memfaas.errors import MemfaasError, ProtocolError

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
