"""Leases as the one sees them who needs their memory back, and which of them leave.

The agent's custody of a lease is a `Holding`, and so is a lease in the simulation of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

from memfaas.messages import LeaseSpec

HoldingState = Literal["arriving", "serving", "moving", "ending"]
"""Another donor sends it to us; it is here; we send it away; it is over and its memory is about to be free."""


@dataclass(frozen=True)
class Moved:
    spill: bool
    """To a spill donor."""
    pause: float
    """Seconds for which the lease was served nowhere."""


class Holding(Protocol):
    """When its memory has been given back, it is none of the donor's holdings any more, or its `bytes` are 0."""

    @property
    def spec(self) -> LeaseSpec: ...

    @property
    def bytes(self) -> int:
        """What it takes of the node, less `punched`."""

    @property
    def punched(self) -> int:
        """Bytes that were punched out of it and that it may not use."""

    @property
    def state(self) -> HoldingState: ...

    def activity(self) -> float:
        """Operations per second lately."""

    async def punch(self, size: int) -> int:
        """Gives free bytes back, `size` at most and more only by the grain of its memory; returns how many.

        The lease stays served. May be cancelled; what was punched by then counts all the same. Raises MemfaasError.
        """

    async def unpunch(self) -> None:
        """Lets it use again what was punched out. Raises MemfaasError."""

    async def move(self, deadline: float) -> Moved:
        """Moves it to another donor; returns when its memory here is free.

        `deadline` is by trio's clock. `evict` may be called meanwhile; once that has returned, this is
        cancelled. Raises MemfaasError when the lease stays here (CapacityError: no donor has room).
        """

    async def evict(self, reason: str) -> int:
        """Gives its memory back at once, whatever state it is in; returns how many keys were dropped by policy.

        Returns when the memory is free, or most of it: to be called again as long as `bytes` are left. Does nothing
        when it is free already. Raises MemfaasError when it cannot.
        """


def may_drop(spec: LeaseSpec) -> bool:
    """Whether its store holds nothing but what its users can make again."""
    return spec.store is not None and spec.store.on_reclaim == "drop"


def describe(spec: LeaseSpec) -> str:
    """Such as `shard 3 of store 'results' of alice`."""
    if spec.store is not None:
        return f"shard {spec.shard} of store {spec.store.name!r} of {spec.tenant}"
    return f"region {spec.lease.hex()[:8]} of {spec.tenant}"


# --- the choice ---------------------------------------------------------------------------------------

Rank = tuple[bool, int, bool]


def rank(spec: LeaseSpec) -> Rank:
    """Leases of lower rank leave first: what is borrowed, of low priority, and may be dropped."""
    return (not spec.borrowed, spec.priority, not may_drop(spec))


def choose(candidates: Iterable[Holding], need: int, order: Callable[[Holding], Any]) -> list[Holding]:
    """The leases that give `need` bytes: first by `order`, then few and small, then the least active.

    All of them when that is not enough. None is among them without which the others would do.
    """
    chosen: list[Holding] = []
    left = need
    for _, group in groupby(sorted(candidates, key=order), order):
        pool = [one for one in group if one.bytes > 0]
        while pool and left > 0:
            victim = _pick(pool, left)
            pool.remove(victim)
            chosen.append(victim)
            left -= victim.bytes
    # A large one that came late may do the work of small ones before it.
    for victim in list(reversed(chosen)):
        if left + victim.bytes <= 0:
            chosen.remove(victim)
            left += victim.bytes
    return chosen


def _pick(pool: list[Holding], need: int) -> Holding:
    """The least active of those of about the best size.

    The best is the smallest that suffices, unless small ones do it together with less waste; of these, the largest.
    """
    enough = [one for one in pool if one.bytes >= need]
    small = [one for one in pool if one.bytes < need]
    smallest = min((one.bytes for one in enough), default=0)
    if enough and (smallest <= 2 * need or sum(one.bytes for one in small) < need):
        alike = [one for one in enough if one.bytes <= 2 * smallest]
    else:
        largest = max(one.bytes for one in small)
        alike = [one for one in small if 2 * one.bytes >= largest]
    return min(alike, key=lambda one: (one.activity(), one.bytes, one.spec.lease))
