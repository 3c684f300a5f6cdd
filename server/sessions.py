"""What a session may ask of the broker. A session sees and touches what belongs to its tenant only."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from memfaas import auth, rpc
from memfaas.errors import (
    AccessError,
    ClosedError,
    MemfaasError,
    ProtocolError,
    TransportError,
    UnknownStore,
    UsageError,
)
from memfaas.messages import (
    AskUsage,
    CloseSession,
    CloseStore,
    DeleteStore,
    Done,
    Lend,
    Lent,
    Locate,
    Located,
    Message,
    OpenRegion,
    OpenSession,
    OpenStore,
    Place,
    Reclaim,
    Reclaimed,
    RegionGranted,
    ReleaseLease,
    Renew,
    Renewed,
    SessionOpened,
    Status,
    StatusReport,
    StoreOpened,
    UsageReport,
)
from memfaas.server import status
from memfaas.server.places import place_of
from memfaas.server.records import Lease, State, Store

if TYPE_CHECKING:
    from memfaas.server.broker import Broker

REQUEST_LIMIT_S = 30.0
"""How long a request waits for what another session is making."""
ARRIVAL_S = 3.0
"""How long a request waits for a lease that is on its way to another donor."""
_ANSWER_S = 5.0
"""How much longer than its deadline a reclaim's answer may take."""
_NAMED = 5
"""How many donors a refusal names."""
_LONGEST_NAME = 255

_WITHOUT_SESSION = Status | Reclaim | Lend | AskUsage

R = TypeVar("R", bound=Message)
logger = logging.getLogger(__name__)


class SessionPeer:
    """One connection of a session."""

    channel: rpc.Channel

    def __init__(self, broker: Broker, tenant: str) -> None:
        self._broker = broker
        self._tables = broker.tables
        self._tenant = tenant
        self._session = b""
        self._handlers: dict[type[Message], Callable[[Any], Awaitable[Message]]] = {
            OpenSession: self._open_session,
            CloseSession: self._close_session,
            Renew: self._renew,
            OpenStore: self._open_store,
            CloseStore: self._close_store,
            DeleteStore: self._delete_store,
            OpenRegion: self._open_region,
            ReleaseLease: self._release_lease,
            Locate: self._locate,
            Status: self._status,
            Reclaim: self._reclaim,
            Lend: self._lend,
            AskUsage: self._usage,
        }

    async def on_request(self, message: Message) -> Message:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"a session does not ask {type(message).__name__}")
        if self._session not in self._tables.sessions and not isinstance(message, OpenSession | _WITHOUT_SESSION):
            raise UsageError("no session is open on this connection")
        return await handler(message)

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"a session does not say {type(message).__name__}")

    def ended(self) -> None:
        self._broker.session_ended(self._session, self.channel)

    # --- the session itself ---------------------------------------------------------------------

    async def _open_session(self, message: OpenSession) -> SessionOpened:
        if self._session not in (b"", message.session):
            raise UsageError("another session is open on this connection")
        outcome = self._tables.open_session(message.session, self._tenant, message.stores, message.leases)
        self._session = message.session
        self._broker.session_opened(self._session, self.channel)
        if message.stores or message.leases:
            self._broker.saw_earlier_life()
        self._broker.courier.in_background(outcome)
        return SessionOpened(session=self._session, ttl=self._tables.ttl)

    async def _close_session(self, _: CloseSession) -> Done:
        outcome = self._tables.close_session(self._session)
        await self._broker.detached(lambda: self._broker.courier.carry_out(outcome))
        return Done()

    async def _renew(self, message: Renew) -> Renewed:
        return Renewed(ttl=self._tables.ttl, gone=self._tables.renew(self._session, message.fabrics))

    # --- stores ---------------------------------------------------------------------------------

    async def _open_store(self, message: OpenStore) -> StoreOpened:
        _check_name(message.name)
        store, created = await self._existing(message.name), False
        while store is None:
            store, created = await self._create(message), True
            if store is None or store.spec.store not in self._tables.stores:
                store, created = await self._existing(message.name), False
        if self._session not in self._tables.sessions:
            raise ClosedError("the session was closed")
        self._tables.use_store(self._session, store.spec.store)
        await self._refill(store)
        places = [self._place(self._tables.leases[lease]) for lease in store.leases]
        return StoreOpened(spec=store.spec, created=created, places=places)

    async def _refill(self, store: Store) -> None:
        """Shards that were dropped are made anew, where there is room; the others are, when somebody wants them."""

        async def regrant(lease: Lease) -> None:
            try:
                await self._broker.detached(lambda: self._broker.grants.regrant(lease))
            except MemfaasError as error:
                logger.warning("store %s of %s: a shard stays dropped: %s", store.spec.name, store.spec.tenant, error)

        async with trio.open_nursery() as nursery:
            for identity in store.leases:
                if self._tables.leases[identity].state is State.DROPPED:
                    nursery.start_soon(regrant, self._tables.leases[identity])

    async def _create(self, message: OpenStore) -> Store | None:
        size = message.size
        if size is None:
            raise UnknownStore(f"there is no store {message.name!r}; one is made when it is opened with a size")
        return await self._broker.detached(
            lambda: self._broker.grants.new_store(self._session, self._tenant, message, size)
        )

    async def _existing(self, name: str) -> Store | None:
        """The store of that name, once it is clear that there is one and where its shards are."""

        def find() -> Store | None:
            return self._tables.find_store(self._tenant, name)

        def made() -> bool:
            store = find()
            return store is None or not self._tables.being_made(store)

        def complete() -> bool:
            store = find()
            return store is not None and not any(
                self._tables.leases[lease].state is State.MISSING for lease in store.leases
            )

        await self._broker.wait_settled(complete)
        if not await self._broker.wait_until(made, trio.current_time() + REQUEST_LIMIT_S):
            raise TransportError(f"store {name!r} is still being made; try again")
        return find()

    async def _close_store(self, message: CloseStore) -> Done:
        outcome = self._tables.close_store(self._session, message.store)
        await self._broker.detached(lambda: self._broker.courier.carry_out(outcome))
        return Done()

    async def _delete_store(self, message: DeleteStore) -> Done:
        await self._existing(message.name)
        outcome = self._tables.delete_store(self._tenant, message.name)
        logger.info("store %s of %s: deleted", message.name, self._tenant)
        await self._broker.detached(lambda: self._broker.courier.carry_out(outcome))
        return Done()

    # --- leases ---------------------------------------------------------------------------------

    async def _open_region(self, message: OpenRegion) -> RegionGranted:
        lease = await self._broker.detached(
            lambda: self._broker.grants.new_region(self._session, self._tenant, message.size)
        )
        return RegionGranted(place=self._place(self._tables.locate(self._tenant, lease.spec.lease)))

    async def _release_lease(self, message: ReleaseLease) -> Done:
        outcome = self._tables.release(self._session, message.lease)
        await self._broker.detached(lambda: self._broker.courier.carry_out(outcome))
        return Done()

    async def _locate(self, message: Locate) -> Located:
        def known() -> bool:
            try:
                self._tables.locate(self._tenant, message.lease)
            except TransportError:
                return False
            except MemfaasError:
                return True
            return True

        await self._broker.wait_settled(known)
        lease = self._tables.leases.get(message.lease)
        if lease is not None and lease.spec.tenant == self._tenant:
            await self._obtain(lease)
        return Located(place=self._place(self._tables.locate(self._tenant, message.lease)))

    async def _obtain(self, lease: Lease) -> None:
        """What was dropped is granted anew; what is on its way somewhere is waited for, for a moment."""
        if lease.state is State.DROPPED:
            await self._broker.detached(lambda: self._broker.grants.regrant(lease))

        def here() -> bool:
            return lease.state is not State.GRANTING and (lease.state is not State.MISSING or lease.moving is None)

        await self._broker.wait_until(here, trio.current_time() + ARRIVAL_S)

    def _place(self, lease: Lease) -> Place:
        return place_of(lease, self._broker.secret)

    # --- what concerns the cluster --------------------------------------------------------------

    async def _reclaim(self, message: Reclaim) -> Reclaimed:
        self._check_operator(message)
        if message.size <= 0:
            raise UsageError("the size of what is to be taken back must be at least 1 byte")
        if not 0 <= message.deadline < math.inf:
            raise UsageError("the deadline must not be negative, and must be finite")
        logger.info("donor %s: %s takes back %d bytes", message.donor, message.holder, message.size)
        reclaimed = await self._ask_donor(message.donor, message, Reclaimed, message.patience)
        self._tables.accounts.donor_reclaimed(message.donor, reclaimed.freed, reclaimed.in_time)
        return reclaimed

    async def _lend(self, message: Lend) -> Lent:
        self._check_operator(message)
        return await self._ask_donor(message.donor, message, Lent, _ANSWER_S)

    async def _usage(self, _: AskUsage) -> UsageReport:
        return self._tables.accounts.report(None if self._tenant == auth.OPERATOR else self._tenant)

    def _check_operator(self, message: Message) -> None:
        if self._tenant != auth.OPERATOR:
            raise AccessError(f"only tenant {auth.OPERATOR!r} may ask {type(message).__name__}, not {self._tenant!r}")

    async def _ask_donor(self, donor: str, message: Message, reply: type[R], timeout_s: float) -> R:
        known = self._tables.donors
        await self._broker.wait_settled(lambda: donor in known)
        if donor not in known:
            raise UsageError(f"there is no donor {donor!r}; there are {_some(known)}")
        if not known[donor].connected:
            there = [name for name in known if known[name].connected]
            raise TransportError(f"donor {donor} is not connected; connected are {_some(there)}")
        return await self._broker.courier.ask(donor, message, reply, timeout_s, withdraw=True)

    async def _status(self, _: Status) -> StatusReport:
        tenant = None if self._tenant == auth.OPERATOR else self._tenant
        now = trio.current_time()
        return status.report(self._tables, self._broker.quotas, tenant, now, now - self._broker.started_at)


def _some(names: Collection[str]) -> str:
    """A few of these. Slurm's hook asks for thousands of nodes that lend nothing, so this must not look at all."""
    few = ", ".join(sorted(islice(names, _NAMED))) or "none"
    return f"{few} and {len(names) - _NAMED} more" if len(names) > _NAMED else few


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise UsageError(f"{name[:40]!r} is not a store's name: 1 to {_LONGEST_NAME} printable characters")
