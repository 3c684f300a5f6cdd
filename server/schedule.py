"""What must go for which reclaim, if nothing else pays before its deadline, and when the kernel must begin with it."""

from __future__ import annotations

import math
from collections import deque

from memfaas.server.ledger import Debt, Ledger
from memfaas.server.victims import Holding, Rank, choose, rank

BEGIN_S = 0.02
"""From the decision to evict until the kernel begins to free."""
LEASE_S = 0.003
"""What each lease costs beside its pages, on a busy node: its memory is mapped, marked and cut off, in a thread."""


class Schedule:
    """As things are now: whoever begins with something takes it out. `evict_rate` is in bytes per second."""

    def __init__(self, ledger: Ledger, evict_rate: int) -> None:
        self._debts = list(ledger.debts)
        self._evict_rate = evict_rate
        self._doomed = _doomed(ledger)
        self._seconds = {debt: sum(map(self.seconds, doomed)) for debt, doomed in self._doomed.items()}

    def doomed(self, debt: Debt) -> deque[Holding]:
        """What must go, in this order."""
        return self._doomed[debt]

    def __bool__(self) -> bool:
        """Whether anything must go."""
        return any(self._doomed.values())

    def take(self, debt: Debt) -> Holding:
        """The first of them: it is begun with now."""
        first = self._doomed[debt].popleft()
        self._seconds[debt] -= self.seconds(first)
        return first

    def seconds(self, holding: Holding) -> float:
        """How long the kernel needs for it."""
        return holding.bytes / self._evict_rate + LEASE_S

    def evict_at(self, debt: Debt) -> float:
        """When the first of them must go, so that the kernel has the bytes of the last by the deadline.

        It frees one after the other, so what is due later must not come too late for that either.
        """
        begin = math.inf
        for other in reversed(self._debts):
            begin = min(begin, other.deadline - BEGIN_S) - self._seconds[other]
            if other is debt:
                break
        return begin

    def has_time_for(self, seconds: float, now: float) -> bool:
        """Whether the kernel can do so much else first."""
        return all(now + seconds <= self.evict_at(debt) for debt in self._debts)


def _doomed(ledger: Ledger) -> dict[Debt, deque[Holding]]:
    """Once chosen it stays so as far as it is needed, and nothing is in two lists: the time that the
    kernel needs for it must not grow when there is none left.
    """
    free = {one.spec.lease: one for one in ledger.holdings() if one.bytes > 0}
    coming = {debt: 0 for debt in ledger.debts}
    spare = 0
    for lease, claim in ledger.claims.items():
        if claim.doing == "evict" or (claim.debt is not None and lease not in free):
            if claim.debt in coming:
                coming[claim.debt] += claim.size
            else:  # that reclaim had enough, and has ended
                spare += claim.size
        if claim.doing == "evict":
            free.pop(lease, None)
    doomed: dict[Debt, deque[Holding]] = {}
    for debt in ledger.debts:
        need = debt.left - coming[debt] - spare
        able = [one for lease, one in free.items() if lease not in debt.stuck]
        before = [one for one in able if one.spec.lease in debt.doomed]
        if sum(one.bytes for one in before) >= need:
            able = before
        chosen = choose(able, need, loss, debt.activity)
        doomed[debt] = deque(chosen)
        debt.doomed = {one.spec.lease for one in chosen}
        for one in chosen:
            del free[one.spec.lease]
        spare = max(0, sum(one.bytes for one in chosen) - need)
    return doomed


def loss(holding: Holding) -> tuple[bool, Rank]:
    """Those of which the least is lost come first: nothing of one that is over, or that is still where it came from."""
    return holding.state not in ("arriving", "ending"), rank(holding.spec)
