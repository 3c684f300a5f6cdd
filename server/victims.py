"""Leases as the one sees them who needs their memory back, and which of them leave.

The agent's custody of a lease is a `Holding`, and so is a lease in the simulation of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby
from typing import Any, Literal, Protocol

from memfaas.messages import LeaseSpec, short

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
    return f"region {short(spec.lease)} of {spec.tenant}"


# --- the choice ---------------------------------------------------------------------------------------

Rank = tuple[bool, int, bool]


def rank(spec: LeaseSpec) -> Rank:
    """Leases of lower rank leave first: what is borrowed, of low priority, and may be dropped."""
    return (not spec.borrowed, spec.priority, not may_drop(spec))


def choose(
    candidates: Iterable[Holding], need: int, order: Callable[[Holding], Any], activity: Callable[[Holding], float]
) -> list[Holding]:
    """The leases that give `need` bytes: first by `order`, then few and small, then the least active.

    All of them when that is not enough. None is among them without which the others would do.
    """
    chosen: list[Holding] = []
    left = need
    for _, group in groupby(sorted(candidates, key=order), order):
        for victim in _pick([one for one in group if one.bytes > 0], left, activity):
            chosen.append(victim)
            left -= victim.bytes
    # A large one that came late may do the work of small ones before it.
    needed: list[Holding] = []
    for victim in reversed(chosen):
        if left + victim.bytes <= 0:
            left += victim.bytes
        else:
            needed.append(victim)
    return needed[::-1]


def _pick(pool: list[Holding], need: int, activity: Callable[[Holding], float]) -> Iterator[Holding]:
    """One after the other, the least active of those of about the best size, until they give `need` bytes.

    The best is the smallest that suffices, unless small ones do it together with less waste; of these, the largest.
    """
    pool = sorted(pool, key=lambda one: one.bytes)
    picked: set[bytes] = set()
    alike: list[tuple[float, int, bytes, int]] = []  # a heap of small ones, from `begin` on
    begin = end = len(pool)  # before `end` none suffices; from there on all do, or are picked
    enough: Holding | None = None
    small = sum(one.bytes for one in pool)
    while need > 0:
        while end > 0 and ((last := pool[end - 1]).bytes >= need or last.spec.lease in picked):
            end -= 1
            if last.spec.lease not in picked:
                enough = last
                small -= last.bytes
        if enough is not None and (enough.bytes <= 2 * need or small < need):
            most = 2 * enough.bytes
            suffice = (one for one in pool[end:] if one.bytes <= most and one.spec.lease not in picked)
            yield min(suffice, key=lambda one: (activity(one), one.bytes, one.spec.lease))
            return
        if end == 0:
            return
        largest = pool[end - 1].bytes
        begin = min(begin, end)
        while begin > 0 and 2 * (one := pool[begin - 1]).bytes >= largest:
            begin -= 1
            heappush(alike, (activity(one), one.bytes, one.spec.lease, begin))
        while (index := heappop(alike)[-1]) >= end:
            pass  # it suffices by now
        victim = pool[index]
        picked.add(victim.spec.lease)
        small -= victim.bytes
        need -= victim.bytes
        yield victim
