"""The broker's book: what it knows, how much room donors have, and how leases end."""

from __future__ import annotations

import math
from collections.abc import Callable

from memfaas.messages import Kind, LeaseSpec, StoreSpec
from memfaas.server.records import (
    DONOR_GRACE_S,
    NOWHERE,
    REMEMBER_S,
    Donor,
    Lease,
    Outcome,
    Room,
    Session,
    State,
    Store,
    ToFree,
    ToTell,
    shard_lease,
)


class Book:
    """See `memfaas.server.tables`, of which this is the lowest part."""

    def __init__(self, clock: Callable[[], float], ttl: float, cost: Callable[[Kind, int], int]) -> None:
        self.ttl = ttl
        self.donors: dict[str, Donor] = {}
        self.leases: dict[bytes, Lease] = {}
        self.stores: dict[bytes, Store] = {}
        self.sessions: dict[bytes, Session] = {}
        self.names: dict[tuple[str, str], bytes] = {}
        self._clock = clock
        self._cost = cost
        self._complete_at = clock() + DONOR_GRACE_S
        """From then on, what no donor has shown does not exist."""
        self._ended: set[bytes] = set()
        """Until then: leases of which we know that they are over, because we have ended them."""

    def find_store(self, tenant: str, name: str) -> Store | None:
        identity = self.names.get((tenant, name))
        return None if identity is None else self.stores[identity]

    def being_made(self, store: Store) -> bool:
        return any(self.leases[identity].state is State.GRANTING for identity in store.leases)

    def lost_shards(self, store: Store) -> list[int]:
        return [i for i, identity in enumerate(store.leases) if self.leases[identity].state is State.LOST]

    def _use(self, session: Session, store: Store) -> None:
        session.stores.add(store.spec.store)
        store.sessions.add(session.session)
        store.until = math.inf

    @staticmethod
    def _shard_spec(spec: StoreSpec, shard: int) -> LeaseSpec:
        return LeaseSpec(
            lease=shard_lease(spec.store, shard),
            tenant=spec.tenant,
            kind="shard",
            size=spec.shard_size,
            epoch=1,
            store=spec,
            shard=shard,
        )

    def _begin(self, spec: LeaseSpec, donor: str) -> Lease:
        lease = Lease(spec, self._cost(spec.kind, spec.size), donor, State.GRANTING)
        self.leases[spec.lease] = lease
        self.donors[donor].leases.add(spec.lease)
        return lease

    def _is_over(self, lease: bytes) -> bool:
        return lease in self._ended or any(lease in donor.over for donor in self.donors.values())

    def _end(self, lease: Lease, reason: str) -> Outcome:
        """The lease is over for good."""
        identity = lease.spec.lease
        outcome = self._tell(lease, reason)
        del self.leases[identity]
        if self._clock() < self._complete_at:
            self._ended.add(identity)
        session = self.sessions.get(lease.spec.session)
        if session is not None:
            session.regions.discard(identity)
        donor = self.donors.get(lease.donor)
        if donor is not None:
            donor.leases.discard(identity)
            donor.over[identity] = (lease.cost, self._clock() + REMEMBER_S)
            outcome.free.append(ToFree(donor.name, identity, reason))
        return outcome

    def _tell(self, lease: Lease, reason: str) -> Outcome:
        """Whoever holds the lease learns that it is gone: at once, or else at the next renewal."""
        spec = lease.spec
        users = {spec.session} if spec.store is None else self.stores[spec.store.store].sessions
        outcome = Outcome()
        for user in users:
            session = self.sessions.get(user)
            if session is not None and (spec.store is not None or spec.lease in session.regions):
                session.gone.append(spec.lease)
                outcome.tell.append(ToTell(user, spec.lease, reason))
        return outcome

    def _lose(self, lease: Lease, reason: str) -> Outcome:
        """The lease's memory is gone, or out of reach. A store lives on with what is left of it."""
        if lease.state is State.LOST:
            return Outcome()
        if lease.spec.store is None:
            return self._end(lease, reason)
        lease.state, lease.endpoint, lease.links, lease.until = State.LOST, NOWHERE, {}, math.inf
        outcome = self._tell(lease, reason)
        store = self.stores[lease.spec.store.store]
        if len(self.lost_shards(store)) == len(store.leases):
            outcome += self._end_store(store, f"all of store {store.spec.name!r} is lost: {reason}")
        return outcome

    def _end_store(self, store: Store, reason: str) -> Outcome:
        outcome = Outcome()
        for identity in store.leases:
            outcome += self._end(self.leases[identity], reason)
        for session in store.sessions:
            self.sessions[session].stores.discard(store.spec.store)
        del self.stores[store.spec.store]
        del self.names[store.spec.tenant, store.spec.name]
        return outcome

    # --- room -----------------------------------------------------------------------------------

    def rooms(self) -> list[Room]:
        """What each connected donor could lend now, by its last report and by what was granted since."""
        return [Room(donor.name, self._free(donor)) for donor in self.donors.values() if donor.connected]

    def _free(self, donor: Donor) -> int:
        held = [self.leases[identity] for identity in donor.leases]
        over = sum(cost for cost, _ in donor.over.values())
        taken = sum(lease.cost for lease in held) + over
        unseen = sum(lease.cost for lease in held if lease.state is State.GRANTING)
        memory = donor.memory
        unpopulated = max(0, memory.leased - memory.populated) + unseen
        return max(0, min(memory.offered - taken, memory.available - memory.headroom - unpopulated))
