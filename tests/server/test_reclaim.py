"""How a donor's memory comes back: the steps, their order, and the deadline that always wins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from memfaas.errors import UsageError
from memfaas.messages import Reclaimed
from memfaas.server.reclaim import Reclaimer
from memfaas.units import GIB, MIB
from tests.server.holdings import MoveFate, Node, PunchFate, SimulatedLease

RATE = GIB
EVICT_S = 0.02


@pytest.fixture
def node() -> Node:
    return Node(RATE)


@pytest.fixture
async def reclaimer(node: Node, nursery: trio.Nursery) -> Reclaimer:
    made = Reclaimer("d1", node.holdings, nominal=1000 * MIB, evict_rate=RATE, moves_at_once=2)
    await nursery.start(made.run)
    return made


def steps(result: Reclaimed) -> list[tuple[str, int]]:
    return [(one.how, one.size // MIB) for one in result.steps]


class Cache(SimulatedLease):
    """Its last 100 MiB are freed only when it is evicted a second time."""

    async def evict(self, reason: str) -> int:
        if self.bytes <= 100 * MIB:
            return await super().evict(reason)
        await trio.sleep((self.bytes - 100 * MIB) / self.node.rate)
        self.bytes, self.state = 100 * MIB, "ending"
        return 0


# --- the order of steps ---------------------------------------------------------------------------


async def test_what_nobody_leased_comes_first_and_at_once(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(600 * MIB, spare=100 * MIB)
    result = await reclaimer.reclaim(400 * MIB, 1.0, "job 17")
    assert steps(result) == [("unlent", 400)]
    assert (result.asked, result.freed, result.in_time, result.seconds) == (400 * MIB, 400 * MIB, True, 0.0)
    assert (reclaimer.offered, reclaimer.reclaimed) == (600 * MIB, {"job 17": 400 * MIB})
    assert lease.bytes == 600 * MIB


async def test_then_free_parts_of_shards_and_only_then_whole_leases(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(500 * MIB, spare=100 * MIB)
    node.lend(500 * MIB, spare=50 * MIB, activity=5.0)
    result = await reclaimer.reclaim(120 * MIB, 10.0, "job 17")
    assert steps(result) == [("punched", 100), ("punched", 20)]
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 18")
    assert steps(result) == [("punched", 30), ("migrated", 400)]
    assert [one.ends for one in node.leases] == [["moved"], []]
    assert result.freed == 430 * MIB
    assert result.steps[1].what == "shard 0 of store 'results' of alice"
    assert result.steps[1].pause == 0.002


async def test_what_was_cut_out_of_a_shard_is_its_own_again_when_the_room_is_back(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(1000 * MIB, spare=300 * MIB)
    await reclaimer.reclaim(200 * MIB, 10.0, "job 17")
    assert (lease.bytes, lease.punched) == (800 * MIB, 200 * MIB)
    reclaimer.lend("job 17", 100 * MIB)
    await trio.sleep(1)
    assert lease.punched == 200 * MIB  # half of it is no use: a shard gets all of it or nothing
    reclaimer.lend("job 17")
    assert reclaimer.used == 1000 * MIB  # from now on, for nobody else may get this room
    await trio.sleep(1)
    assert (lease.bytes, lease.punched) == (1000 * MIB, 0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"borrowed": True, "priority": 9}, {"on_reclaim": "drop"}),
        ({"priority": -1}, {"on_reclaim": "drop"}),
        ({"on_reclaim": "drop", "activity": 9.0}, {}),
        ({"activity": 1.0}, {"activity": 2.0}),
    ],
)
async def test_leases_leave_in_the_order_that_was_agreed(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, first: dict[str, Any], second: dict[str, Any]
) -> None:
    stays = node.lend(500 * MIB, **second)
    leaves = node.lend(500 * MIB, **first)
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 17")
    assert leaves.ends
    assert not stays.ends
    assert result.in_time


async def test_the_smallest_lease_that_suffices_leaves(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    sizes = [600, 200, 100, 100]
    for size in sizes:
        node.lend(size * MIB)
    result = await reclaimer.reclaim(150 * MIB, 10.0, "job 17")
    assert steps(result) == [("migrated", 200)]


async def test_a_small_lease_stays_when_a_large_one_has_to_leave_anyway(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    cache = node.lend(10 * MIB, on_reclaim="drop")
    node.lend(990 * MIB)
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 17")
    assert steps(result) == [("migrated", 990)]
    assert not cache.ends


async def test_a_store_that_says_drop_is_dropped_at_once(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(1000 * MIB, on_reclaim="drop")
    result = await reclaimer.reclaim(1, 60.0, "job 17")
    assert steps(result) == [("dropped", 1000)]
    assert lease.moves_begun == 0
    assert result.seconds < 2


@pytest.mark.parametrize(
    ("asked", "parts", "seconds"), [(500, [900], 0.9), (950, [900, 100], 1.0)], ids=["a part", "all"]
)
async def test_who_needs_less_than_all_of_a_cache_does_not_wait_for_its_index(
    node: Node,
    reclaimer: Reclaimer,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    asked: int,
    parts: list[int],
    seconds: float,
) -> None:
    lease = node.leases[0] = Cache(**vars(node.lend(1000 * MIB, on_reclaim="drop")))
    result = await reclaimer.reclaim(asked * MIB, 10.0, "job 17")
    assert steps(result) == [("dropped", size) for size in parts]
    assert result.seconds == pytest.approx(seconds * 1000 * MIB / RATE, abs=0.002)
    assert reclaimer.used == (1000 - sum(parts)) * MIB
    await trio.sleep(1)
    assert (lease.bytes, lease.ends, reclaimer.used) == (0, ["evicted"], 0)


async def test_a_lease_that_is_still_arriving_is_refused_before_any_leaves(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(500 * MIB, borrowed=True)
    arriving = node.lend(500 * MIB, state="arriving")
    result = await reclaimer.reclaim(500 * MIB, 10.0, "job 17")
    assert arriving.ends == ["evicted"]
    assert steps(result) == [("unlent", 500)]  # nothing is lost: it is where it was


async def test_a_lease_that_ends_by_itself_is_waited_for(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    leaving = node.lend(500 * MIB, state="ending")
    node.lend(500 * MIB)

    async def end() -> None:
        await trio.sleep(0.1)
        leaving.expire()
        reclaimer.changed()

    nursery.start_soon(end)
    result = await reclaimer.reclaim(500 * MIB, 10.0, "job 17")
    assert steps(result) == [("unlent", 500)]
    assert node.taken == 500 * MIB


@pytest.mark.parametrize("holder", ["job 17", "job 18"])
async def test_what_an_earlier_agent_left_undone_is_done_by_the_next_reclaim(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, holder: str
) -> None:
    node.lend(600 * MIB)
    reclaimer.restore({"job 17": 1000 * MIB}, {}, 1000 * MIB, ignore)
    assert reclaimer.offered == 0
    result = await reclaimer.reclaim(1000 * MIB, 10.0, holder, in_all=True)
    assert steps(result) == [("migrated", 600)]
    assert (result.asked, result.in_time) == (600 * MIB, True)
    assert node.leases[0].bytes == 0


async def ignore(_: Reclaimed) -> None:
    pass


async def test_a_reclaim_that_an_earlier_agent_began_goes_on_by_itself_until_its_deadline(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(300 * MIB)
    node.lend(300 * MIB, move="no room")
    told: list[Reclaimed] = []

    async def tell(reclaimed: Reclaimed) -> None:
        told.append(reclaimed)

    began = trio.current_time()
    reclaimer.restore({"job 17": 1000 * MIB}, {"job 17": began + 10.0}, 1000 * MIB, tell)
    assert reclaimer.due == {"job 17": began + 10.0}
    await trio.sleep(20.0)
    (result,) = told
    assert steps(result) == [("migrated", 300), ("lost", 300)]
    assert (result.asked, result.in_time) == (600 * MIB, True)
    assert 9.0 < result.seconds < 10.0
    assert (node.taken, reclaimer.due) == (0, {})


async def test_a_deadline_that_passed_while_there_was_no_agent_is_met_at_once(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(100 * MIB)
    stays = node.lend(600 * MIB)
    began = trio.current_time()
    reclaimer.restore({"job 17": 300 * MIB, "job 18": 100 * MIB}, {"job 18": began - 5.0}, 1000 * MIB, ignore)
    await trio.sleep(1.0)
    assert node.leases[0].ends == ["evicted"]
    assert stays.ends == []


async def test_what_two_were_owed_is_owed_to_them_again_by_their_deadlines(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    for _ in range(10):
        node.lend(100 * MIB, move="no room")
    began = trio.current_time()
    asked = {"job 17": 400 * MIB, "job 18": 200 * MIB}
    reclaimer.restore(asked, {"job 18": began + 20.0, "job 17": began + 10.0}, 1100 * MIB, ignore)
    await trio.sleep(15.0)
    assert node.taken == 700 * MIB  # 100 MiB had been paid, by the deadline that is nearest
    await trio.sleep(10.0)
    assert node.taken == 500 * MIB


async def test_more_than_was_lent_before_is_no_debt(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(600 * MIB)
    reclaimer.restore({"job 17": 400 * MIB}, {"job 17": trio.current_time() + 1.0}, 1000 * MIB, ignore)
    reclaimer.nominal = 500 * MIB  # as its operator says now
    await trio.sleep(2.0)
    assert lease.ends == []


@pytest.mark.parametrize("holder", ["job 17", "job 18"])
async def test_who_asks_again_and_wants_it_sooner_gets_what_an_earlier_agent_left_undone(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, holder: str
) -> None:
    lease = node.lend(600 * MIB, move="no room")
    reclaimer.restore({"job 17": 1000 * MIB}, {"job 17": trio.current_time() + 60.0}, 1000 * MIB, ignore)
    await trio.sleep(1.0)
    result = await reclaimer.reclaim(0, 2.0, holder, in_all=True)
    if holder == "job 17":
        assert (result.asked, result.in_time, lease.ends) == (600 * MIB, True, ["evicted"])
        assert reclaimer.due == {}
    else:
        assert (result.asked, result.in_time, lease.ends) == (0, True, [])
        assert "job 17" in reclaimer.due


# --- moves ------------------------------------------------------------------------------------------


async def test_few_leases_move_at_the_same_time(node: Node, reclaimer: Reclaimer, autojump_clock: MockClock) -> None:
    for _ in range(5):
        node.lend(200 * MIB, move_s=1.0)
    result = await reclaimer.reclaim(1000 * MIB, 60.0, "job 17")
    assert sorted(round(one.seconds) for one in result.steps) == [1, 1, 2, 2, 3]


async def test_moves_to_a_spill_donor_say_so(node: Node, reclaimer: Reclaimer, autojump_clock: MockClock) -> None:
    node.lend(1000 * MIB, move="spills")
    assert steps(await reclaimer.reclaim(1, 10.0, "job 17")) == [("spilled", 1000)]


@pytest.mark.parametrize("fate", ["no room", "breaks"])
async def test_another_lease_moves_when_one_cannot(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, fate: MoveFate
) -> None:
    stays = node.lend(500 * MIB, borrowed=True, move=fate)
    moves = node.lend(500 * MIB)
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 17")
    assert steps(result) == [("migrated", 500)]
    assert (stays.moves_begun, stays.ends, moves.ends) == (1, [], ["moved"])


# --- the deadline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["no room", "breaks", "hangs"])
async def test_what_cannot_move_is_lost_by_name_just_before_the_deadline(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, fate: MoveFate
) -> None:
    lease = node.lend(1000 * MIB, move=fate)
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 17")
    assert steps(result) == [("lost", 1000)]
    assert result.steps[0].what == "shard 0 of store 'results' of alice"
    assert lease.ends == ["evicted"]
    assert result.in_time
    assert 9.9 < result.seconds <= 10.0


async def test_a_lease_that_found_no_room_is_moved_when_there_is_some(
    node: Node, reclaimer: Reclaimer, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lease = node.lend(1000 * MIB, move="no room")

    async def make_room() -> None:
        await trio.sleep(3)
        lease.move_fate = "moves"

    nursery.start_soon(make_room)
    result = await reclaimer.reclaim(100 * MIB, 30.0, "job 17")
    assert steps(result) == [("migrated", 1000)]
    assert result.seconds < 10


async def test_with_little_time_nothing_is_tried_that_could_cost_it(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(1000 * MIB, move_s=0.001, spare=100 * MIB)
    result = await reclaimer.reclaim(1000 * MIB, 0.5, "job 17")
    assert steps(result) == [("lost", 1000)]
    assert lease.moves_begun == 0
    assert (result.in_time, result.freed) == (False, 0)  # the kernel needs longer; it is free when this returns
    assert node.taken == 0


async def test_only_as_much_is_lost_as_did_not_make_it(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    fates: list[MoveFate] = ["hangs", "moves", "moves", "breaks"]
    for number, fate in enumerate(fates):
        node.lend(250 * MIB, move=fate, activity=number)
    result = await reclaimer.reclaim(750 * MIB, 10.0, "job 17")
    assert steps(result) == [("migrated", 250), ("migrated", 250), ("lost", 250)]
    assert node.leases[0].ends == ["evicted"]  # and not the one that could not leave: nothing else was under way
    assert result.in_time


async def test_a_lease_that_cannot_be_evicted_at_once_is_tried_again(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(1000 * MIB, move="no room", refusals=1)
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 17")
    assert steps(result) == [("lost", 1000)]
    assert lease.ends == ["evicted"]
    assert result.in_time


async def test_another_goes_in_the_place_of_one_that_cannot_even_be_evicted(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    stays = node.lend(500 * MIB, borrowed=True, move="no room", refusals=1000)
    goes = node.lend(500 * MIB, move="no room")
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 17")
    assert steps(result) == [("lost", 500)]
    assert (stays.ends, goes.ends) == ([], ["evicted"])
    assert not result.in_time
    assert reclaimer.used == 500 * MIB
    result = await reclaimer.reclaim(500 * MIB, 10.0, "job 18")
    assert (result.freed, result.in_time) == (400 * MIB, False)  # it says so, rather than to wait for ever


@pytest.mark.parametrize("fate", ["fails", "hangs"])
async def test_a_function_that_does_not_punch_costs_the_others_no_time(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, fate: PunchFate
) -> None:
    node.lend(500 * MIB, punch=fate, spare=100 * MIB)
    node.lend(500 * MIB, activity=1.0, spare=100 * MIB)
    assert steps(await reclaimer.reclaim(100 * MIB, 10.0, "job 17")) == [("punched", 100)]


async def test_the_activity_of_a_lease_is_looked_at_once_for_each_reclaim(
    node: Node, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    looks: list[bytes] = []

    class Watched(SimulatedLease):
        def activity(self) -> float:
            looks.append(self.spec.lease)
            return super().activity()

    for number in range(60):
        node.leases[number] = Watched(**vars(node.lend(10 * MIB, move="no room")))
    reclaimer = Reclaimer("d1", node.holdings, nominal=600 * MIB, evict_rate=RATE)
    await nursery.start(reclaimer.run)
    result = await reclaimer.reclaim(600 * MIB, 5.0, "job 17")
    assert result.in_time
    assert sorted(looks) == [one.spec.lease for one in node.leases]


async def test_the_rest_of_a_cache_that_goes_already_is_enough_for_the_next(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.leases[0] = Cache(**vars(node.lend(500 * MIB, on_reclaim="drop")))
    stays = node.lend(500 * MIB, on_reclaim="drop")
    await reclaimer.reclaim(400 * MIB, 10.0, "job 17")
    result = await reclaimer.reclaim(100 * MIB, 10.0, "job 18")
    assert steps(result) == [("dropped", 100)]
    assert not stays.ends


# --- several at once ---------------------------------------------------------------------------------------


async def several(reclaimer: Reclaimer, *asked: tuple[int, float]) -> list[Reclaimed]:
    results: dict[int, Reclaimed] = {}

    async def one(number: int, size: int, deadline: float) -> None:
        results[number] = await reclaimer.reclaim(size, deadline, f"job {number}")

    async with trio.open_nursery() as nursery:
        for number, (size, deadline) in enumerate(asked):
            nursery.start_soon(one, number, size, deadline)
            await trio.sleep(0.005)  # each finds what those before it have begun
    return [results[number] for number in sorted(results)]


async def test_one_lease_serves_two_reclaims(node: Node, reclaimer: Reclaimer, autojump_clock: MockClock) -> None:
    for _ in range(2):
        node.lend(500 * MIB, move_s=1.0)
    first, second = await several(reclaimer, (200 * MIB, 10.0), (200 * MIB, 20.0))
    assert node.taken == 500 * MIB
    assert sum(one.freed for one in (first, second)) == 500 * MIB
    assert first.in_time
    assert second.in_time


async def test_a_reclaim_in_a_hurry_takes_what_another_is_still_moving(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    lease = node.lend(1000 * MIB, move_s=30.0)
    slow, hasty = await several(reclaimer, (100 * MIB, 60.0), (100 * MIB, 2.0))
    assert lease.ends == ["evicted"]
    assert hasty.in_time
    assert slow.in_time
    assert [one.how for one in slow.steps + hasty.steps] == ["lost", "lost"]


async def test_reclaims_with_the_same_deadline_share_the_kernel(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    for _ in range(4):
        node.lend(250 * MIB, move="hangs")
    results = await several(reclaimer, *[(250 * MIB, 1.2)] * 4)
    assert [one.in_time for one in results] == [True] * 4


# --- what the holder does --------------------------------------------------------------------------------


async def test_more_than_is_offered_is_taken_as_all_of_it(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(300 * MIB)
    result = await reclaimer.reclaim(5 * GIB, 10.0, "job 17")
    assert (result.asked, result.freed, result.in_time) == (1000 * MIB, 1000 * MIB, True)
    assert (reclaimer.offered, node.taken) == (0, 0)
    result = await reclaimer.reclaim(GIB, 10.0, "job 18")
    assert (result.asked, result.freed, result.in_time, result.steps) == (0, 0, True, [])


async def test_requests_of_one_holder_add_up_until_it_lends_again(
    reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    for _ in range(2):
        await reclaimer.reclaim(100 * MIB, 1.0, "job 17")
    await reclaimer.reclaim(100 * MIB, 1.0, "pressure")
    assert reclaimer.reclaimed == {"job 17": 200 * MIB, "pressure": 100 * MIB}
    reclaimer.lend("pressure", 30 * MIB)
    reclaimer.lend("nobody")
    reclaimer.lend("job 17")
    assert reclaimer.reclaimed == {"pressure": 70 * MIB}
    assert reclaimer.offered == 930 * MIB


async def test_a_holder_that_lends_again_ends_its_reclaim(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    lease = node.lend(1000 * MIB, move="no room")

    async def change_of_mind() -> None:
        await trio.sleep(1)
        reclaimer.lend("job 17")

    nursery.start_soon(change_of_mind)
    result = await reclaimer.reclaim(100 * MIB, 60.0, "job 17")
    assert result.seconds == pytest.approx(1)
    assert (result.asked, result.freed, result.in_time) == (0, 0, True)
    assert not lease.ends


async def test_what_one_holder_lends_again_another_gets_first(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    await reclaimer.reclaim(500 * MIB, 10.0, "job 17")
    lease = node.lend(500 * MIB, move="hangs")

    async def end_of_job() -> None:
        await trio.sleep(1)
        reclaimer.lend("job 17")

    nursery.start_soon(end_of_job)
    result = await reclaimer.reclaim(500 * MIB, 10.0, "job 18")
    assert steps(result) == [("unlent", 500)]
    assert not lease.ends


async def test_what_two_need_is_lent_when_neither_does(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(1000 * MIB)
    for job in ("job 1", "job 2"):
        result = await reclaimer.reclaim(5 * GIB, 10.0, job, in_all=True)
        assert (result.held, result.in_time, reclaimer.offered) == (1000 * MIB, True, 0)
    assert reclaimer.reclaimed == {"job 1": 1000 * MIB, "job 2": 1000 * MIB}
    assert reclaimer.lend("job 1") == 0
    assert (reclaimer.offered, reclaimer.reclaimed) == (0, {"job 2": 1000 * MIB})
    assert reclaimer.lend("job 2") == 1000 * MIB
    assert (reclaimer.offered, reclaimer.reclaimed) == (1000 * MIB, {})


async def test_who_needs_what_is_being_freed_for_another_waits_for_it_and_gets_it_though_that_one_ends(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node.lend(1000 * MIB, move_s=5.0)
    nursery.start_soon(reclaimer.reclaim, 5 * GIB, 30.0, "job 1")
    await trio.sleep(1)
    hasty = await reclaimer.reclaim(5 * GIB, 1.0, "job 2")
    assert (hasty.asked, hasty.in_time) == (0, False)
    reclaimer.lend("job 1")
    result = await reclaimer.reclaim(0, 10.0, "job 2", in_all=True)
    assert result.in_time
    assert trio.current_time() == pytest.approx(5, abs=0.1)
    assert (node.taken, reclaimer.offered) == (0, 0)


async def test_of_what_others_need_too_nothing_is_lent_again(reclaimer: Reclaimer, autojump_clock: MockClock) -> None:
    for holder, size in (("job 1", 700 * MIB), ("job 2", 500 * MIB), ("job 3", 5 * GIB)):
        await reclaimer.reclaim(size, 10.0, holder)
    reclaimer.lend("job 3")
    assert reclaimer.lend("job 1") == 500 * MIB
    assert reclaimer.lend("job 2", 200 * MIB) == 200 * MIB
    assert reclaimer.asked == {"job 2": 300 * MIB}


async def test_the_giving_back_goes_on_when_the_caller_is_gone(
    node: Node, reclaimer: Reclaimer, autojump_clock: MockClock
) -> None:
    node.lend(1000 * MIB, move_s=5.0)
    with trio.move_on_after(1):
        await reclaimer.reclaim(1000 * MIB, 60.0, "job 17")
    assert node.taken == 1000 * MIB
    await trio.sleep(5)
    assert node.taken == 0
    assert reclaimer.offered == 0


@pytest.mark.parametrize(("size", "deadline"), [(-1, 1.0), (1, -1.0), (1, math.inf), (1, math.nan)])
async def test_requests_that_make_no_sense_change_nothing(
    reclaimer: Reclaimer, autojump_clock: MockClock, size: int, deadline: float
) -> None:
    with pytest.raises(UsageError):
        await reclaimer.reclaim(size, deadline, "job 17")
    assert reclaimer.offered == 1000 * MIB


# --- anything at any time -----------------------------------------------------------------------------------

however_long = settings(deadline=None)
"""The machine may be busy; what counts here is the time of the mock clock."""

sizes = st.integers(1, 400).map(lambda n: n * MIB)
fates: st.SearchStrategy[MoveFate] = st.sampled_from(["moves", "spills", "no room", "breaks", "hangs"])
punch_fates: st.SearchStrategy[PunchFate] = st.sampled_from(["punches", "fails", "hangs"])


@st.composite
def a_lease(draw: st.DrawFn, move: st.SearchStrategy[MoveFate] = fates) -> dict[str, Any]:
    size = draw(sizes)
    return {
        "size": size,
        "borrowed": draw(st.booleans()),
        "priority": draw(st.integers(0, 2)),
        "on_reclaim": draw(st.sampled_from(["migrate", "drop"])),
        "activity": draw(st.floats(0, 100)),
        "spare": draw(st.integers(0, size)),
        "move": draw(move),
        "move_s": draw(st.floats(0.001, 20.0)),
        "punch": draw(punch_fates),
        "state": draw(st.sampled_from(["serving", "serving", "serving", "arriving"])),
    }


events = st.lists(
    st.tuples(
        st.floats(0, 5),
        st.one_of(
            st.tuples(st.just("reclaim"), sizes, st.floats(0, 15), st.sampled_from("abc")),
            st.tuples(st.just("lend"), st.none() | sizes, st.sampled_from("abc")),
            st.tuples(st.just("expire"), st.integers(0, 20)),
            st.tuples(st.just("grant"), a_lease()),
            st.tuples(st.just("arrived"), st.integers(0, 20)),
        ),
    ),
    max_size=12,
)


def simulated(scenario: Callable[[Node, Reclaimer, trio.Nursery], Any], nominal: int) -> None:
    async def run() -> None:
        node = Node(RATE)
        reclaimer = Reclaimer("d1", node.holdings, nominal=nominal, evict_rate=RATE, moves_at_once=2)
        async with trio.open_nursery() as nursery:
            await nursery.start(reclaimer.run)
            await scenario(node, reclaimer, nursery)
            nursery.cancel_scope.cancel()

    trio.run(run, clock=MockClock(autojump_threshold=0))


def check(result: Reclaimed, deadline: float) -> None:
    assert result.freed == sum(one.size for one in result.steps if one.seconds <= deadline)
    if result.asked == result.wanted:
        assert result.in_time == (result.freed >= result.asked)
    elif result.in_time:  # otherwise what it needs may be on its way to another
        assert result.freed >= result.asked
    assert sum(one.size for one in result.steps) >= result.asked  # complete, if too late
    assert all(bool(one.what) == bool(one.lease) for one in result.steps)


@however_long
@given(leases=st.lists(a_lease(), max_size=8), room=st.integers(0, 500), events=events)
def test_whatever_happens_each_reclaim_gets_its_bytes_and_each_lease_ends_once(
    leases: list[dict[str, Any]], room: int, events: list[tuple[float, tuple[Any, ...]]]
) -> None:
    async def scenario(node: Node, reclaimer: Reclaimer, nursery: trio.Nursery) -> None:
        for lease in leases:
            node.lend(**lease)
        results: list[Reclaimed] = []
        under_way = 0

        async def reclaim(size: int, deadline: float, holder: str) -> None:
            nonlocal under_way
            under_way += 1
            result = await reclaimer.reclaim(size, deadline, holder)
            under_way -= 1
            check(result, deadline)
            results.append(result)
            if under_way == 0:
                assert node.taken <= reclaimer.offered

        async with trio.open_nursery() as reclaims:
            for pause, event in events:
                await trio.sleep(pause)
                match event:
                    case ("reclaim", size, deadline, holder):
                        reclaims.start_soon(reclaim, size, deadline, holder)
                    case ("lend", size, holder):
                        reclaimer.lend(holder, size)
                    case ("expire", number) if number < len(node.leases):
                        node.leases[number].expire()
                        reclaimer.changed()
                    case ("grant", lease) if reclaimer.used + lease["size"] <= reclaimer.offered:
                        node.lend(**lease)
                        reclaimer.changed()
                    case ("arrived", number) if number < len(node.leases) and node.leases[number].state == "arriving":
                        node.leases[number].state = "serving"
                        reclaimer.changed()

        for held in node.leases:
            assert len(held.ends) <= 1
            told = [one for result in results for one in result.steps if one.lease == held.spec.lease]
            whole = [one for one in told if one.how != "punched"]
            assert len({one.how for one in whole}) <= 1
            assert sum(one.size for one in whole) <= held.spec.size
            if whole:
                moved = whole[0].how in ("migrated", "spilled")
                # One that expires while it is evicted may be said to be lost.
                assert held.ends[0] in (["moved"] if moved else ["evicted", "expired"])

    simulated(scenario, sum(lease["size"] for lease in leases) + room * MIB)


@however_long
@given(
    leases=st.lists(a_lease(st.just("moves")), min_size=1, max_size=10),
    asked=st.integers(1, 2000),
)
def test_nothing_leaves_without_need_when_all_goes_well(leases: list[dict[str, Any]], asked: int) -> None:
    async def scenario(node: Node, reclaimer: Reclaimer, nursery: trio.Nursery) -> None:
        for lease in leases:
            node.lend(**{**lease, "punch": "punches", "move_s": 0.01})
        result = await reclaimer.reclaim(asked * MIB, 1000.0, "job 17")
        check(result, 1000.0)
        assert result.in_time
        assert all(one.how != "lost" for one in result.steps)
        whole = [one for one in result.steps if one.how not in ("unlent", "punched") or one.lease]
        if whole:
            assert result.freed - max(one.size for one in whole) < result.asked

    simulated(scenario, sum(lease["size"] for lease in leases))


@however_long
@given(
    leases=st.lists(a_lease(), min_size=1, max_size=8),
    asked=st.integers(1, 2000),
    extra=st.floats(0, 10),
)
def test_with_time_for_the_kernel_the_deadline_is_met_whatever_fails(
    leases: list[dict[str, Any]], asked: int, extra: float
) -> None:
    async def scenario(node: Node, reclaimer: Reclaimer, nursery: trio.Nursery) -> None:
        for lease in leases:
            node.lend(**lease)
        result = await reclaimer.reclaim(asked * MIB, EVICT_S + node.taken / RATE + extra, "job 17")
        assert result.in_time

    simulated(scenario, sum(lease["size"] for lease in leases))
