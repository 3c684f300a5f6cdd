"""What the broker knows: donors, leases, stores and sessions, and every rule about them.

No I/O and no clock of its own, so that all of it can be tested in any order of events. A method
that ends leases returns an `Outcome`: what the broker then has to say to donors and to sessions.
The state is soft. After a restart it is learned again: donors say what they hold, sessions say what
they use. One class, so that a replicated engine could take its place.

What always holds between two calls:

1. Every store has one name within its tenant, and one lease for each of its shards.
2. A region's lease belongs to one session, or waits with a deadline for that session to come back.
3. A store is used by sessions, or is persistent, or waits with a deadline, or is being made.
4. A lease that is over (released, expired, lost) never comes back: its identity is kept with its
   donor until that donor no longer holds it. The one exception is a shard whose donor was away: no
   other copy of it was ever made, so while its store lives it may be found again.
5. Of several copies of a lease, the one of the highest epoch counts (`memfaas.server.moves`).
"""

from __future__ import annotations

import math

from memfaas.errors import AccessError, LeaseLost, TransportError, UnknownStore, UsageError
from memfaas.messages import LeaseSpec, StoreSpec, short
from memfaas.server.records import Lease, Outcome, Session, State, Store, ToTell
from memfaas.server.registry import Registry


class Tables(Registry):
    """See the module. `cost` gives the bytes that a lease of a kind and size takes on a donor."""

    # --- sessions -------------------------------------------------------------------------------

    def open_session(self, session: bytes, tenant: str, stores: list[bytes], regions: list[bytes]) -> Outcome:
        """A session starts, or comes back and says all that it holds. Raises AccessError, UsageError."""
        if len(session) != 16:
            raise UsageError("a session's identity has 16 bytes")
        known = self.sessions.get(session)
        if known is None:
            known = self.sessions[session] = Session(session, tenant, 0.0)
        elif known.tenant != tenant:
            raise AccessError("this session belongs to another tenant")
        known.expires = self._clock() + self.ttl
        known.connected = True
        outcome = Outcome()
        reason = "its session no longer uses it"
        for identity in known.stores - set(stores):
            outcome += self._leave(known, self.stores[identity], reason)
        for identity in known.regions - set(regions):
            outcome += self._end(self.leases[identity], reason)
        known.claimed_stores, known.claimed_regions = set(), set()
        for identity in stores:
            self._claim_store(known, identity)
        for identity in regions:
            self._claim_region(known, identity)
        return outcome

    def _claim_store(self, session: Session, identity: bytes) -> None:
        store = self.stores.get(identity)
        if store is None:
            if self._clock() < self._complete_at:
                session.claimed_stores.add(identity)
        elif store.spec.tenant == session.tenant:
            self._use(session, store)

    def _claim_region(self, session: Session, identity: bytes) -> None:
        lease = self.leases.get(identity)
        if lease is not None and lease.spec.kind == "region" and lease.spec.session == session.session:
            lease.until = math.inf
            session.regions.add(identity)
        elif lease is None and self._clock() < self._complete_at and not self._is_over(identity):
            session.claimed_regions.add(identity)
        else:
            session.gone.append(identity)

    def renew(self, session: bytes, fabrics: dict[str, int]) -> list[bytes]:
        """Prolongs all that the session holds; returns its leases that ended since the last time."""
        known = self.sessions[session]
        now = self._clock()
        known.expires = now + self.ttl
        known.fabrics = fabrics
        if now >= self._complete_at:
            known.gone += known.claimed_regions
            known.claimed_stores, known.claimed_regions = set(), set()
        gone, known.gone = known.gone, []
        return gone

    def disconnect_session(self, session: bytes) -> None:
        if session in self.sessions:
            self.sessions[session].connected = False

    def close_session(self, session: bytes, reason: str = "its session was closed") -> Outcome:
        outcome = self._release_all(self.sessions[session], reason)
        del self.sessions[session]
        return outcome

    def _release_all(self, session: Session, reason: str) -> Outcome:
        outcome = Outcome()
        for identity in list(session.stores):
            outcome += self._leave(session, self.stores[identity], reason)
        for identity in list(session.regions):
            outcome += self._end(self.leases[identity], reason)
        return outcome

    # --- stores ---------------------------------------------------------------------------------

    def use_store(self, session: bytes, store: bytes) -> None:
        self._use(self.sessions[session], self.stores[store])

    def begin_store(self, session: bytes, spec: StoreSpec, donors: list[str]) -> list[Lease]:
        """Reserves a store's leases, one for each shard, on these donors; each must then be granted."""
        store = Store(spec, [])
        self.stores[spec.store] = store
        self.names[spec.tenant, spec.name] = spec.store
        for shard, donor in enumerate(donors):
            lease = self._begin(self._shard_spec(spec, shard), donor)
            store.leases.append(lease.spec.lease)
        self._use(self.sessions[session], store)
        return [self.leases[identity] for identity in store.leases]

    def close_store(self, session: bytes, store: bytes) -> Outcome:
        """The session no longer uses the store. Raises UnknownStore."""
        known = self.sessions[session]
        if store not in known.stores:
            raise UnknownStore(f"this session has no store {short(store)} open")
        return self._leave(known, self.stores[store], "its last session closed the store")

    def _leave(self, session: Session, store: Store, reason: str) -> Outcome:
        session.stores.discard(store.spec.store)
        store.sessions.discard(session.session)
        if store.sessions or store.spec.persistent:
            return Outcome()
        if self._clock() < store.kept_until:
            store.until = store.kept_until
            return Outcome()
        return self._end_store(store, reason)

    def delete_store(self, tenant: str, name: str) -> Outcome:
        """Raises UnknownStore."""
        store = self.find_store(tenant, name)
        if store is None:
            raise UnknownStore(f"there is no store {name!r}")
        return self._end_store(store, f"store {name!r} was deleted")

    def abandon_store(self, store: bytes, reason: str) -> Outcome:
        """A store that could not be made, or not wholly."""
        known = self.stores.get(store)
        return Outcome() if known is None else self._end_store(known, reason)

    # --- leases ---------------------------------------------------------------------------------

    def begin_region(self, session: bytes, tenant: str, lease: bytes, size: int, donor: str) -> Lease:
        """Reserves a region's lease, which must then be granted."""
        spec = LeaseSpec(lease=lease, tenant=tenant, kind="region", size=size, epoch=1, session=session)
        self.sessions[session].regions.add(lease)
        return self._begin(spec, donor)

    def release(self, session: bytes, lease: bytes, reason: str = "it was released") -> Outcome:
        """Raises LeaseLost, AccessError."""
        known = self.leases.get(lease)
        if known is None or known.state is not State.MISSING or lease not in self.sessions[session].regions:
            known = self.locate(self.sessions[session].tenant, lease)
        if known.spec.session != session:
            raise AccessError(f"lease {short(lease)} belongs to a store or to another session")
        return self._end(known, reason)

    def abandon_region(self, lease: bytes, reason: str) -> Outcome:
        known = self.leases.get(lease)
        return Outcome() if known is None else self._end(known, reason)

    def locate(self, tenant: str, lease: bytes) -> Lease:
        """A lease that is held, or a shard that was dropped.

        Raises AccessError, LeaseLost, and TransportError while its donor may still come back.
        """
        known = self.leases.get(lease)
        if known is None:
            if self._clock() < self._complete_at and not self._is_over(lease):
                raise TransportError(f"lease {short(lease)} is not known; the broker has just started, try again")
            raise LeaseLost(f"lease {short(lease)} is over")
        if known.spec.tenant != tenant:
            raise AccessError(f"lease {short(lease)} belongs to another tenant")
        if known.state is State.LOST:
            raise LeaseLost(f"lease {short(lease)} is lost: {known.loss}")
        if known.state is State.MISSING and known.moving is not None:
            raise TransportError(f"lease {short(lease)} is on its way to donor {known.moving.donor}; try again")
        if known.state is State.MISSING:
            raise TransportError(f"lease {short(lease)}: its donor has not come back since the broker started")
        if known.state is State.GRANTING:
            raise TransportError(f"lease {short(lease)} is still being granted; try again")
        return known

    # --- time -----------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `expire` has something to do next."""
        deadlines = [session.expires for session in self.sessions.values()]
        deadlines += [store.until for store in self.stores.values()]
        for donor in self.donors.values():
            deadlines.append(donor.lost_at)
            deadlines += [until for _, until in donor.over.values()]
        leases = self.leases.values()
        deadlines += [lease.until for lease in leases]
        deadlines += [lease.moving.until for lease in leases if lease.moving is not None]
        return min(deadlines, default=math.inf)

    def _is_waiting(self, session: Session) -> bool:
        """Whether the session waits for us to grant what it asked for; that must not end under its hands."""
        leases = [lease for store in session.stores for lease in self.stores[store].leases]
        return any(self.leases[lease].state is State.GRANTING for lease in [*leases, *session.regions])

    def expire(self) -> Outcome:
        """Ends all whose time is over."""
        now = self._clock()
        outcome = Outcome()
        if now >= self._complete_at:
            self._ended.clear()
        for session in [s for s in self.sessions.values() if s.expires <= now]:
            reason = f"its session was not renewed for {self.ttl:g} s"
            if session.connected and self._is_waiting(session):
                session.expires = now + self.ttl
            elif session.connected:  # it hears of it, and may go on with what it asks for from now on
                for identity in session.stores:
                    for lease_of in self.stores[identity].leases:
                        session.gone.append(lease_of)
                        outcome.tell.append(ToTell(session.session, lease_of, reason))
                outcome += self._release_all(session, reason)
                session.expires = now + self.ttl
            else:
                outcome += self.close_session(session.session, reason)
        for store in [s for s in self.stores.values() if s.until <= now]:
            store.until = math.inf
            if not store.spec.persistent:
                outcome += self._end_store(store, "no session uses it")
        outcome += self._expire_moves(now)
        for donor in [d for d in self.donors.values() if d.lost_at <= now]:
            outcome += self._lose_donor(donor)
        for lease in [one for one in self.leases.values() if one.until <= now]:
            if lease.spec.lease not in self.leases:
                continue  # it went with its store
            if lease.spec.store is None:
                outcome += self._end(lease, "no session claims it")
            else:
                outcome += self._lose(lease, "its donor did not come back")
        for donor in list(self.donors.values()):
            self._forget(donor, now)
        return outcome
