"""The broker's book: what it knows, how much room donors have, and how leases end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec

from memfaas.messages import Kind, LeaseSpec, StoreSpec
from memfaas.server import records
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
from memfaas.server.usage import Accounts

Standing = Callable[[str, int, int], tuple[int, bool]]
"""Of a tenant, the bytes that it has leased and those that it asks for: their priority, and whether they
are beyond its quota."""


def _alike(_tenant: str, _leased: int, _more: int) -> tuple[int, bool]:
    return 0, False


class Book:
    """See `memfaas.server.tables`, of which this is the lowest part."""

    def __init__(
        self,
        clock: Callable[[], float],
        ttl: float,
        cost: Callable[[Kind, int], int],
        standing: Standing = _alike,
    ) -> None:
        self.ttl = ttl
        self.donors: dict[str, Donor] = {}
        self.leases: dict[bytes, Lease] = {}
        self.stores: dict[bytes, Store] = {}
        self.sessions: dict[bytes, Session] = {}
        self.names: dict[tuple[str, str], bytes] = {}
        self._clock = clock
        self._cost = cost
        self._standing = standing
        self.accounts = Accounts(clock, time.time)
        """Who leases how much where."""
        self._complete_at = clock() + DONOR_GRACE_S
        """From then on, what no donor has shown does not exist."""
        self._back_by = clock() + records.RETURN_S
        """By then the donors that an earlier life of the broker knew have shown what they hold, but for those
        that something else befell."""
        self._expected: dict[str, set[bytes]] = {}
        """By donor that is not known: leases that are said to have moved there."""
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
        cost = self._cost(spec.kind, spec.size)
        priority, borrowed = self._standing(spec.tenant, self.accounts.leased(spec.tenant), cost)
        lease = Lease(msgspec.structs.replace(spec, priority=priority, borrowed=borrowed), cost, "", State.GRANTING)
        lease.issued = spec.epoch
        self.leases[spec.lease] = lease
        self._put(lease, self.donors[donor])
        return lease

    # --- where a lease is -----------------------------------------------------------------------

    def _put(self, lease: Lease, donor: Donor) -> None:
        """It is with this donor, and with no other."""
        self._take(lease)
        lease.donor = lease.last = donor.name
        donor.leases.add(lease.spec.lease)
        donor.over.pop(lease.spec.lease, None)
        donor.left.discard(lease.spec.lease)
        self.accounts.lease_is_at(lease.spec.lease, lease.spec.tenant, donor.name, lease.cost)

    def _take(self, lease: Lease) -> Donor | None:
        """It is with no donor; returns the one that it was with."""
        donor = self.donors.get(lease.donor)
        if donor is not None:
            donor.leases.discard(lease.spec.lease)
        lease.donor = ""
        self.accounts.lease_ended(lease.spec.lease)
        return donor

    def _must_free(self, donor: Donor, lease: bytes, cost: int, reason: str) -> Outcome:
        donor.over.setdefault(lease, (cost, self._clock() + REMEMBER_S))
        return Outcome(free=[ToFree(donor.name, lease, reason)])

    def _end_move(self, lease: Lease) -> Donor | None:
        """Nothing is on its way any more; returns the donor to which it was."""
        move, lease.moving = lease.moving, None
        donor = None if move is None else self.donors.get(move.donor)
        if donor is not None:
            donor.arriving.discard(lease.spec.lease)
        return donor

    # --- ends -----------------------------------------------------------------------------------

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
        holder = self.donors.get(lease.donor)
        if holder is not None:
            holder.leases.discard(identity)
        self.accounts.lease_ended(identity)
        for donor in (holder, self._end_move(lease)):
            if donor is not None:
                outcome += self._must_free(donor, identity, lease.cost, reason)
        return outcome

    def _users(self, lease: Lease) -> list[Session]:
        spec = lease.spec
        if spec.store is not None:
            return [self.sessions[user] for user in self.stores[spec.store.store].sessions]
        session = self.sessions.get(spec.session)
        return [session] if session is not None and spec.lease in session.regions else []

    def _tell(self, lease: Lease, reason: str) -> Outcome:
        """Whoever holds the lease learns that it is gone: at once, or else at the next renewal."""
        outcome = Outcome()
        for session in self._users(lease):
            session.gone.append(lease.spec.lease)
            outcome.tell.append(ToTell(session.session, lease.spec.lease, reason))
        return outcome

    def _lose(self, lease: Lease, reason: str) -> Outcome:
        """The lease's memory is gone, or out of reach. A store lives on with what is left of it, if only its name:
        who asks for one of its keys is to hear that it is lost, and not that there never was any."""
        if lease.state is State.LOST:
            return Outcome()
        if lease.moving is not None:  # then perhaps the copy has come: its donor is heard first
            self._take(lease)
            lease.state, lease.endpoint, lease.links = State.MISSING, NOWHERE, {}
            return Outcome()
        if lease.last:
            reason = f"{reason} (it was on donor {lease.last})"
        if lease.spec.store is None:
            return self._end(lease, reason)
        lease.state, lease.endpoint, lease.links, lease.until = State.LOST, NOWHERE, {}, math.inf
        lease.loss = reason
        self.accounts.lease_ended(lease.spec.lease)
        return self._tell(lease, reason)

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
        return [self._room(donor) for donor in self.donors.values() if donor.connected]

    def rooms_for(self, lease: Lease) -> list[Room]:
        """The same, where a copy of this lease could go, or the lease itself if nobody has it."""
        identity = lease.spec.lease
        source = self.donors.get(lease.donor)
        return [
            self._room(donor)
            for donor in self.donors.values()
            if donor.connected
            and donor is not source
            and identity not in donor.over  # it may still have an older copy
            and identity not in donor.arriving
            and not (donor.spill and source is not None and source.spill)
        ]

    def _room(self, donor: Donor) -> Room:
        taken = unseen = arriving = 0
        for identity in donor.leases:
            lease = self.leases[identity]
            taken += lease.cost
            if lease.state is State.GRANTING:
                unseen += lease.cost
        for identity in donor.arriving:
            lease = self.leases[identity]
            arriving += lease.cost
            if lease.moving is not None and not lease.moving.ready:
                unseen += lease.cost
        for cost, _ in donor.over.values():
            taken += cost
        memory = donor.memory
        unpopulated = max(0, memory.leased - memory.populated) + unseen
        free = min(memory.offered - taken - arriving, memory.available - memory.headroom - unpopulated)
        return Room(donor.name, max(0, free), donor.spill, arriving, memory.offered)
