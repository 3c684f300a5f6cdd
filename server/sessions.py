"""What a session may ask of the broker. A session sees and touches what belongs to its tenant only."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from memfaas import auth, rpc
from memfaas.errors import ClosedError, MemfaasError, ProtocolError, TransportError, UnknownStore, UsageError
from memfaas.messages import (
    CloseSession,
    CloseStore,
    DeleteStore,
    Done,
    Locate,
    Located,
    Message,
    OpenRegion,
    OpenSession,
    OpenStore,
    Place,
    RegionGranted,
    ReleaseLease,
    Renew,
    Renewed,
    SessionOpened,
    Status,
    StatusReport,
    StoreOpened,
)
from memfaas.server import status
from memfaas.server.records import Lease, State, Store

if TYPE_CHECKING:
    from memfaas.server.broker import Broker

REQUEST_LIMIT_S = 30.0
"""How long a request waits for what another session is making."""
_LONGEST_NAME = 255

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
        }

    async def on_request(self, message: Message) -> Message:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"a session does not ask {type(message).__name__}")
        if self._session not in self._tables.sessions and not isinstance(message, OpenSession | Status):
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
        self._broker.in_background(outcome)
        return SessionOpened(session=self._session, ttl=self._tables.ttl)

    async def _close_session(self, _: CloseSession) -> Done:
        outcome = self._tables.close_session(self._session)
        await self._broker.detached(lambda: self._broker.carry_out(outcome))
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
        places = [self._place(self._tables.leases[lease]) for lease in store.leases]
        return StoreOpened(spec=store.spec, created=created, places=places)

    async def _create(self, message: OpenStore) -> Store | None:
        size = message.size
        if size is None:
            raise UnknownStore(f"there is no store {message.name!r}; one is made when it is opened with a size")
        return await self._broker.detached(
            lambda: self._broker.create_store(self._session, self._tenant, message, size)
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
        await self._broker.detached(lambda: self._broker.carry_out(outcome))
        return Done()

    async def _delete_store(self, message: DeleteStore) -> Done:
        await self._existing(message.name)
        outcome = self._tables.delete_store(self._tenant, message.name)
        logger.info("store %s of %s: deleted", message.name, self._tenant)
        await self._broker.detached(lambda: self._broker.carry_out(outcome))
        return Done()

    # --- leases ---------------------------------------------------------------------------------

    async def _open_region(self, message: OpenRegion) -> RegionGranted:
        lease = await self._broker.detached(
            lambda: self._broker.create_region(self._session, self._tenant, message.size)
        )
        return RegionGranted(place=self._place(self._tables.locate(self._tenant, lease.spec.lease)))

    async def _release_lease(self, message: ReleaseLease) -> Done:
        outcome = self._tables.release(self._session, message.lease)
        await self._broker.detached(lambda: self._broker.carry_out(outcome))
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
        return Located(place=self._place(self._tables.locate(self._tenant, message.lease)))

    def _place(self, lease: Lease) -> Place:
        """With a ticket that is good from now. A shard that nobody holds has neither address nor ticket."""
        spec = lease.spec
        ticket = proof_key = b""
        if lease.state is State.HELD:
            ticket = auth.Ticket(
                tenant=spec.tenant,
                lease=spec.lease,
                epoch=spec.epoch,
                donor=lease.donor,
                expires=time.time() + auth.TICKET_LIFE_S,
                uid=None,
            ).encode()
            proof_key = auth.proof_key(auth.ticket_key(self._broker.secret, lease.donor), ticket)
        return Place(
            lease=spec.lease,
            donor=lease.donor,
            epoch=spec.epoch,
            kind=spec.kind,
            size=spec.size,
            endpoint=lease.endpoint,
            ticket=ticket,
            proof_key=proof_key,
        )

    async def _status(self, _: Status) -> StatusReport:
        tenant = None if self._tenant == auth.OPERATOR else self._tenant
        now = trio.current_time()
        return status.report(self._tables, tenant, now, now - self._broker.started_at)


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise UsageError(f"{name[:40]!r} is not a store's name: 1 to {_LONGEST_NAME} printable characters")
