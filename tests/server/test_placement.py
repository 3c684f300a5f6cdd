"""Where stores and regions go."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfaas.errors import CapacityError, UsageError
from memfaas.messages import Kind
from memfaas.server.placement import MAX_SHARDS, SPAN, Placer
from memfaas.server.records import Room
from memfaas.units import GIB, MIB

MIN_SHARD = 4 * MIB


def cost(kind: Kind, size: int) -> int:
    """Rounded up to pages of 2 MiB, and a first page more: like the real one."""
    return -(-size // (2 * MIB)) * 2 * MIB + (2 * MIB if kind == "shard" else 0)


placer = Placer(cost, MIN_SHARD)


def rooms(*sizes: int) -> list[Room]:
    return [Room(f"d{i}", size) for i, size in enumerate(sizes)]


def test_one_shard_for_each_donor_with_room() -> None:
    placement = placer.store(300 * MIB, rooms(GIB, GIB, 0, GIB, 2 * MIB))
    assert sorted(placement.donors) == ["d0", "d1", "d3"]
    assert placement.shard_size == 100 * MIB


def test_a_small_store_has_few_shards() -> None:
    assert len(placer.store(1, rooms(GIB, GIB, GIB)).donors) == 1
    assert placer.store(1, rooms(GIB)).shard_size == MIN_SHARD
    assert len(placer.store(2 * MIN_SHARD, rooms(GIB, GIB, GIB)).donors) == 2


def test_a_large_donor_gets_several_shards_when_small_ones_cannot_keep_up() -> None:
    placement = placer.store(900 * MIB, rooms(GIB, 150 * MIB))
    shares = Counter(placement.donors)
    assert len(placement.donors) * placement.shard_size >= 900 * MIB
    assert shares["d0"] > shares["d1"] > 0


def test_a_store_that_fits_only_in_more_shards_than_it_needs_gets_them() -> None:
    assert sorted(placer.store(MIN_SHARD + 1, rooms(6 * MIB, 6 * MIB)).donors) == ["d0", "d1"]


def test_small_stores_take_turns_on_equal_donors() -> None:
    used = Counter(placer.store(1, rooms(GIB, GIB, GIB, GIB)).donors[0] for _ in range(200))
    assert len(used) == 4


def test_a_region_goes_where_most_room_is() -> None:
    assert placer.region(10 * MIB, rooms(20 * MIB, 40 * MIB, 30 * MIB)) == "d1"


def test_a_lease_goes_where_the_least_is_on_its_way_to_among_those_with_room() -> None:
    busy = Room("busy", 40 * MIB, arriving=20 * MIB)
    assert placer.lease("shard", 10 * MIB, [busy, *rooms(20 * MIB, 30 * MIB)]) == "d1"
    assert placer.lease("shard", 30 * MIB, [busy, *rooms(20 * MIB, 30 * MIB)]) == "busy"


def test_a_twentieth_is_kept_for_leases_that_must_leave_where_that_is_as_much_as_a_donor_has() -> None:
    def offering(donors: int) -> list[Room]:
        return [Room(f"d{i}", 100 * MIB, offered=100 * MIB) for i in range(donors)]

    placer.region(98 * MIB, offering(19))
    with pytest.raises(CapacityError, match=r"20 donors could lend 1.86 GiB in all, 95 MiB at most by one"):
        placer.region(98 * MIB, offering(20))
    with pytest.raises(CapacityError):
        placer.store(20 * 94 * MIB, offering(20))
    placer.store(20 * 92 * MIB, offering(20))
    assert placer.lease("shard", 98 * MIB, offering(20)).startswith("d")
    spill = Room("spill", 100 * MIB, spill=True, offered=100 * MIB)
    assert placer.region(98 * MIB, [*offering(20), spill]) == "spill"


def test_spill_donors_get_only_what_fits_nowhere_else() -> None:
    memory = rooms(40 * MIB, 40 * MIB)
    spill = Room("spill", GIB, spill=True)
    assert set(placer.store(60 * MIB, [spill, *memory]).donors) == {"d0", "d1"}
    assert "spill" in placer.store(200 * MIB, [spill, *memory]).donors
    assert placer.region(30 * MIB, [spill, *memory]) in ("d0", "d1")
    assert placer.region(50 * MIB, [spill, *memory]) == "spill"
    assert placer.lease("shard", 30 * MIB, [spill, *memory]) in ("d0", "d1")
    assert placer.lease("shard", 50 * MIB, [spill, *memory]) == "spill"
    with pytest.raises(CapacityError, match="no donor has room for a shard of 2 GiB"):
        placer.lease("shard", 2 * GIB, [spill, *memory])
    assert placer.lease("shard", 30 * MIB, [spill]) == "spill"


def test_what_does_not_fit_says_what_was_asked_and_what_there_is() -> None:
    with pytest.raises(CapacityError, match=r"store of 3 GiB.*2 donors could lend 1.5 GiB in all, 1 GiB at most"):
        placer.store(3 * GIB, rooms(GIB, GIB // 2))
    with pytest.raises(CapacityError, match=r"region of 2 GiB; 1 donor could lend 1 GiB"):
        placer.region(2 * GIB, rooms(GIB))
    with pytest.raises(CapacityError, match="no donor is connected"):
        placer.region(1, [])


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_makes_no_sense(size: int) -> None:
    with pytest.raises(UsageError):
        placer.store(size, rooms(GIB))
    with pytest.raises(UsageError):
        placer.region(size, rooms(GIB))


@pytest.mark.parametrize("size", [1 << 51, 2**63, 2**64])
def test_a_size_beyond_all_nodes_is_only_too_large(size: int) -> None:
    with pytest.raises(CapacityError):
        Placer().store(size, rooms(GIB))
    with pytest.raises(CapacityError):
        Placer().region(size, rooms(GIB))


@given(
    size=st.integers(1, 4 * GIB),
    free=st.lists(st.one_of(st.integers(0, 64 * MIB), st.integers(0, 2 * GIB)), max_size=90),
)
def test_every_placement_fits_and_is_even(size: int, free: list[int]) -> None:
    available = rooms(*free)
    try:
        placement = placer.store(size, available)
    except CapacityError as error:
        message = str(error)
        if "fits now has" in message:  # what it offers instead is true
            largest = int(message.split("fits now has ")[1].split()[0])
            assert largest < size
            placer.store(largest, available)
        else:
            assert all(room.free < cost("shard", MIN_SHARD) for room in available)
        return
    each = cost("shard", placement.shard_size)
    shares = Counter(placement.donors)
    assert 1 <= len(placement.donors) <= MAX_SHARDS
    assert placement.shard_size >= MIN_SHARD
    assert placement.shard_size % SPAN == 0
    assert placement.shard_size * len(placement.donors) >= size
    assert all(shares[room.donor] * each <= room.free for room in available)
    # Nobody gets two while somebody who has room for one has none, and so on.
    most = max(shares.values())
    assert all(shares[room.donor] >= most - 1 for room in available if room.free >= most * each)
