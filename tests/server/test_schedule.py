"""What must go for which reclaim, and when the kernel must begin with it."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from memfaas.server.ledger import Debt, Ledger
from memfaas.server.schedule import BEGIN_S, LEASE_S, Schedule
from memfaas.units import GIB, MIB
from tests.server.holdings import Node, SimulatedLease

RATE = GIB


@pytest.fixture
def node() -> Node:
    return Node(RATE)


@pytest.fixture
async def ledger(node: Node, autojump_clock: MockClock) -> Ledger:
    return Ledger(node.holdings, nominal=1000 * MIB)


def seconds(*sizes: int) -> float:
    return sum(size * MIB / RATE + LEASE_S for size in sizes)


def numbers(schedule: Schedule, debt: Debt) -> list[int]:
    return [one.spec.shard for one in schedule.doomed(debt)]


async def test_the_last_is_free_at_the_deadline_and_each_lease_costs_some_time(node: Node, ledger: Ledger) -> None:
    for _ in range(1000):
        node.lend(MIB)
    debt = ledger.borrow("job 17", 1000 * MIB, 10.0)
    schedule = Schedule(ledger, RATE)
    assert schedule.evict_at(debt) == pytest.approx(debt.deadline - BEGIN_S - seconds(*[1] * 1000))
    for _ in range(600):
        schedule.take(debt)
    assert schedule.evict_at(debt) == pytest.approx(debt.deadline - BEGIN_S - seconds(*[1] * 400))


async def test_what_is_due_soon_begins_in_time_for_what_is_due_later(node: Node, ledger: Ledger) -> None:
    for _ in range(4):
        node.lend(250 * MIB)
    later = ledger.borrow("job 18", 500 * MIB, 10.1)
    soon = ledger.borrow("job 17", 500 * MIB, 10.0)
    schedule = Schedule(ledger, RATE)
    assert schedule.evict_at(later) == pytest.approx(later.deadline - BEGIN_S - seconds(250, 250))
    assert schedule.evict_at(soon) == pytest.approx(schedule.evict_at(later) - seconds(250, 250))
    assert not set(numbers(schedule, soon)) & set(numbers(schedule, later))
    before = schedule.evict_at(soon) - trio.current_time()
    assert schedule.has_time_for(before - 0.01, trio.current_time())
    assert not schedule.has_time_for(before + 0.01, trio.current_time())


async def test_what_is_chosen_stays_so_as_far_as_it_is_needed(node: Node, ledger: Ledger) -> None:
    leases = [node.lend(250 * MIB, activity=number) for number in range(4)]
    debt = ledger.borrow("job 17", 500 * MIB, 10.0)
    assert numbers(Schedule(ledger, RATE), debt) == [0, 1]
    leases[3].expire()
    node.lend(250 * MIB, borrowed=True)
    assert numbers(Schedule(ledger, RATE), debt) == [0, 1]  # though the new one is to leave before the others
    leases[0].expire()
    ledger.settle()
    assert numbers(Schedule(ledger, RATE), debt) == [1]
    leases[1].expire()
    ledger.settle()
    assert not Schedule(ledger, RATE)


async def test_what_goes_already_is_not_chosen_nor_anything_in_its_place(node: Node, ledger: Ledger) -> None:
    going: list[SimulatedLease] = [node.lend(500 * MIB) for _ in range(2)]
    debt = ledger.borrow("job 17", 500 * MIB, 10.0)
    claim = ledger.claim(going[0], "evict", debt)
    assert not Schedule(ledger, RATE)
    # The rest of what went for a reclaim that had enough is for the next.
    claim.size = 100 * MIB
    going[0].bytes = 100 * MIB
    ledger.pay(debt, 400 * MIB, "dropped", going[0].spec)
    debt.withdraw(100 * MIB)
    ledger.asked["job 17"] -= 100 * MIB
    ledger.end(debt)
    after = ledger.borrow("job 18", 100 * MIB, 10.0)
    assert after.left == 100 * MIB
    assert not Schedule(ledger, RATE)
    assert ledger.need(after) == 0
