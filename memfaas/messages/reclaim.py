"""Taking memory back: an operator and the broker, the broker and a donor, a program and the donor of its node."""

from __future__ import annotations

from typing import Literal

from memfaas.messages.wire import Done, Message, Struct
from memfaas.units import GIB

LONGEST_DEADLINE_S = 86_400.0
"""Of a reclaim. What waits for it counts in nanoseconds, or asks the kernel to wait, and either has an end."""
_RECLAIM_MARGIN_S = 5.0
_SLOWEST_FREE = GIB
"""Bytes per second: memory in 4 KiB pages comes back some times faster than that."""
_LONGEST_FREE_S = 60.0

Step = Literal["unlent", "punched", "migrated", "spilled", "dropped", "lost"]
"""How bytes came back: nobody had leased them; free parts of a shard were cut out of it; a whole lease
was moved to another donor, or to a spill donor; it was dropped, as its store asked for; or it was lost."""


class FreedBytes(Struct, frozen=True, kw_only=True):
    """One part of the memory that a reclaim gave back."""

    how: Step
    size: int
    seconds: float
    """From the request until the kernel had it."""
    lease: bytes = b""
    what: str = ""
    """Which shard of which store, or whose region; empty for memory that nobody had leased."""
    pause: float = 0.0
    """Seconds for which a lease that moved served nobody."""


class Reclaimed(Message, frozen=True, kw_only=True):
    """What a reclaim gave back. Complete: the memory is free in the kernel, whatever became of the leases."""

    donor: str
    asked: int
    """Bytes."""
    freed: int
    """Bytes by the deadline."""
    seconds: float
    in_time: bool
    steps: list[FreedBytes]
    held: int = 0
    """Bytes that this holder has taken back in all now."""
    wanted: int = 0
    """Bytes that the request named; more than `asked` when the donor did not lend so much, or when
    (`in_all`) part of it had been taken back before."""
    deadline: float = 0.0
    """Seconds, as in the request."""


class Reclaim(Message, frozen=True, kw_only=True):
    """An operator to the broker, the broker to a donor, or a program on a donor's node to the donor:
    lend so much less, from now until `Lend` with the same `holder`, and have it free by the deadline."""

    donor: str
    size: int
    """At most what the donor lends; more is taken as all of it."""
    deadline: float
    """Seconds from now; more than a day is taken as a day."""
    holder: str
    """Who needs the memory, such as `job 17`."""
    in_all: bool = False
    """`size` is what this holder needs in all: what it took back before counts. Otherwise it is added."""

    @property
    def patience(self) -> float:
        """Seconds to wait for the answer. At the deadline the memory goes, which takes time itself."""
        freeing = min(self.size / _SLOWEST_FREE, _LONGEST_FREE_S)
        return min(self.deadline, LONGEST_DEADLINE_S) + _RECLAIM_MARGIN_S + freeing


class Lend(Message, frozen=True, kw_only=True):
    """The same three: what this holder took back may be lent again. Nothing happens if it took nothing."""

    donor: str
    holder: str


class Lent(Done, frozen=True, kw_only=True):
    """Reply of `Lend`: done, and how much it was."""

    size: int
    """Bytes that are lent again; 0 when this holder had taken nothing."""
