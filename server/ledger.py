"""Who owes the node how many bytes, and which leases are about to pay.

Each reclaim owes some bytes, and together they owe what leases take beyond the offer. Whatever makes
leases smaller or the offer larger pays one of them, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import trio

from memfaas.errors import UsageError
from memfaas.messages import FreedBytes, LeaseSpec, Reclaimed, Step
from memfaas.server.victims import Holding, Moved, describe

Doing = Literal["punch", "move", "evict", "grow"]


@dataclass(eq=False)
class Debt:
    """One reclaim under way."""

    holder: str
    asked: int
    left: int
    """Bytes that are still owed."""
    started: float
    deadline_s: float
    steps: list[FreedBytes] = field(default_factory=list)
    tried: set[bytes] = field(default_factory=set)
    """Leases that could not be moved lately."""
    doomed: set[bytes] = field(default_factory=set)
    """Leases that must go at the deadline if nothing else pays."""
    stuck: set[bytes] = field(default_factory=set)
    """Leases that could not even be evicted."""
    ended: trio.Event = field(default_factory=trio.Event)
    seconds: float = 0.0
    inherited: bool = False
    """An earlier agent began it, so that nobody waits for it."""
    _activity: dict[bytes, float] = field(default_factory=dict)

    @property
    def deadline(self) -> float:
        return self.started + self.deadline_s

    def activity(self, holding: Holding) -> float:
        """As it was when this reclaim asked first: for many leases it takes a while to see."""
        lease = holding.spec.lease
        if lease not in self._activity:
            self._activity[lease] = holding.activity()
        return self._activity[lease]

    def pay(self, size: int, how: Step, spec: LeaseSpec | None = None, pause: float = 0.0) -> None:
        """Counts these bytes, which may be more than is left. After the end nothing counts any more."""
        if size <= 0 or self.ended.is_set():
            return
        self.left = max(0, self.left - size)
        self.steps.append(
            FreedBytes(
                how=how,
                size=size,
                seconds=trio.current_time() - self.started,
                lease=spec.lease if spec is not None else b"",
                what=describe(spec) if spec is not None else "",
                pause=pause,
            )
        )

    def withdraw(self, size: int) -> int:
        """The holder needs so much less; returns how much of it was still owed."""
        size = min(size, self.left)
        self.left -= size
        self.asked -= size
        return size

    def end(self) -> None:
        self.seconds = trio.current_time() - self.started
        self.ended.set()

    def result(self, donor: str) -> Reclaimed:
        freed = sum(one.size for one in self.steps if one.seconds <= self.deadline_s)
        return Reclaimed(
            donor=donor,
            asked=self.asked,
            freed=freed,
            seconds=self.seconds,
            in_time=freed >= self.asked,
            steps=self.steps,
        )


@dataclass(eq=False)
class Claim:
    """A lease that something is being done to."""

    holding: Holding
    doing: Doing
    debt: Debt | None
    """Whose reclaim does it."""
    size: int
    """Its bytes when that began; of one that grows, those that it will have."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    moved: Moved | None = None

    @property
    def leaving(self) -> bool:
        return self.doing in ("move", "evict")


class Ledger:
    """The account of one donor. Nothing here waits."""

    def __init__(self, holdings: Callable[[], Iterable[Holding]], nominal: int) -> None:
        self.nominal = nominal
        self.asked: dict[str, int] = {}
        """Bytes that each holder needs: together it may be more than the donor has, for several may need all of it."""
        self.debts: list[Debt] = []
        """The nearest deadline first."""
        self.claims: dict[bytes, Claim] = {}
        self.holdings = holdings

    @property
    def offered(self) -> int:
        return max(0, self.nominal - sum(self.asked.values()))

    def shared(self, holder: str) -> bool:
        """Whether other holders need what this one needs."""
        return holder in self.asked and sum(self.asked.values()) > self.nominal

    def reclaimed(self, holder: str) -> int:
        """Bytes that are not lent because this holder needs them, perhaps for others too."""
        return min(self.asked.get(holder, 0), self.nominal)

    @property
    def used(self) -> int:
        """What leases take. One that is claimed counts as before until the claim is released and paid."""
        loose = sum(one.bytes for one in self.unclaimed())
        return loose + sum(claim.size for claim in self.claims.values())

    def unclaimed(self) -> list[Holding]:
        return [one for one in self.holdings() if one.spec.lease not in self.claims]

    # --- debts ------------------------------------------------------------------------------------

    def borrow(self, holder: str, size: int, deadline_s: float) -> Debt:
        """Lowers the offer; what nobody had leased of it is paid at once.

        What leases take beyond the offer already, though nobody sees to it, is owed from now on, too.
        Raises UsageError.
        """
        if size < 0:
            raise UsageError(f"cannot take back {size} bytes")
        if not 0 <= deadline_s < float("inf"):
            raise UsageError(f"cannot take memory back within {deadline_s} seconds")
        self.settle()
        for debt in self.debts:
            if debt.inherited and debt.holder == holder and debt.deadline > trio.current_time() + deadline_s:
                debt.withdraw(debt.left)  # whoever asks again, and wants it sooner, is owed it now
        before = self.offered
        neglected = max(0, self.used - before) - sum(one.left for one in self.debts)
        if size > 0:
            self.asked[holder] = self.asked.get(holder, 0) + size
        owed = before - self.offered + max(0, neglected)
        debt = Debt(holder=holder, asked=owed, left=owed, started=trio.current_time(), deadline_s=deadline_s)
        self.debts.append(debt)
        self.debts.sort(key=lambda one: one.deadline)
        self.settle()
        return debt

    def inherit(self, due: dict[str, float]) -> list[Debt]:
        """An earlier agent was killed while holders waited for memory, by these deadlines: it is owed to them again.

        What is owed is what leases take beyond the offer. The nearest deadlines were paid first, so it is owed to
        the last ones.
        """
        now = trio.current_time()
        left = self.used - self.offered
        inherited: list[Debt] = []
        for holder, deadline in sorted(due.items(), key=lambda one: one[1], reverse=True):
            size = min(left, self.asked.get(holder, 0))
            if size > 0:
                left -= size
                seconds = max(0.0, deadline - now)
                inherited.append(
                    Debt(holder=holder, asked=size, left=size, started=now, deadline_s=seconds, inherited=True)
                )
        self.debts = inherited[::-1] + self.debts
        return inherited

    def lend(self, holder: str, size: int | None) -> int:
        """The holder needs so many bytes less, or none. Returns by how many the offer is higher then.

        Those that were still owed to this holder are owed no more; but what others need, too, still is.
        """
        before = self.offered
        taken = self.asked.pop(holder, 0)
        if size is not None and size < taken:
            self.asked[holder] = taken - size
        back = lent = self.offered - before
        for debt in reversed(self.debts):
            if debt.holder == holder:
                back -= debt.withdraw(back)
        self.settle()
        return lent

    def end(self, debt: Debt) -> None:
        self.debts.remove(debt)
        debt.end()

    def settle(self) -> None:
        """Leases that became smaller without our doing, and an offer that grew, pay the nearest deadline first."""
        if not self.debts:
            return
        surplus = sum(one.left for one in self.debts) - max(0, self.used - self.offered)
        for debt in self.debts:
            size = min(debt.left, max(0, surplus))
            debt.pay(size, "unlent")
            surplus -= size

    def pay(self, debt: Debt, size: int, how: Step, spec: LeaseSpec, pause: float = 0.0) -> None:
        """What is more than this reclaim needs is for the others; what nobody needs is shown in its own account."""
        own = min(size, debt.left)
        surplus = size - own
        for other in self.debts:
            if other is not debt:
                share = min(other.left, surplus)
                other.pay(share, how, spec, pause)
                surplus -= share
        debt.pay(own + surplus, how, spec, pause)

    # --- claims -----------------------------------------------------------------------------------

    def claim(self, holding: Holding, doing: Doing, debt: Debt | None) -> Claim:
        size = holding.bytes + (holding.punched if doing == "grow" else 0)
        claim = self.claims[holding.spec.lease] = Claim(holding, doing, debt, size)
        return claim

    def release(self, claim: Claim) -> bool:
        """False when another claim has taken its place."""
        lease = claim.holding.spec.lease
        if self.claims.get(lease) is not claim:
            return False
        del self.claims[lease]
        return True

    def leaving(self, debt: Debt) -> int:
        """Bytes of the leases that are leaving for this reclaim."""
        return sum(one.size for one in self.claims.values() if one.debt is debt and one.leaving)

    def need(self, debt: Debt) -> int:
        """Bytes for which nothing is on its way out.

        What leaves by itself counts, what leaves for a reclaim that has ended, and what leaves for one that is due
        earlier and does not need all of it.
        """
        spare = sum(one.bytes for one in self.unclaimed() if one.state in ("moving", "ending"))
        spare += sum(one.size for one in self.claims.values() if one.leaving and one.debt not in self.debts)
        for other in self.debts:
            balance = spare + self.leaving(other) - other.left
            if other is debt:
                return max(0, -balance)
            spare = max(0, balance)
        return 0
