"""Donors come, say what they hold, report, lose leases and go: what that means for the broker's book."""

from __future__ import annotations

import math

import msgspec

from memfaas.messages import Endpoint, HeldLease, LeaseSpec, Memory
from memfaas.server.book import Book
from memfaas.server.records import (
    DONOR_GRACE_S,
    REMEMBER_S,
    Donor,
    Lease,
    Outcome,
    State,
    Store,
    ToFree,
    shard_lease,
    short,
)


class Holdings(Book):
    """See `memfaas.server.tables`, of which this is a part."""

    def register(self, name: str, node: str, host: str, memory: Memory, held: list[HeldLease]) -> Outcome:
        """A donor connects and says what it holds. `Outcome.free` has what it must drop."""
        donor = self.donors.get(name)
        if donor is None:
            donor = self.donors[name] = Donor(name, node, host, memory)
        donor.node, donor.host, donor.memory = node, host, memory
        donor.connected, donor.lost_at = True, math.inf
        now = self._clock()
        identities = {one.spec.lease for one in held}
        donor.over = {lease: past for lease, past in donor.over.items() if lease in identities}
        outcome = Outcome()
        for one in held:
            if not self._learn(donor, one):
                donor.over.setdefault(one.spec.lease, (self._cost(one.spec.kind, one.spec.size), now + REMEMBER_S))
                outcome.free.append(ToFree(name, one.spec.lease, "it is over"))
        for identity in list(donor.leases - identities):
            lease = self.leases[identity]
            outcome += self._without_donor(lease, f"donor {name} no longer holds it")
        return outcome

    def _without_donor(self, lease: Lease, reason: str) -> Outcome:
        """The donor itself says that the memory is no more: nothing is left for it to free."""
        if lease.state is State.GRANTING:
            return Outcome()  # the grant is about to fail, and whoever asked for it cleans up
        donor = self.donors[lease.donor]
        donor.leases.discard(lease.spec.lease)
        lease.donor = ""
        return self._lose(lease, reason)

    def _learn(self, donor: Donor, held: HeldLease) -> bool:
        """Takes over what a donor holds; False when it must not hold it."""
        spec = held.spec
        lease = self.leases.get(spec.lease)
        if lease is None:
            if self._is_over(spec.lease):
                return False
            lease = self._learn_shard(spec) if spec.store is not None else self._learn_region(spec)
        elif lease.state is State.GRANTING or (lease.state is State.HELD and lease.donor != donor.name):
            return False
        if lease is None or lease.spec.tenant != spec.tenant or lease.cost != self._cost(spec.kind, spec.size):
            return False
        previous = self.donors.get(lease.donor)
        if previous is not None:
            previous.leases.discard(spec.lease)
        lease.donor, lease.state, lease.endpoint = donor.name, State.HELD, held.endpoint
        if lease.spec.store is not None:
            lease.until = math.inf
        donor.leases.add(spec.lease)
        return True

    def _learn_region(self, spec: LeaseSpec) -> Lease:
        lease = Lease(spec, self._cost(spec.kind, spec.size), "", State.MISSING, until=self._clock() + self.ttl)
        self.leases[spec.lease] = lease
        session = self.sessions.get(spec.session)
        if session is not None and session.tenant == spec.tenant and spec.lease in session.claimed_regions:
            session.claimed_regions.discard(spec.lease)
            session.regions.add(spec.lease)
            lease.until = math.inf
        return lease

    def _learn_shard(self, spec: LeaseSpec) -> Lease | None:
        """A shard of a store that was not known: so the whole store is learned."""
        of = spec.store
        if (
            of is None
            or of.store in self.stores
            or not 0 <= spec.shard < of.shards
            or spec.lease != shard_lease(of.store, spec.shard)
        ):
            return None
        now = self._clock()
        name = of.name
        while (of.tenant, name) in self.names:
            # Another was made under its name while its donors were away. Nothing is thrown away for that.
            name = f"{name}~{short(of.store)}"
        of = msgspec.structs.replace(of, name=name)
        store = Store(of, [], until=now + self.ttl)
        self.stores[of.store] = store
        self.names[of.tenant, name] = of.store
        for shard in range(of.shards):
            part = self._shard_spec(of, shard)
            self.leases[part.lease] = Lease(
                part, self._cost("shard", of.shard_size), "", State.MISSING, until=now + DONOR_GRACE_S
            )
            store.leases.append(part.lease)
        for session in self.sessions.values():
            if of.store in session.claimed_stores and session.tenant == of.tenant:
                session.claimed_stores.discard(of.store)
                self._use(session, store)
        return self.leases[spec.lease]

    def disconnect_donor(self, name: str) -> None:
        donor = self.donors.get(name)
        if donor is None:
            return
        donor.connected = False
        donor.away_since = self._clock()
        donor.lost_at = donor.away_since + DONOR_GRACE_S
        if not donor.leases and not donor.over:
            del self.donors[name]

    def report(self, name: str, memory: Memory, links: dict[bytes, dict[str, int]]) -> None:
        donor = self.donors[name]
        donor.memory = memory
        for identity in donor.leases:
            self.leases[identity].links = links.get(identity, {})

    def lost(self, name: str, lease: bytes, reason: str) -> Outcome:
        """A donor says that it no longer holds a lease."""
        donor = self.donors[name]
        donor.over.pop(lease, None)
        if lease not in donor.leases:
            return Outcome()
        return self._without_donor(self.leases[lease], reason)

    def granted(self, donor: str, lease: bytes, endpoint: Endpoint, memory: Memory) -> bool:
        """The donor serves the lease. False when the lease has ended in the meantime (it is to be freed)."""
        known = self.leases.get(lease)
        if known is None or known.state is not State.GRANTING:
            if donor in self.donors:  # it may have said that it was freed before it was made
                self.donors[donor].over.setdefault(lease, (0, self._clock() + REMEMBER_S))
            return False
        known.state, known.endpoint = State.HELD, endpoint
        self.donors[known.donor].memory = memory
        return True

    def freed(self, name: str, lease: bytes, memory: Memory) -> None:
        donor = self.donors.get(name)
        if donor is not None:
            donor.over.pop(lease, None)
            donor.memory = memory

    def _lose_donor(self, donor: Donor) -> Outcome:
        outcome = Outcome()
        donor.lost_at = math.inf
        for identity in list(donor.leases):
            lease = self.leases.get(identity)  # it may have gone with its store
            if lease is not None and lease.state is not State.GRANTING:
                outcome += self._lose(lease, f"donor {donor.name} is gone")
        return outcome

    def _forget(self, donor: Donor, now: float) -> None:
        donor.over = {lease: past for lease, past in donor.over.items() if past[1] > now}
        if not donor.connected and donor.lost_at == math.inf and not donor.leases and not donor.over:
            del self.donors[donor.name]
