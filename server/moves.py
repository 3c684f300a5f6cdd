"""How a lease moves from donor to donor, as the broker sees it: which of its copies counts.

Each copy has an epoch of its own, which the broker gives out, always a new one. The copy of the
highest epoch counts, and it counts only once its donor has said that all of it is there. Until then
nobody but the two donors knows of it, so that the broker may still void it: it gives the old copy an
epoch above the new one's, and whoever shows a lower one later is told to free it.

A donor that is gone may have sent all of a lease before: so what is on its way when its source is
lost counts as MISSING, and as lost only when its target did not get it, or cannot be heard in time.
"""

from __future__ import annotations

import math

import msgspec

from memfaas.errors import LeaseLost, TransportError, UsageError
from memfaas.messages import LeaseSpec, Memory, Settled, short
from memfaas.server.book import Book
from memfaas.server.records import DONOR_GRACE_S, MOVE_MARGIN_S, NOWHERE, Lease, Move, Outcome, State, ToTell

_FORGOTTEN = 1000
"""An earlier life of the broker may have given so many epochs to copies that nobody asks about any more,
because the lease that they are of was dropped. One of them may still come back."""


class Moves(Book):
    """See `memfaas.server.tables`, of which this is a part."""

    def movable(self, source: str, lease: bytes, epoch: int) -> Lease:
        """The lease that this donor has and wants to send. Raises LeaseLost, UsageError."""
        known = self.leases.get(lease)
        if known is None or known.state is not State.HELD or known.donor != source:
            raise LeaseLost(f"lease {short(lease)} is not with donor {source} any more")
        if known.spec.epoch != epoch:
            raise UsageError(f"lease {short(lease)} is at epoch {known.spec.epoch}, not {epoch}: settle it first")
        return known

    def begin_move(self, lease: Lease, target: str, timeout: float) -> tuple[Move, LeaseSpec]:
        """Reserves room for a copy, which the target must then make ready; and what it will be there.

        A move that had begun before is over: its source would not ask for another one otherwise.
        """
        self._end_move(lease)
        move = Move(target, self._next_epoch(lease), timeout, self._clock() + timeout + MOVE_MARGIN_S)
        lease.moving = move
        self.donors[target].arriving.add(lease.spec.lease)
        return move, msgspec.structs.replace(lease.spec, epoch=move.epoch)

    def move_ready(self, lease: Lease, move: Move, memory: Memory) -> bool:
        """The target has memory for it, and waits. False when it need not wait (see `move_over`)."""
        if lease.moving is not move:
            return False
        move.ready, move.until = True, self._clock() + move.timeout + MOVE_MARGIN_S
        self.donors[move.donor].memory = memory
        return True

    def move_over(self, lease: Lease, move: Move, reason: str) -> Outcome:
        """Nothing was sent and nothing will be: the target frees what it may have made."""
        outcome = Outcome()
        if lease.moving is move:
            outcome += self._end_move_in_vain(lease, reason)
        target = self.donors.get(move.donor)
        if target is not None and not {lease.spec.lease} & (target.leases | target.arriving):
            outcome += self._must_free(target, lease.spec.lease, lease.cost, reason)
        return outcome

    def _expect(self, lease: Lease, target: str) -> None:
        """Its source says that it moved there; the target is about to say so, too, or to come back and say so."""
        if lease.moving is not None and lease.moving.donor == target:
            return
        self._end_move(lease)
        donor = self.donors.get(target)
        patience = MOVE_MARGIN_S if donor is not None and donor.connected else DONOR_GRACE_S
        lease.moving = Move(target, self._next_epoch(lease), patience, self._clock() + patience, ready=True)
        if donor is not None:
            donor.arriving.add(lease.spec.lease)
        else:
            self._expected.setdefault(target, set()).add(lease.spec.lease)

    def _expected_at(self, donor: str) -> set[bytes]:
        """What others have said of a donor that was not known: that it has these leases."""
        found = set()
        for identity in self._expected.pop(donor, set()):
            lease = self.leases.get(identity)
            if lease is not None and lease.moving is not None and lease.moving.donor == donor:
                found.add(identity)
        return found

    def _end_copy(self, lease: Lease, reason: str) -> Outcome:
        """What is on its way, if anything is, will never be whole: its target need not wait for it."""
        target = self._end_move(lease)
        return Outcome() if target is None else self._must_free(target, lease.spec.lease, lease.cost, reason)

    def _end_move_in_vain(self, lease: Lease, reason: str) -> Outcome:
        self._end_move(lease)
        return self._lose(lease, reason) if lease.state is State.MISSING else Outcome()

    def settle(self, source: str, lease: bytes, epoch: int, target: str) -> tuple[Settled, Outcome]:
        """Did all of the lease that this donor sent arrive? If not, it never will have.

        Raises LeaseLost, and TransportError while only the target could tell, and may still come.
        """
        known = self.leases.get(lease)
        if known is not None and known.state is State.HELD and known.spec.epoch >= epoch:
            # Either it arrived, or it is with its source again and the answer to that did not get through.
            return Settled(moved=known.donor != source, epoch=known.spec.epoch), Outcome()
        if known is None or known.state is not State.HELD or known.donor != source:
            raise LeaseLost(f"lease {short(lease)} is not with donor {source} any more")
        donor = self.donors.get(target)
        if known.issued < epoch and (donor is None or not donor.connected):
            # It was sent in an earlier life of the broker, and what came of it only the target knows.
            if self._clock() < self._complete_at:
                raise TransportError(f"lease {short(lease)}: donor {target} has not come back yet; ask again")
            raise LeaseLost(f"lease {short(lease)} was sent to donor {target}, which did not come back")
        return self._void(known, epoch, target)

    def _void(self, lease: Lease, epoch: int, target: str) -> tuple[Settled, Outcome]:
        self._end_move(lease)
        lease.issued = max(lease.issued, epoch)
        lease.spec = msgspec.structs.replace(lease.spec, epoch=self._next_epoch(lease))
        donor = self.donors.get(target)
        outcome = Outcome()
        if donor is not None:
            outcome = self._must_free(donor, lease.spec.lease, lease.cost, "it did not arrive in time")
        return Settled(moved=False, epoch=lease.spec.epoch), outcome

    @staticmethod
    def _next_epoch(lease: Lease) -> int:
        lease.issued = max(lease.issued, lease.spec.epoch) + 1
        return lease.issued

    def _expire_moves(self, now: float) -> Outcome:
        outcome = Outcome()
        for lease in [one for one in self.leases.values() if one.moving is not None and one.moving.until <= now]:
            if lease.moving is not None:  # it may have gone with its store
                outcome += self._end_move_in_vain(lease, f"donor {lease.moving.donor} did not say that it arrived")
        return outcome

    # --- what was dropped -----------------------------------------------------------------------

    def _drop(self, lease: Lease, keys: int, reason: str) -> Outcome:
        """Its donor threw the shard away, as its store asked for, or lost it: who wants it next gets it anew, empty.

        Only upon the donor's word. One that is just away may be cut off from us alone: the clients that it still
        serves would not see what others put into a new shard.
        """
        outcome = self._end_copy(lease, reason)
        if lease.spec.store is not None:
            self.stores[lease.spec.store.store].dropped += keys
        self._take(lease)
        lease.state, lease.endpoint, lease.links, lease.until = State.DROPPED, NOWHERE, {}, math.inf
        for session in self._users(lease):
            outcome.tell.append(ToTell(session.session, lease.spec.lease, reason, keys))
        return outcome

    def begin_again(self, lease: Lease, donor: str) -> None:
        """Reserves room for a shard that was dropped; it must then be granted."""
        lease.issued = max(lease.issued, lease.spec.epoch) + _FORGOTTEN
        lease.spec = msgspec.structs.replace(lease.spec, epoch=self._next_epoch(lease))
        lease.state = State.GRANTING
        self._put(lease, self.donors[donor])

    def not_begun_again(self, lease: Lease, reason: str) -> Outcome:
        """It could not be granted, and stays dropped."""
        if lease.state is not State.GRANTING or self.leases.get(lease.spec.lease) is not lease:
            return Outcome()  # it ended meanwhile, with its store
        lease.state = State.DROPPED
        donor = self._take(lease)
        return Outcome() if donor is None else self._must_free(donor, lease.spec.lease, lease.cost, reason)
