"""The broker: knows donors and leases, places, grants, renews, and ends what is not renewed.

`Tables` has the rules, `memfaas.server.sessions` what sessions may ask, `memfaas.server.donors` what
donors may, `Grants` how leases begin, `Courier` what it says by itself; here are the connections, and the
waiting. The broker keeps nothing on disk: for a moment after its start it waits for donors and sessions of
an earlier life, before it says that something does not exist.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from memfaas import auth, rpc
from memfaas.addresses import Address
from memfaas.config import BrokerSettings
from memfaas.errors import MemfaasError, UsageError
from memfaas.messages import DonorReport, HeldLease, Hello, LeaseGone, Register, Registered, short
from memfaas.server import granting, process, usage
from memfaas.server.courier import Courier
from memfaas.server.donors import DonorPeer
from memfaas.server.granting import Grants
from memfaas.server.homecoming import Homecoming
from memfaas.server.lobby import Lobby
from memfaas.server.placement import Placer
from memfaas.server.quotas import Quotas
from memfaas.server.sessions import SessionPeer
from memfaas.server.tables import Tables

SETTLE_S = 1.0
"""After its start, a broker waits this long for signs of an earlier life."""
_LOOK_PAUSE_S = 0.1
"""Something changes all the time in a large cluster, and what ends next is found by going through all leases."""
_STRANGERS = 512

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Broker:
    """Serves connections within `run`."""

    def __init__(self, secret: bytes, ttl: float, placer: Placer | None = None, quotas: Quotas | None = None) -> None:
        self.secret = secret
        self.placer = placer if placer is not None else Placer()
        self.quotas = quotas if quotas is not None else Quotas()
        self.tables = Tables(trio.current_time, ttl, self.placer.cost, self.quotas.standing)
        self.started_at = trio.current_time()
        self.settled_at = self.started_at + SETTLE_S
        self._lobby = Lobby(_STRANGERS)
        self.courier = Courier(self.tables, secret, self.announce, lambda work: self._nursery.start_soon(work))
        self.grants = Grants(self)
        self._changed = trio.Event()
        self._nursery: trio.Nursery

    async def run(self, listeners: list[trio.SocketListener]) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._expire)
            self._nursery.start_soon(Homecoming(self).run)
            await trio.serve_listeners(self._on_connection, listeners)

    # --- connections ----------------------------------------------------------------------------

    async def _on_connection(self, stream: trio.SocketStream) -> None:
        peer = "a stranger"
        try:
            peer = str(stream.socket.getpeername()[0])
            process.notice_dead_peers(stream.socket)
            hello = None
            with self._lobby.stranger(rpc.HANDSHAKE_TIMEOUT_S):
                hello = await rpc.admit(stream, self.secret)
            if hello is not None:
                peer = f"{hello.role} {hello.name} at {peer}"
                await self._serve(stream, hello, peer)
        except (OSError, EOFError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
            logger.debug("%s went before it was admitted: %r", peer, error)
        except MemfaasError as error:
            logger.warning("%s: connection closed: %s", peer, error)
        except Exception:  # a fault in the service of one connection must not end the others
            logger.exception("%s: connection closed", peer)
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream, hello: Hello, peer: str) -> None:
        handler = SessionPeer(self, hello.name) if hello.role == "session" else DonorPeer(self, hello.name)
        handler.channel = rpc.Channel(stream, handler, peer)
        try:
            await handler.channel.run()
        finally:
            handler.ended()

    def session_opened(self, session: bytes, channel: rpc.Channel) -> None:
        """Of several connections of a session the newest counts: the others are half dead."""
        previous = self.courier.sessions.get(session)
        self.courier.sessions[session] = channel
        if previous is not None and previous is not channel:
            self._nursery.start_soon(previous.aclose)

    def session_ended(self, session: bytes, channel: rpc.Channel) -> None:
        if self.courier.sessions.get(session) is channel:
            del self.courier.sessions[session]
            self.tables.disconnect_session(session)

    def donor_opened(self, message: Register, channel: rpc.Channel) -> Registered:
        name = message.donor
        if name in self.courier.donors:
            raise UsageError(f"a donor named {name!r} is connected already; each needs a name of its own")
        self.courier.donors[name] = channel
        outcome = self.tables.register(
            name,
            message.node,
            message.host,
            message.memory,
            message.held,
            message.spill,
            message.arriving,
            message.device,
        )
        logger.info("donor %s at %s: registered, holds %d leases", name, message.host, len(message.held))
        if message.held:
            self.saw_earlier_life()
        drop = [one.lease for one in outcome.free if one.donor == name]
        outcome.free = [one for one in outcome.free if one.donor != name]
        self.courier.in_background(outcome)
        return Registered(drop=drop)

    def donor_ended(self, name: str, channel: rpc.Channel) -> None:
        if self.courier.donors.get(name) is channel:
            logger.info("donor %s: disconnected", name)
            del self.courier.donors[name]
            self.tables.disconnect_donor(name)
            self.announce()

    def donor_reported(self, name: str, report: DonorReport) -> None:
        self.tables.report(name, report)
        self.announce()

    def donor_lost(self, name: str, notice: LeaseGone) -> None:
        level = logging.INFO if notice.moved_to or notice.dropped is not None else logging.WARNING
        logger.log(level, "lease %s: donor %s no longer holds it: %s", short(notice.lease), name, notice.reason)
        self.courier.in_background(self.tables.lost(name, notice))

    def lease_arrived(self, name: str, held: HeldLease) -> None:
        logger.info("lease %s: arrived at donor %s, epoch %d", short(held.spec.lease), name, held.spec.epoch)
        self.courier.in_background(self.tables.arrived(name, held))

    def saw_earlier_life(self) -> None:
        """Somebody knows this broker from before: others will be back soon, too."""
        if trio.current_time() < self.settled_at:
            self.settled_at = self.started_at + granting.RETURN_S

    # --- waiting --------------------------------------------------------------------------------

    @property
    def changed(self) -> trio.Event:
        """Set when something changes next."""
        return self._changed

    def announce(self) -> None:
        """Something changed: whoever waits looks again."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        with trio.move_on_at(deadline):
            while not condition():
                await self._changed.wait()
            return True
        return False

    async def wait_settled(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition, but only while the broker learns what was before it."""
        while not condition() and trio.current_time() < self.settled_at:  # which may be put off meanwhile
            await self.wait_until(condition, self.settled_at)

    async def detached(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does work that must come to its end even when the session that asked for it goes away."""
        return await process.detached(self._nursery, work)

    async def _expire(self) -> None:
        while True:
            changed = self._changed
            with trio.move_on_at(self.tables.next_deadline()) as scope:
                await changed.wait()
            if not scope.cancelled_caught:
                await trio.sleep(_LOOK_PAUSE_S)
                continue
            outcome = self.tables.expire()
            for one in outcome.tell + outcome.free:
                logger.info("lease %s is over: %s", short(one.lease), one.reason)
            self.courier.in_background(outcome)


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{error.strerror}; does a broker run there already? --listen-port chooses another port"
    return error.strerror or str(error)


async def run_broker(settings: BrokerSettings, on_ready: Callable[..., None] = process.announce) -> None:
    """Runs a broker until it is cancelled. `on_ready` gets `address` (as text) once it listens.

    Raises AccessError for the secret file, UsageError for other files, or an address that cannot be listened on.
    """
    secret = auth.read_secret(settings.secret_file)
    process.allow_many_files()
    broker = Broker(secret, settings.lease_ttl, quotas=Quotas.load(settings.tenants_file))
    if settings.usage_file is not None:
        usage.take_up(broker.tables.accounts, settings.usage_file)
    try:
        listeners = await trio.open_tcp_listeners(settings.listen_port, host=settings.listen_host, backlog=4096)
    except OSError as error:
        where = Address(settings.listen_host, settings.listen_port)
        raise UsageError(f"cannot listen on {where}: {_reason(error)}") from error
    address = Address(settings.listen_host, listeners[0].socket.getsockname()[1])
    logger.info("broker: listens on %s, leases live %g s", address, settings.lease_ttl)
    on_ready(role="broker", address=str(address))
    async with trio.open_nursery() as nursery:
        if settings.usage_file is not None:
            nursery.start_soon(usage.keep, broker.tables.accounts, settings.usage_file)
        nursery.start_soon(broker.run, listeners)


def main(settings: BrokerSettings) -> None:
    """`memfaas broker`: runs until SIGTERM or SIGINT."""
    trio.run(process.until_signal, lambda: run_broker(settings))
