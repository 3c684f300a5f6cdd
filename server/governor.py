"""How much a donor lends while its node's memory goes up and down: down at once, up slowly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memfaas.units import GIB, MIB

CALM_S = 60.0
"""So long nothing is lent again after something was taken back."""
_LONGEST_CALM_S = 3600.0
PAUSE_S = 10.0
"""Between two steps of lending again."""
_SMALLEST_STEP = 64 * MIB
_STEPS = 16
"""It takes about so many steps to lend everything again."""


def margin(headroom: int) -> int:
    """Bytes above the headroom that are restored too, so that the next small program takes nothing back again."""
    return max(64 * MIB, min(GIB, headroom // 4))


@dataclass(frozen=True)
class Reading:
    """A donor's memory at one moment, in bytes."""

    available: int
    """What the node could give to programs."""
    populated: int
    """What leases have taken from it already."""
    offered: int
    """What the donor lends at most."""
    reclaimed: int
    """What it lends less since memory was scarce."""


class Governor:
    """Says how much to take back (negative) or to lend again (positive), in bytes.

    The donor could lend `available + populated - headroom` without ever cutting into the headroom. When
    it offers more, memory is taken back, and the margin with it. It is lent again when that much, and
    the margin, was there all the time for a while, step by step. Who takes back what was just lent waits
    twice as long the next time, of `calm_s` at first (seconds).
    """

    def __init__(self, headroom: int, now: Callable[[], float], *, calm_s: float = CALM_S) -> None:
        self._headroom = headroom
        self._margin = margin(headroom)
        self._now = now
        self._first_calm_s = calm_s
        self._calm_s = calm_s
        self._wait_s = calm_s
        self._since = now()
        self._least: int | None = None
        """The least that could be lent since then."""
        self._lent_at: float | None = None
        """When something was lent again, if nothing was taken back since."""

    def room(self, reading: Reading) -> int:
        """What could be lent without cutting into the headroom, less what is offered."""
        return reading.available + reading.populated - self._headroom - reading.offered

    def decide(self, reading: Reading) -> int:
        room = self.room(reading)
        if room < 0 and reading.offered > 0:
            return -self._take(min(reading.offered, self._margin - room))
        lendable = room + reading.offered
        self._least = lendable if self._least is None else min(self._least, lendable)
        if self._now() - self._since < self._wait_s:
            return 0
        step = min(reading.reclaimed, max(_SMALLEST_STEP, (reading.offered + reading.reclaimed) // _STEPS))
        enough = step > 0 and self._least - self._margin >= reading.offered + step
        if enough:
            self._wait_s = PAUSE_S
            self._lent_at = self._now()
        self._begin()
        return step if enough else 0

    def _take(self, size: int) -> int:
        if self._lent_at is not None:
            soon = self._now() - self._lent_at < _LONGEST_CALM_S
            self._calm_s = min(2 * self._calm_s, _LONGEST_CALM_S) if soon else self._first_calm_s
        self._lent_at = None
        self._wait_s = self._calm_s
        self._begin()
        return size

    def _begin(self) -> None:
        self._since = self._now()
        self._least = None
