"""The broker: knows donors and leases, places, grants, renews, and ends what is not renewed.

`Tables` has the rules, `memfaas.server.sessions` what sessions may ask, `memfaas.server.donors` what
donors may; here are the connections, the grants, and the waiting. The broker keeps nothing on disk:
for a moment after its start it waits for donors and sessions of an earlier life, before it says that
something does not exist.
"""

from __future__ import annotations

import errno
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from memfaas import auth, rpc
from memfaas.addresses import Address
from memfaas.config import BrokerSettings
from memfaas.errors import (
    CapacityError,
    ClosedError,
    LeaseLost,
    MemfaasError,
    TransportError,
    UsageError,
)
from memfaas.messages import (
    DonorReport,
    Free,
    Freed,
    Grant,
    Granted,
    HeldLease,
    Hello,
    LeaseGone,
    LeaseMoved,
    Message,
    OpenStore,
    Register,
    Registered,
    StoreSpec,
)
from memfaas.server import process, usage
from memfaas.server.donors import DonorPeer
from memfaas.server.homecoming import Homecoming
from memfaas.server.lobby import Lobby
from memfaas.server.placement import Placer
from memfaas.server.places import place_of
from memfaas.server.quotas import Quotas
from memfaas.server.records import Lease, Outcome, Room, State, Store, ToDirect, ToFree, ToTell
from memfaas.server.sessions import SessionPeer
from memfaas.server.tables import Tables

GRANT_TIMEOUT_S = 10.0
FREE_TIMEOUT_S = 60.0
"""A donor gives 4 KiB pages back at a few GiB/s, so a large lease takes a while."""
NOTICE_TIMEOUT_S = 5.0
SETTLE_S = 1.0
"""After its start, a broker waits this long for signs of an earlier life."""
RETURN_S = 3.0
"""How long a request waits for donors that are known to be on their way back."""
_LOOK_PAUSE_S = 0.1
"""Something changes all the time in a large cluster, and what ends next is found by going through all leases."""
_GRANT_ROUNDS = 4
_STRANGERS = 512

T = TypeVar("T")
R = TypeVar("R", bound=Message)
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
        self.silent: set[str] = set()
        """Donors that seem to hang: no lease moves there."""
        self._lobby = Lobby(_STRANGERS)
        self._donors: dict[str, rpc.Channel] = {}
        self._sessions: dict[bytes, rpc.Channel] = {}
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
        previous = self._sessions.get(session)
        self._sessions[session] = channel
        if previous is not None and previous is not channel:
            self._nursery.start_soon(previous.aclose)

    def session_ended(self, session: bytes, channel: rpc.Channel) -> None:
        if self._sessions.get(session) is channel:
            del self._sessions[session]
            self.tables.disconnect_session(session)

    def donor_opened(self, message: Register, channel: rpc.Channel) -> Registered:
        name = message.donor
        if name in self._donors:
            raise UsageError(f"a donor named {name!r} is connected already; each needs a name of its own")
        self._donors[name] = channel
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
        self.in_background(outcome)
        return Registered(drop=drop)

    def donor_ended(self, name: str, channel: rpc.Channel) -> None:
        if self._donors.get(name) is channel:
            logger.info("donor %s: disconnected", name)
            del self._donors[name]
            self.tables.disconnect_donor(name)
            self.announce()

    def donor_reported(self, name: str, report: DonorReport) -> None:
        self.tables.report(name, report)
        self.announce()

    def donor_lost(self, name: str, notice: LeaseGone) -> None:
        level = logging.INFO if notice.moved_to or notice.dropped is not None else logging.WARNING
        logger.log(level, "lease %s: donor %s no longer holds it: %s", notice.lease.hex()[:8], name, notice.reason)
        self.in_background(self.tables.lost(name, notice))

    def lease_arrived(self, name: str, held: HeldLease) -> None:
        logger.info("lease %s: arrived at donor %s, epoch %d", held.spec.lease.hex()[:8], name, held.spec.epoch)
        self.in_background(self.tables.arrived(name, held))

    def saw_earlier_life(self) -> None:
        """Somebody knows this broker from before: others will be back soon, too."""
        if trio.current_time() < self.settled_at:
            self.settled_at = self.started_at + RETURN_S

    # --- waiting --------------------------------------------------------------------------------

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
                logger.info("lease %s is over: %s", one.lease.hex()[:8], one.reason)
            self.in_background(outcome)

    # --- granting -------------------------------------------------------------------------------

    async def create_store(self, session: bytes, tenant: str, request: OpenStore, size: int) -> Store | None:
        """A new store with all its shards granted; None when another has begun one of that name, or ended ours.

        Raises CapacityError, TransportError, ClosedError.
        """

        async def begin(excluded: set[str]) -> list[Lease]:
            try:
                placement = await self._place(lambda rooms: self.placer.store(size, rooms), excluded)
            except CapacityError:
                if self.tables.find_store(tenant, request.name) is None:
                    raise
                return []  # the room went to a store of this very name, which another session has begun
            self._check_open(session)
            if self.tables.find_store(tenant, request.name) is not None:
                return []
            spec = StoreSpec(
                store=secrets.token_bytes(16),
                name=request.name,
                tenant=tenant,
                size=placement.shard_size * len(placement.donors),
                shards=len(placement.donors),
                shard_size=placement.shard_size,
                persistent=request.persistent,
                compression=request.compression,
                on_reclaim=request.on_reclaim,
            )
            return self.tables.begin_store(session, spec, placement.donors)

        def undo(leases: list[Lease], reason: str) -> Outcome:
            return self.tables.abandon_store(_store_of(leases), reason)

        leases = await self._begin(begin, undo)
        store = self.tables.stores.get(_store_of(leases)) if leases else None
        if store is None:
            return None
        donors = [lease.donor for lease in leases]
        logger.info("store %s of %s: made, %d shards on %s", request.name, tenant, len(leases), donors)
        self.announce()
        return store

    async def create_region(self, session: bytes, tenant: str, size: int) -> Lease:
        """A new region, granted. Raises like `create_store`."""

        async def begin(excluded: set[str]) -> list[Lease]:
            donor = await self._place(lambda rooms: self.placer.region(size, rooms), excluded)
            self._check_open(session)
            return [self.tables.begin_region(session, tenant, secrets.token_bytes(16), size, donor)]

        def undo(leases: list[Lease], reason: str) -> Outcome:
            return self.tables.abandon_region(leases[0].spec.lease, reason)

        (lease,) = await self._begin(begin, undo)
        logger.info("lease %s of %s: granted on %s", lease.spec.lease.hex()[:8], tenant, lease.donor)
        return lease

    def _check_open(self, session: bytes) -> None:
        if session not in self.tables.sessions:
            raise ClosedError("the session was closed")

    async def regrant(self, lease: Lease) -> None:
        """A shard that was dropped gets memory anew, and is empty. Raises CapacityError, TransportError."""

        async def begin(excluded: set[str]) -> list[Lease]:
            if lease.state is not State.DROPPED:
                return []
            donor = await self.place_lease(lease, excluded)
            if lease.state is not State.DROPPED or self.tables.leases.get(lease.spec.lease) is not lease:
                return []  # somebody was quicker, or its store is over
            self.tables.begin_again(lease, donor)
            return [lease]

        def undo(leases: list[Lease], reason: str) -> Outcome:
            return self.tables.not_begun_again(lease, reason)

        if await self._begin(begin, undo):
            logger.info("lease %s: granted anew on %s", lease.spec.lease.hex()[:8], lease.donor)
            self.announce()

    async def _begin(
        self, begin: Callable[[set[str]], Awaitable[list[Lease]]], undo: Callable[[list[Lease], str], Outcome]
    ) -> list[Lease]:
        """Begins leases, somewhere but on those donors, and has them granted; some times, until that succeeds.

        Nothing is returned when `begin` finds nothing to do. Raises what `begin` does, and what the donors do.
        """
        excluded: set[str] = set()
        failure: MemfaasError | None = None
        for _ in range(_GRANT_ROUNDS):
            leases = await begin(excluded)
            failure = await self._grant(leases, excluded)
            if failure is None:
                return leases
            await self.carry_out(undo(leases, f"it could not be granted: {failure}"))
        assert failure is not None
        raise failure

    async def place_lease(self, lease: Lease, excluded: set[str], until: float = math.inf) -> str:
        """A donor for a lease that nobody has, or for a copy of one. Raises CapacityError."""

        def choose(rooms: list[Room]) -> str:
            return self._choose(lease, rooms)

        return await self._place(
            choose,
            excluded,
            lambda: self.tables.rooms_for(lease),
            until,
        )

    def has_place(self, lease: Lease, excluded: set[str]) -> bool:
        """Whether another donor than those, and than those that have it or get it, has room for it now."""
        try:
            self._choose(lease, [room for room in self.tables.rooms_for(lease) if room.donor not in excluded])
        except CapacityError:
            return False
        return True

    def _choose(self, lease: Lease, rooms: list[Room]) -> str:
        return self.placer.lease(
            lease.spec.kind, lease.spec.size, rooms if lease.donor else self.placer.lendable(rooms)
        )

    async def _place(
        self,
        choose: Callable[[list[Room]], T],
        excluded: set[str],
        rooms: Callable[[], list[Room]] | None = None,
        until: float = math.inf,
    ) -> T:
        """Waits a moment for room while donors are on their way back."""
        limit = min(until, trio.current_time() + RETURN_S)
        rooms = rooms or self.tables.rooms
        while True:
            changed = self._changed
            try:
                return choose([room for room in rooms() if room.donor not in excluded])
            except CapacityError as error:
                failure = error
            with trio.move_on_at(min(limit, self._donors_back_by())) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                left_out = f" (left out, because a grant failed there: {', '.join(excluded)})" if excluded else ""
                raise CapacityError(f"{failure}{left_out}")

    def _donors_back_by(self) -> float:
        away = [donor.away_since + RETURN_S for donor in self.tables.donors.values() if not donor.connected]
        return max([self.settled_at, *away])

    async def _grant(self, leases: list[Lease], excluded: set[str]) -> MemfaasError | None:
        """Asks the donors of all the leases at once; returns one of the failures, if there are any."""
        failures: list[MemfaasError] = []

        async def grant(lease: Lease, donor: str) -> None:
            try:
                granted = await self.ask(donor, Grant(spec=lease.spec), Granted, GRANT_TIMEOUT_S, withdraw=True)
            except MemfaasError as error:
                logger.warning("lease %s: donor %s: %s", lease.spec.lease.hex()[:8], donor, error)
                failures.append(error)
                ended = self.tables.leases.get(lease.spec.lease) is not lease  # which is not the donor's fault
                if not ended and not isinstance(error, CapacityError):  # then its next report says what it has
                    excluded.add(donor)
                return
            if not self.tables.granted(donor, lease.spec.lease, granted.endpoint, granted.memory):
                # Its end was told to the donor perhaps before the donor had begun.
                await self._free(ToFree(donor, lease.spec.lease, "it ended while it was being granted"))
                failures.append(LeaseLost(f"lease {lease.spec.lease.hex()[:8]} ended while it was being granted"))

        async with trio.open_nursery() as nursery:
            for lease in leases:
                nursery.start_soon(grant, lease, lease.donor)
        return failures[0] if failures else None

    async def ask(self, donor: str, message: Message, reply: type[R], timeout_s: float, *, withdraw: bool = False) -> R:
        """Asks a donor. Raises what it answers, TransportError, DeadlineExceeded.

        `withdraw`: it need not do it any more when nobody waits for it.
        """
        channel = self._donors.get(donor)
        if channel is None:
            raise TransportError(f"donor {donor} is not connected")
        return await channel.request(message, reply, timeout_s, withdraw=withdraw)

    # --- ending ---------------------------------------------------------------------------------

    async def carry_out(self, outcome: Outcome) -> None:
        """Says to donors and sessions what has ended or moved. A donor that is away is told when it comes back."""
        async with trio.open_nursery() as nursery:
            for telling in outcome.tell:
                nursery.start_soon(self._tell, telling)
            for directing in outcome.moved:
                nursery.start_soon(self._direct, directing)
            for freeing in outcome.free:
                nursery.start_soon(self._free, freeing)
        self.announce()

    def in_background(self, outcome: Outcome) -> None:
        self._nursery.start_soon(self.carry_out, outcome)

    def distrust(self, donor: str, outcome: Outcome) -> None:
        """It did not answer in time. It is left alone until it has done this, or has come back."""
        self.silent.add(donor)

        async def until_it_answers() -> None:
            await self.carry_out(outcome)
            self.silent.discard(donor)
            self.announce()

        self._nursery.start_soon(until_it_answers)

    async def _tell(self, telling: ToTell) -> None:
        """One that is away hears of it from its next renewal."""
        notice = LeaseGone(lease=telling.lease, reason=telling.reason, dropped=telling.dropped)
        await self._notify(telling.session, notice)

    async def _direct(self, directing: ToDirect) -> None:
        """One that is away asks when it does not find the lease where it was."""
        lease = self.tables.leases.get(directing.lease)
        if lease is not None and lease.state is State.HELD:
            await self._notify(directing.session, LeaseMoved(place=place_of(lease, self.secret)))

    async def _notify(self, session: bytes, notice: Message) -> None:
        channel = self._sessions.get(session)
        if channel is None:
            return
        try:
            with trio.move_on_after(NOTICE_TIMEOUT_S):
                await channel.notify(notice)
        except TransportError:
            pass

    async def _free(self, freeing: ToFree) -> None:
        channel = self._donors.get(freeing.donor)
        if channel is None:
            return
        try:
            freed = await channel.request(Free(lease=freeing.lease, reason=freeing.reason), Freed, FREE_TIMEOUT_S)
        except MemfaasError as error:
            logger.warning("lease %s: donor %s did not free it: %s", freeing.lease.hex()[:8], freeing.donor, error)
            await channel.aclose()  # when it registers again it is told once more
        else:
            self.tables.freed(freeing.donor, freeing.lease, freed.memory)


def _store_of(shards: list[Lease]) -> bytes:
    spec = shards[0].spec.store
    assert spec is not None
    return spec.store


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
