"""Which leases leave."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memfaas.server.victims import Holding, choose, rank
from memfaas.units import MIB
from tests.server.holdings import Node, SimulatedLease


def plainly(pool: list[SimulatedLease], need: int) -> list[SimulatedLease]:
    """What `choose` does, in as few words as it can be said; it takes a square of time."""
    pool, chosen = list(pool), []
    while pool and need > 0:
        enough = [one for one in pool if one.bytes >= need]
        small = [one for one in pool if one.bytes < need]
        smallest = min((one.bytes for one in enough), default=0)
        if enough and (smallest <= 2 * need or sum(one.bytes for one in small) < need):
            alike = [one for one in enough if one.bytes <= 2 * smallest]
        else:
            largest = max(one.bytes for one in small)
            alike = [one for one in small if 2 * one.bytes >= largest]
        victim = min(alike, key=lambda one: (one.activity(), one.bytes, one.spec.lease))
        pool.remove(victim)
        chosen.append(victim)
        need -= victim.bytes
    for victim in list(reversed(chosen)):
        if need + victim.bytes <= 0:
            chosen.remove(victim)
            need += victim.bytes
    return chosen


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 100) | st.sampled_from([8, 16, 64]), st.integers(0, 3)), max_size=30),
    need=st.integers(0, 1000),
)
def test_many_are_chosen_as_few_would_be(sizes: list[tuple[int, int]], need: int) -> None:
    node = Node(1)
    pool = [node.lend(size, activity=activity) for size, activity in sizes]
    found = choose(pool, need, lambda one: rank(one.spec), lambda one: one.activity())
    assert [one.spec.shard for one in found] == [one.spec.shard for one in plainly(pool, need)]


def test_nobodys_activity_is_looked_at_twice() -> None:
    node = Node(1)
    pool = [node.lend(size * MIB) for size in range(1, 1001)]
    seen: list[bytes] = []

    def activity(one: Holding) -> float:
        seen.append(one.spec.lease)
        return 0.0

    chosen = choose(pool, 1 << 50, lambda one: rank(one.spec), activity)
    assert len(chosen) == len(seen) == len(set(seen)) == 1000
