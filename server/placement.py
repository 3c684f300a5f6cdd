"""Which donors get a store's shards, or a region: a pure function of what each could lend.

A store is spread over as many donors as have room, in shards of equal size, one for each donor
where possible. Small donors do not limit large stores: then large donors get several shards.
Spill donors, which are slow, take part only in what does not fit on the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from memfaas import _native
from memfaas.errors import CapacityError, UsageError
from memfaas.messages import Kind
from memfaas.server.records import Room
from memfaas.units import KIB, format_size

SPAN = 256 * KIB
"""Sizes of shards are multiples of this."""
MAX_SHARDS = 64
_SHARDS_PER_DONOR = 4
"""On average, at most, for the sake of evenness: each shard is a process, and limits the largest block."""
LANDING = 0.05
"""Share of what donors offer that new stores and regions do not get. Leases that must leave a donor find
room there, which they need in a moment."""
_LARGEST = 1 << 50
"""Beyond it sums of sizes are not worth their care."""


def lease_bytes(kind: Kind, size: int) -> int:
    """What a lease of this many usable bytes takes of its donor's memory."""
    data, control = _native.geometry(kind, size)
    return data + control


@dataclass(frozen=True)
class Placement:
    donors: list[str]
    """By shard."""
    shard_size: int


class Placer:
    """Places by a given measure of what a lease takes (`lease_bytes`, or a test's own).

    `landing` is a share, see `LANDING`. Where it is less than what one of the donors has on average, none
    is kept: it would not help a donor that needs all of its memory back.
    """

    def __init__(
        self,
        cost: Callable[[Kind, int], int] = lease_bytes,
        min_shard: int = _native.MIN_SHARD,
        landing: float = LANDING,
    ) -> None:
        self.cost = cost
        self._min_shard = _round_up(min_shard)
        self._landing = landing

    def store(self, size: int, rooms: list[Room]) -> Placement:
        """Raises CapacityError when the store fits nowhere, UsageError for a size that is no size."""
        _check_size("store", size)
        rooms = self.lendable(rooms)
        for among in _fastest_first(rooms):
            placement = self._store(size, among)
            if placement is not None:
                return placement
        largest = self._largest_store(rooms)
        raise CapacityError(
            f"no room for a store of {format_size(size)}; {_offer(rooms)}"
            + (f"; the largest store that fits now has {largest} bytes ({format_size(largest)})" if largest else "")
        )

    def region(self, size: int, rooms: list[Room]) -> str:
        """The donor for a region. Raises like `store`."""
        _check_size("region", size)
        return self.lease("region", size, self.lendable(rooms))

    def lendable(self, rooms: list[Room]) -> list[Room]:
        """The same without the room that is kept for leases that must leave other donors."""
        if self._landing * sum(not room.spill for room in rooms) < 1:
            return rooms
        return [
            room if room.spill else room._replace(free=max(0, room.free - int(self._landing * room.offered)))
            for room in rooms
        ]

    def lease(self, kind: Kind, size: int, rooms: list[Room]) -> str:
        """The donor for a lease that leaves another: the one with the most room of those that least is on its way to.

        Leases leave many donors at the same time when a large job begins, and whoever sent all of them to
        one would have them wait for its link. Raises CapacityError.
        """
        cost = self.cost(kind, size)
        for among in _fastest_first(rooms):
            with_room = [room for room in _roomiest_first(among) if room.free >= cost]
            if with_room:
                return min(with_room, key=lambda room: room.arriving).donor
        raise CapacityError(f"no donor has room for a {kind} of {format_size(size)}; {_offer(rooms)}")

    def _store(self, size: int, rooms: list[Room]) -> Placement | None:
        few, many = self._counts(size, rooms)
        rooms = _roomiest_first(rooms)
        fitting = [placement for shards in few if (placement := self._try(size, shards, rooms))]
        if fitting:  # on the most donors, and then in the fewest shards
            return max(fitting, key=lambda one: (len(set(one.donors)), -len(one.donors)))
        tries = (self._try(size, shards, rooms) for shards in many)
        return next((placement for placement in tries if placement is not None), None)

    def _counts(self, size: int, rooms: list[Room]) -> tuple[range, range]:
        """Numbers of shards: those worth a choice, and those only for want of anything better."""
        smallest = self.cost("shard", self._min_shard)
        with_room = sum(room.free >= smallest for room in rooms)
        worth = max(1, min(MAX_SHARDS, size // self._min_shard, _SHARDS_PER_DONOR * with_room))
        most = max(1, min(MAX_SHARDS, -(-size // self._min_shard)))
        return range(1, worth + 1), range(worth + 1, most + 1)

    def _try(self, size: int, shards: int, rooms: list[Room]) -> Placement | None:
        shard_size = max(self._min_shard, _round_up(-(-size // shards)))
        donors = _spread(shards, self.cost("shard", shard_size), rooms)
        return None if donors is None else Placement(donors, shard_size)

    def _largest_store(self, rooms: list[Room]) -> int:
        """About the largest: by bisection over sizes, for a few numbers of shards."""
        rooms = _roomiest_first(rooms)
        total = sum(room.free for room in rooms)
        best = 0
        for shards in {1, min(MAX_SHARDS, max(1, len(rooms))), MAX_SHARDS}:
            low, high = 0, total // shards // SPAN + 1  # in spans for each shard; `low` fits, `high` does not
            while high - low > 1:
                middle = (low + high) // 2
                fits = _spread(shards, self.cost("shard", middle * SPAN), rooms) is not None
                low, high = (middle, high) if fits else (low, middle)
            if low * SPAN >= self._min_shard:
                best = max(best, low * SPAN * shards)
        return best


def _check_size(what: str, size: int) -> None:
    if size <= 0:
        raise UsageError(f"a {what} needs a size of at least one byte")
    if size > _LARGEST:
        raise CapacityError(f"no room for a {what} of {format_size(size)}; no node ever had so much memory")


def _fastest_first(rooms: list[Room]) -> list[list[Room]]:
    memory = [room for room in rooms if not room.spill]
    return [memory] if len(memory) == len(rooms) else [memory, rooms]


def _roomiest_first(rooms: list[Room]) -> list[Room]:
    """Donors with equal room take turns in an order of chance, or the first would get every small store."""
    return sorted(random.sample(rooms, len(rooms)), key=lambda room: -room.free)


def _round_up(size: int) -> int:
    return -(-size // SPAN) * SPAN


def _spread(shards: int, cost: int, rooms: list[Room]) -> list[str] | None:
    """A donor for each of so many equal leases, as even as their room allows; None when they do not fit.

    The rooms are in the order of `_roomiest_first`.
    """
    chosen: list[str] = []
    held = 0
    while len(chosen) < shards:
        held += 1
        more = [room.donor for room in rooms[: shards - len(chosen)] if room.free >= held * cost]
        if not more:
            return None
        chosen += more
    return chosen


def _offer(rooms: list[Room]) -> str:
    if not rooms:
        return "no donor is connected"
    total, most = sum(room.free for room in rooms), max(room.free for room in rooms)
    donors = "1 donor" if len(rooms) == 1 else f"{len(rooms)} donors"
    return f"{donors} could lend {format_size(total)} in all, {format_size(most)} at most by one"
