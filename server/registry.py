"""Donors come, say what they hold, report, lose leases and go: what that means for the broker's book."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from memfaas.messages import DonorReport, Endpoint, HeldLease, LeaseGone, LeaseSpec, Memory, short
from memfaas.server.moves import Moves
from memfaas.server.records import (
    DONOR_GRACE_S,
    MOVE_MARGIN_S,
    REMEMBER_S,
    Donor,
    Lease,
    Outcome,
    State,
    Store,
    ToDirect,
    ToTell,
    shard_lease,
)


class Registry(Moves):
    """See `memfaas.server.tables`, of which this is a part."""

    def register(
        self,
        name: str,
        node: str,
        host: str,
        memory: Memory,
        held: list[HeldLease],
        spill: bool = False,
        arriving: Iterable[bytes] = (),
        device: str = "",
    ) -> Outcome:
        """A donor connects and says what it holds. `Outcome.free` has what it must drop.

        `arriving`: what it still waits for.
        """
        donor = self.donors.get(name)
        if donor is None:
            donor = self.donors[name] = Donor(name, node, host, memory)
            donor.arriving = self._expected_at(name)
        donor.node, donor.host, donor.memory, donor.spill = node, host, memory, spill
        donor.device = device
        donor.connected, donor.lost_at = True, math.inf
        self.accounts.donor_offers(name, memory.offered)
        identities = {one.spec.lease for one in held}
        donor.over = {lease: past for lease, past in donor.over.items() if lease in identities}
        donor.left &= identities
        outcome = Outcome()
        for one in held:
            outcome += self._show(donor, one)
        for identity in list(donor.leases - identities):
            outcome += self._without_donor(self.leases[identity], f"donor {name} no longer holds it")
        for identity in list(donor.arriving):
            lease = self.leases[identity]
            move = lease.moving
            if identity not in arriving:
                outcome += self._end_move_in_vain(lease, f"donor {name} no longer waits for it")
            elif move is not None:
                move.until = self._clock() + move.timeout + MOVE_MARGIN_S
        return outcome

    def arrived(self, name: str, held: HeldLease) -> Outcome:
        """A donor has all of a lease that another one sent; that one knows it, and frees its own by itself."""
        identity = held.spec.lease
        known = self.leases.get(identity)
        source = None if known is None else self.donors.get(known.donor)
        outcome = self._show(self.donors[name], held)
        if source is not None and identity in source.over:
            source.left.add(identity)
            outcome.free = [one for one in outcome.free if one.donor != source.name]
        return outcome

    def _show(self, donor: Donor, held: HeldLease) -> Outcome:
        """What a donor holds counts, or else it must free it. A copy that is older now is to be freed, too."""
        spec = held.spec
        known = self.leases.get(spec.lease)
        previous = None if known is None else self.donors.get(known.donor)
        was_told_otherwise = known is not None and (
            known.state in (State.LOST, State.DROPPED)
            or (known.state is State.MISSING and known.moving is not None)
            or (previous is not None and previous is not donor)
        )
        lease = self._learn(donor, held)
        if lease is None:
            return self._must_free(donor, spec.lease, self._cost(spec.kind, spec.size), "it is over, or elsewhere")
        outcome = Outcome()
        if previous is not None and previous is not donor:
            outcome += self._must_free(previous, spec.lease, lease.cost, f"it is with donor {donor.name} now")
        if was_told_otherwise:
            for session in self._users(lease):
                session.gone = [one for one in session.gone if one != spec.lease]
                outcome.moved.append(ToDirect(session.session, spec.lease))
        return outcome

    def _learn(self, donor: Donor, held: HeldLease) -> Lease | None:
        """Takes over what a donor holds; None when it must not hold it."""
        spec = held.spec
        lease = self.leases.get(spec.lease)
        if lease is None:
            if self._is_over(spec.lease):
                return None
            lease = self._learn_shard(spec) if spec.store is not None else self._learn_region(spec)
        elif not self._is_newest(lease, donor, spec.epoch):
            return None
        if lease is None or lease.spec.tenant != spec.tenant or lease.cost != self._cost(spec.kind, spec.size):
            return None
        if lease.moving is not None and (spec.epoch >= lease.moving.epoch or lease.moving.donor == donor.name):
            self._end_move(lease)
        self._put(lease, donor)
        lease.state, lease.endpoint = State.HELD, held.endpoint
        lease.spec = msgspec.structs.replace(
            lease.spec,
            epoch=max(lease.spec.epoch, spec.epoch),  # it may have to settle first
            priority=spec.priority,
            borrowed=spec.borrowed,
        )
        if lease.spec.store is not None:
            lease.until = math.inf
        return lease

    @staticmethod
    def _is_newest(lease: Lease, donor: Donor, epoch: int) -> bool:
        match lease.state:
            case State.GRANTING:
                return False
            case State.HELD if lease.donor == donor.name:
                return True
            case State.LOST if lease.donor == donor.name:
                return True
            case State.HELD | State.DROPPED:
                return epoch > lease.spec.epoch
            case State.MISSING | State.LOST:
                return epoch >= lease.spec.epoch

    def _without_donor(self, lease: Lease, reason: str) -> Outcome:
        """The donor itself says that the memory is no more: nothing is left for it to free."""
        if lease.state is State.GRANTING:
            return Outcome()  # the grant is about to fail, and whoever asked for it cleans up
        if lease.moving is None and lease.spec.store is not None and lease.spec.store.on_reclaim == "drop":
            return self._drop(lease, 0, reason)  # how many keys it had, nobody knows
        self._take(lease)
        return self._lose(lease, reason)

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
        store = Store(of, [], until=now + self.ttl, kept_until=now + self.ttl)
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
        self.accounts.donor_offers(name, 0)
        donor.away_since = self._clock()
        donor.lost_at = donor.away_since + DONOR_GRACE_S
        for identity in donor.arriving:
            move = self.leases[identity].moving
            if move is not None:
                move.until = donor.lost_at

    def report(self, name: str, report: DonorReport) -> None:
        donor = self.donors[name]
        donor.memory, donor.reclaimed = report.memory, report.reclaimed
        self.accounts.donor_offers(name, report.memory.offered)
        for identity in donor.leases:
            self.leases[identity].links = report.links.get(identity, {})
            self.accounts.lease_is_populated(identity, report.populated.get(identity, 0))
        for identity in donor.left - report.populated.keys():
            self._has_freed(donor, identity)

    def _has_freed(self, donor: Donor, lease: bytes) -> None:
        donor.over.pop(lease, None)
        donor.left.discard(lease)

    def lost(self, name: str, notice: LeaseGone) -> Outcome:
        """A donor says that it no longer holds a lease, or never got what was to move there."""
        donor = self.donors[name]
        self._has_freed(donor, notice.lease)
        lease = self.leases.get(notice.lease)
        if lease is None:
            return self._learn_loss(notice)
        if notice.lease in donor.leases:
            if notice.dropped is not None and lease.spec.store is not None and lease.state is State.HELD:
                return self._drop(lease, notice.dropped, notice.reason)
            outcome = Outcome()
            if notice.moved_to:
                self._expect(lease, notice.moved_to)
            elif notice.spec is not None:
                outcome += self._end_copy(lease, notice.reason)
            outcome += self._without_donor(lease, notice.reason)
            return outcome
        if notice.lease in donor.arriving:
            return self._end_move_in_vain(lease, notice.reason)
        if notice.spec is not None and lease.state is State.MISSING and notice.spec.epoch >= lease.spec.epoch:
            return self._gone_unseen(lease, notice, notice.spec)
        return Outcome()

    def _learn_loss(self, notice: LeaseGone) -> Outcome:
        """An earlier life of the broker knew the lease; this one hears of it only now that it is over."""
        spec = notice.spec
        if spec is None or self._clock() >= self._complete_at or self._is_over(spec.lease):
            return Outcome()
        if spec.store is not None:
            lease = self._learn_shard(spec)
            return Outcome() if lease is None else self._gone_unseen(lease, notice, spec)
        self._ended.add(spec.lease)
        outcome = Outcome()
        for session in self.sessions.values():
            if spec.lease in session.claimed_regions and session.tenant == spec.tenant:
                session.claimed_regions.discard(spec.lease)
                session.gone.append(spec.lease)
                outcome.tell.append(ToTell(session.session, spec.lease, notice.reason))
        return outcome

    def _gone_unseen(self, lease: Lease, notice: LeaseGone, spec: LeaseSpec) -> Outcome:
        """A lease that no donor has shown, and none will."""
        lease.spec = msgspec.structs.replace(lease.spec, epoch=max(lease.spec.epoch, spec.epoch))
        if notice.dropped is not None and lease.spec.store is not None:
            return self._drop(lease, notice.dropped, notice.reason)
        outcome = self._end_copy(lease, notice.reason)
        outcome += self._without_donor(lease, notice.reason)
        return outcome

    def granted(self, donor: str, lease: bytes, endpoint: Endpoint, memory: Memory) -> bool:
        """The donor serves the lease. False when the lease has ended in the meantime (it is to be freed)."""
        known = self.leases.get(lease)
        if known is None or known.state is not State.GRANTING or known.donor != donor:
            if donor in self.donors:  # it may have said that it was freed before it was made
                self.donors[donor].over.setdefault(lease, (0, self._clock() + REMEMBER_S))
            return False
        known.state, known.endpoint = State.HELD, endpoint
        self.donors[donor].memory = memory
        return True

    def freed(self, name: str, lease: bytes, memory: Memory) -> None:
        donor = self.donors.get(name)
        if donor is not None:
            self._has_freed(donor, lease)
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
        donor.left &= donor.over.keys()
        needed = donor.connected or donor.leases or donor.over or donor.arriving
        if not needed and donor.lost_at == math.inf:
            del self.donors[donor.name]
