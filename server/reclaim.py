"""Taking a donor's memory back by a deadline: which step when.

It knows nothing of processes or pages, only `Holding`s and trio's clock: the donor and the simulation
of a whole cluster run the same code. A lease that must leave is moved away, or dropped if its store
asked for that; when the time comes after which the kernel could not have the bytes by the deadline,
it is evicted, whatever state it is in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import trio

from memfaas.errors import MemfaasError
from memfaas.messages import Reclaimed, Step
from memfaas.server.ledger import Claim, Debt, Ledger
from memfaas.server.schedule import Schedule, loss
from memfaas.server.victims import Holding, HoldingState, choose, describe, may_drop, rank
from memfaas.units import GIB, format_duration, format_size

EVICT_RATE = 3 * GIB
"""Bytes per second that a kernel takes back at least, in 4 KiB pages."""
MOVES_AT_ONCE = 4
"""For one reclaim. More only share the same link."""
_GRAIN_S = 0.005
"""What is to be evicted within so much goes together."""
_REST = 4
"""To look at many leases takes a while. For so many times as long the processor is for those that leave."""
_AGAIN_S = 0.5
"""After a move that failed, before the lease is tried again."""
_EVICT_PAUSES_S = (0.01, 0.1, 1.0)
"""Between attempts to evict a lease."""
_PUNCH_S = 1.0
"""A function that has not begun to punch by then hangs, and is passed over."""

logger = logging.getLogger(__name__)


class Reclaimer:
    """All reclaims of one donor; `run` must be running.

    `holdings` gives every lease that the donor has memory for. `evict_rate` is in bytes per second. `on_change`
    is called when `asked` or `due` has changed, before anything else happens.
    """

    def __init__(
        self,
        donor: str,
        holdings: Callable[[], Iterable[Holding]],
        *,
        nominal: int = 0,
        evict_rate: int = EVICT_RATE,
        moves_at_once: int = MOVES_AT_ONCE,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._donor = donor
        self._holdings = holdings
        self._evict_rate = evict_rate
        self._moves_at_once = moves_at_once
        self._on_change = on_change
        self._ledger = Ledger(holdings, nominal)
        self._woken = trio.Event()
        self._nursery: trio.Nursery

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; reclaims that go on then end with what they have."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    @property
    def nominal(self) -> int:
        """Bytes that the donor lends at most while nobody wants any back."""
        return self._ledger.nominal

    @nominal.setter
    def nominal(self, size: int) -> None:
        self._ledger.nominal = size
        self.changed()

    @property
    def reclaimed(self) -> dict[str, int]:
        """Bytes that are not lent, by who took them back. Several may need the same, so the sum may be more."""
        return {holder: self._ledger.reclaimed(holder) for holder in self._ledger.asked}

    @property
    def asked(self) -> dict[str, int]:
        """Bytes that each of them needs, though it may be more than the donor lends; for `restore`."""
        return dict(self._ledger.asked)

    @property
    def due(self) -> dict[str, float]:
        """By which time (trio's) those are to have it who still wait for some of it; for `restore`."""
        return {debt.holder: debt.deadline for debt in self._ledger.debts if debt.left > 0}

    @property
    def offered(self) -> int:
        """Bytes that the donor lends at most now."""
        return self._ledger.offered

    @property
    def used(self) -> int:
        """Bytes that leases take, or will when what is about to grow has grown; no lease is to be
        granted unless it fits between this and `offered`."""
        return self._ledger.used

    async def reclaim(self, size: int, deadline_s: float, holder: str, *, in_all: bool = False) -> Reclaimed:
        """Lends `size` bytes less from now until `lend(holder)`, and has them free by the deadline.

        More than is offered is taken as all of it, also of what others have taken back, in case they lend it
        first. Returns when it is over; a cancelled caller does not stop it. `in_all`: `size` is what the holder
        needs in all; what it took back before counts. Reclaims that are under way for it, or for others who need
        the same, are waited for. `asked` in the answer is what the donor lends less for it, and what an earlier agent
        left undone, without what the holder lent again meanwhile; `freed` may be more, for leases leave whole.
        Raises UsageError.
        """
        others = list(self._ledger.debts)
        more = max(0, size - self._ledger.asked.get(holder, 0)) if in_all else size
        debt = self._ledger.borrow(holder, more, deadline_s)
        shared = self._ledger.shared(holder)
        earlier = [one for one in others if one.left > 0 and (shared or (in_all and one.holder == holder))]
        self._on_change()
        if any(one.inherited for one in others):
            self._wake()  # it may have nothing left to do
        if debt.left > 0:
            self._nursery.start_soon(self._collect, debt)
            await debt.ended.wait()
        else:
            self._end(debt)
        with trio.move_on_at(debt.deadline):
            for one in earlier:
                await one.ended.wait()
        held = self._ledger.reclaimed(holder)
        result = debt.result(self._donor)
        in_time = result.in_time and all(one.ended.is_set() for one in earlier)
        return msgspec.structs.replace(result, held=held, in_time=in_time, wanted=size, deadline=deadline_s)

    def restore(
        self,
        asked: dict[str, int],
        due: dict[str, float],
        nominal: int,
        on_reclaimed: Callable[[Reclaimed], Awaitable[None]],
    ) -> None:
        """Goes on where an earlier agent of this donor ended, with all leases that it left.

        Who asked for reclaims that go on may be gone, too, so that `on_reclaimed` gets what comes of each.
        """
        self._ledger.asked.update(asked)
        self._ledger.nominal = nominal
        for debt in self._ledger.inherit(due):
            self._nursery.start_soon(self._finish, debt, on_reclaimed)
        self.changed()

    async def _finish(self, debt: Debt, on_reclaimed: Callable[[Reclaimed], Awaitable[None]]) -> None:
        await self._collect(debt)
        if debt.asked > 0:  # nobody else took it over
            await on_reclaimed(debt.result(self._donor))

    def lend(self, holder: str, size: int | None = None) -> int:
        """This holder needs so many bytes less, or none any more. Returns how many more are lent."""
        lent = self._ledger.lend(holder, size)
        self._on_change()
        self.changed()
        return lent

    def evict(self, holding: Holding, reason: str) -> None:
        """Has it give its memory back at once, though nobody waits for that."""
        claim = self._ledger.claims.get(holding.spec.lease)
        if claim is None or claim.doing != "evict":
            nobody = Debt(holder="", asked=0, left=0, started=trio.current_time(), deadline_s=0.0)
            self._start_evicting(nobody, holding, reason)

    def changed(self) -> None:
        """To be called when a lease has come or gone by itself."""
        self._ledger.settle()
        self._grow_back()
        self._wake()

    def _wake(self) -> None:
        self._woken.set()
        self._woken = trio.Event()

    # --- one reclaim --------------------------------------------------------------------------------

    async def _collect(self, debt: Debt) -> None:
        try:
            await self._punch_all(debt)
            while debt.left > 0:
                began, woken = trio.current_time(), self._woken
                look_again = self._take_leases(debt)
                if look_again is None:
                    break
                rest_until = began + (1 + _REST) * (trio.current_time() - began)
                with trio.move_on_at(look_again):
                    await woken.wait()
                    with trio.move_on_at(rest_until):
                        while debt.left > 0:
                            await self._woken.wait()
                self._ledger.settle()
        finally:
            self._end(debt)
        self._on_change()  # one that is cancelled is left to the next agent

    def _end(self, debt: Debt) -> None:
        self._ledger.end(debt)
        self._grow_back()
        done = debt.result(self._donor)
        logger.log(
            logging.INFO if done.in_time else logging.ERROR,
            "donor %s: %s wanted %s within %s: %s came back in time; it took %s",
            self._donor,
            debt.holder,
            format_size(done.asked),
            format_duration(debt.deadline_s),
            format_size(done.freed),
            format_duration(done.seconds),
        )

    def _take_leases(self, debt: Debt) -> float | None:
        """Starts what has to be started now. Returns when to look again; None when nothing can be done."""
        schedule = self._schedule()
        soon = trio.current_time() + _GRAIN_S
        while schedule.doomed(debt) and schedule.evict_at(debt) <= soon:
            reason = "the node needs its memory now, and it could not be moved in time"
            self._start_evicting(debt, schedule.take(debt), reason)
        if schedule.evict_at(debt) > soon and self._start_leaving(debt, schedule):
            schedule = self._schedule()
        if schedule.doomed(debt):
            return schedule.evict_at(debt)
        # What others have claimed, or will evict, may be enough for this one too.
        return math.inf if self._ledger.claims or schedule else None

    def _schedule(self) -> Schedule:
        return Schedule(self._ledger, self._evict_rate)

    # --- free parts of shards -------------------------------------------------------------------------

    async def _punch_all(self, debt: Debt) -> None:
        debts: list[Debt] = []
        evict_at = math.inf
        for holding in sorted(self._ledger.unclaimed(), key=lambda one: rank(one.spec)):
            if holding.state != "serving" or holding.spec.store is None or holding.spec.lease in self._ledger.claims:
                continue
            if debts != self._ledger.debts:  # otherwise it only comes later by what is punched
                debts, evict_at = list(self._ledger.debts), self._schedule().evict_at(debt)
            need = self._ledger.need(debt)
            time = evict_at - trio.current_time()
            if need == 0 or time <= 0:
                break
            # At most half of the time: one that hangs may not cost the others the time to be moved.
            await self._punch(debt, holding, need, min(time / 2, _PUNCH_S + need / self._evict_rate))

    async def _punch(self, debt: Debt, holding: Holding, size: int, patience: float) -> None:
        claim = self._ledger.claim(holding, "punch", debt)
        punched = 0
        try:
            with trio.move_on_after(patience):
                punched = await holding.punch(size)
        except MemfaasError as error:
            logger.warning("nothing could be cut out of %s: %s", describe(holding.spec), error)
        finally:
            if self._ledger.release(claim):
                self._ledger.pay(debt, punched, "punched", holding.spec)
                self._ledger.settle()
            self._wake()

    def _grow_back(self) -> None:
        """Leases get again what was cut out of them, before anybody else gets the room."""
        ledger = self._ledger
        if ledger.debts:
            return
        room = ledger.offered - ledger.used
        punched = [one for one in ledger.unclaimed() if one.punched > 0 and one.state == "serving"]
        for holding in sorted(punched, key=lambda one: rank(one.spec), reverse=True):
            if holding.punched <= room:
                room -= holding.punched
                self._nursery.start_soon(self._unpunch, ledger.claim(holding, "grow", None))

    async def _unpunch(self, claim: Claim) -> None:
        try:
            await claim.holding.unpunch()
        except MemfaasError as error:
            logger.warning("what was cut out of %s stays so: %s", describe(claim.holding.spec), error)
        finally:
            self._ledger.release(claim)
            self._ledger.settle()
            self._wake()

    # --- whole leases, while there is time --------------------------------------------------------------

    def _start_leaving(self, debt: Debt, schedule: Schedule) -> bool:
        """Has victims moved or dropped, as many at the same time as may be. Returns whether any is dropped."""
        able = [
            one
            for one in self._ledger.unclaimed()
            if one.state in ("serving", "arriving") and one.spec.lease not in debt.tried | debt.stuck
        ]
        victims = choose(able, self._ledger.need(debt), loss, debt.activity)
        claims = self._ledger.claims.values()
        moving = sum(claim.debt is debt and claim.doing == "move" for claim in claims)
        going = sum(schedule.seconds(claim.holding) for claim in claims if claim.doing == "evict")
        now, deadline = trio.current_time(), schedule.evict_at(debt)
        dropped = False
        # Large ones first: then the small ones may turn out not to be needed.
        for victim in sorted(victims, key=lambda one: one.bytes, reverse=True):
            if victim.state == "arriving" or may_drop(victim.spec):
                takes = going + schedule.seconds(victim)
                if victim.spec.lease in debt.doomed or schedule.has_time_for(takes, now):
                    reason = "the node needs its memory" if victim.state == "serving" else "the node needs the room"
                    self._start_evicting(debt, victim, reason)
                    going, dropped = takes, True
            elif moving < self._moves_at_once:
                moving += 1
                self._nursery.start_soon(self._move, debt, self._ledger.claim(victim, "move", debt), deadline)
        return dropped

    async def _move(self, debt: Debt, claim: Claim, deadline: float) -> None:
        spec = claim.holding.spec
        try:
            with claim.scope:
                claim.moved = await claim.holding.move(deadline)
        except MemfaasError as error:
            logger.warning("%s stays here for now: %s", describe(spec), error)
            debt.tried.add(spec.lease)
            self._nursery.start_soon(self._try_again, debt, spec.lease)
        finally:
            claim.ended.set()
            if self._ledger.release(claim):
                if claim.moved is not None:
                    self._ledger.pay(debt, claim.size, _how(claim), spec, claim.moved.pause)
                self._ledger.settle()
            self._wake()

    async def _try_again(self, debt: Debt, lease: bytes) -> None:
        """Other donors get room meanwhile, and others are tried instead."""
        await trio.sleep(_AGAIN_S)
        debt.tried.discard(lease)
        self._wake()

    # --- at the deadline --------------------------------------------------------------------------------

    def _start_evicting(self, debt: Debt, holding: Holding, reason: str) -> None:
        before = self._ledger.claims.get(holding.spec.lease)
        claim = self._ledger.claim(holding, "evict", debt)
        self._nursery.start_soon(self._evict, debt, claim, holding.state, before, reason)

    async def _evict(self, debt: Debt, claim: Claim, state: HoldingState, before: Claim | None, reason: str) -> None:
        holding, spec = claim.holding, claim.holding.spec
        how: Step = _how_it_went(claim, state)
        pause = 0.0
        try:
            keys = await self._evict_somehow(holding, reason)
            while holding.bytes > 0:
                self._pay_part(debt, claim, how)
                keys = await self._evict_somehow(holding, reason)
        except MemfaasError as error:
            logger.error("%s could not be evicted: %s", describe(spec), error)
            debt.stuck.add(spec.lease)
            self._ledger.release(claim)
            self._wake()
            return
        if before is not None and before.doing == "move":
            before.scope.cancel()
            await before.ended.wait()
        if before is not None and before.moved is not None:  # it had just made it
            how, pause = _how(before), before.moved.pause
        if how == "lost":
            logger.error("%s is lost: %s", describe(spec), reason)
        elif how == "dropped":
            logger.info("%s is dropped with %d keys: %s", describe(spec), keys, reason)
        if self._ledger.release(claim):
            self._ledger.pay(debt, claim.size, how, spec, pause)
        self._wake()

    async def _evict_somehow(self, holding: Holding, reason: str) -> int:
        """A node that is short of memory may be short of other things, too, but not for long. Raises MemfaasError."""
        for pause_s in _EVICT_PAUSES_S:
            try:
                return await holding.evict(reason)
            except MemfaasError as error:
                logger.warning("%s is not evicted yet: %s", describe(holding.spec), error)
            await trio.sleep(pause_s)
        return await holding.evict(reason)

    def _pay_part(self, debt: Debt, claim: Claim, how: Step) -> None:
        """What of it is free already; the one who waits need not wait for the rest if that is enough."""
        freed = claim.size - claim.holding.bytes
        claim.size -= freed
        self._ledger.pay(debt, freed, how, claim.holding.spec)
        self._wake()


def _how(claim: Claim) -> Step:
    return "spilled" if claim.moved is not None and claim.moved.spill else "migrated"


def _how_it_went(claim: Claim, state: HoldingState) -> Step:
    """A lease that was over, or had not come yet, loses nothing."""
    if state in ("arriving", "ending"):
        return "unlent"
    return "dropped" if may_drop(claim.holding.spec) else "lost"
