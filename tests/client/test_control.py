"""The control connection: against a scripted broker that goes away, comes back, and says no."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio

from memfaas import auth, messages, rpc
from memfaas.addresses import Address
from memfaas.client.control import Control, Holdings
from memfaas.errors import (
    AccessError,
    BrokerUnavailable,
    CapacityError,
    DeadlineExceeded,
    LeaseLost,
    TransportError,
    UnknownStore,
)

SECRET = b"s" * 32
STORE, LEASE = b"S" * 16, b"L" * 16


@dataclass
class Script:
    """A broker that answers as it is told, and notes what it was asked."""

    ttl: float = 30.0
    gone: list[bytes] = field(default_factory=list)
    answers: dict[type[messages.Message], Callable[[], messages.Message]] = field(default_factory=dict)
    asked: list[messages.Message] = field(default_factory=list)
    silent: bool = False
    channel: rpc.Channel | None = None
    secret: bytes = SECRET
    connections: int = 0

    async def on_request(self, message: messages.Message) -> messages.Message:
        self.asked.append(message)
        while self.silent:  # noqa: ASYNC110  # tests set it from outside
            await trio.sleep(0.01)
        if isinstance(message, messages.OpenSession):
            return messages.SessionOpened(session=message.session, ttl=self.ttl)
        if isinstance(message, messages.Renew):
            gone, self.gone = self.gone, []
            return messages.Renewed(ttl=self.ttl, gone=gone)
        return self.answers.get(type(message), messages.Done)()

    def on_notice(self, message: messages.Message) -> None:
        raise AssertionError(message)

    def of(self, kind: type[messages.Message]) -> list[Any]:
        return [message for message in self.asked if isinstance(message, kind)]

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            await rpc.admit(stream, self.secret)
        except (AccessError, EOFError):
            await stream.aclose()
            return
        self.channel = rpc.Channel(stream, self, "the client")
        await self.channel.run()

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[Address]:
        """Within it, the broker is there."""
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self.serve, port, host="127.0.0.1"))
            yield Address("127.0.0.1", listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()


@dataclass
class Holds:
    stores: list[bytes] = field(default_factory=list)
    leases: list[bytes] = field(default_factory=list)
    gone: list[tuple[bytes, str]] = field(default_factory=list)
    dropped: list[tuple[bytes, str]] = field(default_factory=list)
    moved: list[messages.Place] = field(default_factory=list)

    def holdings(self) -> Holdings:
        return Holdings(list(self.stores), list(self.leases))

    def fabrics(self) -> dict[str, int]:
        return {"shm": 2}

    def on_gone(self, lease: bytes, reason: str) -> None:
        self.gone.append((lease, reason))

    def on_dropped(self, lease: bytes, reason: str) -> None:
        self.dropped.append((lease, reason))

    def on_moved(self, place: messages.Place) -> None:
        self.moved.append(place)


@asynccontextmanager
async def connected(address: Address, holds: Holds, *, patient: bool = False) -> AsyncIterator[Control]:
    control = Control(address, auth.Credentials.of_tenant(SECRET, "t"), holds)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(control.run, patient=patient))
        yield control
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of us
            await trio.sleep(0.005)


@pytest.fixture
async def free_port() -> int:
    async with Script().listening() as address:
        return address.port


async def test_a_session_opens_and_renews() -> None:
    script = Script(ttl=0.1)
    async with script.listening() as address, connected(address, Holds()) as control:
        await until(lambda: len(script.of(messages.Renew)) >= 3)
        (opened,) = script.of(messages.OpenSession)
        assert opened.session == control.session
        assert (opened.stores, opened.leases) == ([], [])
        assert script.of(messages.Renew)[0].fabrics == {"shm": 2}


async def test_leases_that_are_gone_are_told() -> None:
    script = Script(ttl=0.1, gone=[LEASE])
    holds = Holds()
    async with script.listening() as address, connected(address, holds):
        await until(lambda: holds.gone)
        assert holds.gone[0][0] == LEASE
        assert script.channel is not None
        await script.channel.notify(messages.LeaseGone(lease=STORE, reason="the donor burned down"))
        await until(lambda: len(holds.gone) == 2)
        assert holds.gone[1] == (STORE, "the donor burned down")


async def test_nobody_there_is_an_error_at_once(free_port: int) -> None:
    with pytest.RaisesGroup(BrokerUnavailable):
        async with connected(Address("127.0.0.1", free_port), Holds()):
            raise AssertionError


async def test_a_wrong_secret_is_an_error_at_once() -> None:
    script = Script(secret=b"x" * 32)
    async with script.listening() as address:
        with pytest.RaisesGroup(AccessError):
            async with connected(address, Holds()):
                raise AssertionError


async def test_what_is_no_broker_is_an_error_at_once() -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, babble, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with pytest.RaisesGroup(TransportError):
            async with connected(Address("127.0.0.1", port), Holds()):
                raise AssertionError
        nursery.cancel_scope.cancel()


async def test_after_a_restart_the_broker_hears_what_is_held() -> None:
    script, holds = Script(), Holds()
    async with script.listening() as address:
        port = address.port
        async with connected(address, holds) as control:
            holds.stores, holds.leases = [STORE], [LEASE]
            assert script.channel is not None
            await script.channel.aclose()
            await until(lambda: len(script.of(messages.OpenSession)) == 2)
            again = script.of(messages.OpenSession)[1]
            assert (again.session, again.stores, again.leases) == (control.session, [STORE], [LEASE])
            assert address.port == port


async def test_a_request_waits_for_the_broker_to_come_back() -> None:
    first, second = Script(), Script()
    async with trio.open_nursery() as nursery:
        async with first.listening() as address:
            control = Control(address, auth.Credentials.of_tenant(SECRET, "t"), Holds())
            await nursery.start(partial(control.run, patient=False))
        results = []

        async def ask() -> None:
            results.append(await control.request(messages.DeleteStore(name="x"), messages.Done, 30))

        nursery.start_soon(ask)
        await trio.sleep(0.1)
        assert results == []
        async with second.listening(address.port):
            await until(lambda: results)
        assert [type(message) for message in second.asked[:1]] == [messages.OpenSession]
        nursery.cancel_scope.cancel()


async def test_a_request_whose_answer_was_lost_is_asked_again() -> None:
    first, second = Script(silent=False), Script()
    async with trio.open_nursery() as nursery:
        async with first.listening() as address:
            control = Control(address, auth.Credentials.of_tenant(SECRET, "t"), Holds())
            await nursery.start(partial(control.run, patient=False))
            await until(lambda: first.of(messages.Renew))
            first.silent = True
            results = []

            async def ask() -> None:
                results.append(await control.request(messages.DeleteStore(name="x"), messages.Done, 30))

            nursery.start_soon(ask)
            await until(lambda: first.of(messages.DeleteStore))
        async with second.listening(address.port):
            await until(lambda: results)
        assert len(second.of(messages.DeleteStore)) == 1
        nursery.cancel_scope.cancel()


async def test_a_request_gives_up_at_its_deadline() -> None:
    script = Script()
    async with trio.open_nursery() as nursery:
        async with script.listening() as address:
            control = Control(address, auth.Credentials.of_tenant(SECRET, "t"), Holds())
            await nursery.start(partial(control.run, patient=False))
            await until(lambda: script.of(messages.Renew))
            script.silent = True
            with pytest.raises(DeadlineExceeded):
                await control.request(messages.Status(), messages.StatusReport, 0.05)
        with pytest.raises(BrokerUnavailable):
            await control.request(messages.Status(), messages.StatusReport, 0.05)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "error", [CapacityError("no room"), UnknownStore("none"), LeaseLost("over"), TransportError("donor d is away")]
)
async def test_the_brokers_errors_are_raised_and_not_asked_again(error: Exception) -> None:
    def refuse() -> messages.Message:
        raise error

    script = Script(answers={messages.OpenStore: refuse})
    async with script.listening() as address, connected(address, Holds()) as control:
        with pytest.raises(type(error), match=str(error)):
            await control.request(messages.OpenStore(name="x", size=None), messages.StoreOpened, 5)
        assert len(script.of(messages.OpenStore)) == 1
        assert script.connections == 1


async def test_what_must_be_asked_once_is_not_asked_again_after_a_break() -> None:
    script = Script(silent=False)
    async with script.listening() as address, connected(address, Holds()) as control:
        request = messages.Reclaim(donor="d", size=1, deadline=1, holder="h")

        def hang_up() -> messages.Message:
            assert script.channel is not None
            trio.lowlevel.spawn_system_task(script.channel.aclose)
            raise TransportError("never sent")

        script.answers[messages.Reclaim] = hang_up
        with pytest.raises(TransportError):
            await control.request(request, messages.Reclaimed, 30, once=True)
        await until(lambda: script.connections == 2)
        assert len(script.of(messages.Reclaim)) == 1


async def test_leases_that_move_end_or_are_dropped_are_told_apart() -> None:
    script, holds = Script(), Holds()
    place = messages.Place(
        lease=LEASE,
        donor="d",
        epoch=2,
        kind="shard",
        size=1,
        endpoint=messages.Endpoint(node="n", unix_path="/x", host="h", port=1),
        ticket=b"t",
        proof_key=b"k",
    )
    async with script.listening() as address, connected(address, holds):
        assert script.channel is not None
        await script.channel.notify(messages.LeaseMoved(place=place))
        await script.channel.notify(messages.LeaseGone(lease=LEASE, reason="a job needs it", dropped=7))
        await script.channel.notify(messages.LeaseGone(lease=LEASE, reason="it is over"))
        await until(lambda: holds.gone)
    assert (holds.moved, holds.dropped, holds.gone) == (
        [place],
        [(LEASE, "a job needs it")],
        [(LEASE, "it is over")],
    )


async def test_a_broker_with_another_secret_is_not_waited_for() -> None:
    first, second = Script(), Script(secret=b"x" * 32)
    async with trio.open_nursery() as nursery:
        async with first.listening() as address:
            control = Control(address, auth.Credentials.of_tenant(SECRET, "t"), Holds())
            await nursery.start(partial(control.run, patient=False))
        async with second.listening(address.port):
            with pytest.raises(AccessError):
                await control.request(messages.Status(), messages.StatusReport, 30)
        nursery.cancel_scope.cancel()


async def test_a_broker_that_hangs_is_taken_for_gone() -> None:
    script = Script(ttl=0.3)
    async with script.listening() as address, connected(address, Holds()):
        await until(lambda: script.of(messages.Renew))
        script.silent = True
        await until(lambda: script.connections >= 2)
        script.silent = False
        count = len(script.of(messages.Renew))
        await until(lambda: len(script.of(messages.Renew)) > count)


async def test_a_patient_session_starts_before_its_broker(free_port: int) -> None:
    script = Script()
    here = Address("127.0.0.1", free_port)
    async with connected(here, Holds(), patient=True) as control, script.listening(free_port):
        await control.request(messages.DeleteStore(name="x"), messages.Done, 30)
        await control.say_goodbye()
        assert script.of(messages.CloseSession)


async def test_a_broker_that_asks_the_client_is_refused() -> None:
    script = Script()
    async with script.listening() as address, connected(address, Holds()):
        assert script.channel is not None
        with pytest.raises(TransportError):
            await script.channel.request(messages.Status(), messages.StatusReport, 5)
