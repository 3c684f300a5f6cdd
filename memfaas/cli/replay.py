"""Replays a machine's jobs on a simulated cluster: its nodes are donors, and stores use what they lend.

This is no command. It is here because it puts `bench.trace` and `server.simulation` together, and `bench` may not
import `server`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from trio.testing import MockClock

from memfaas import auth
from memfaas.bench.trace.jobs import Change, Timeline
from memfaas.bench.trace.outcome import GROWTH_RATE, Outcome, Sample
from memfaas.bench.trace.policies import Policy
from memfaas.errors import CapacityError, MemfaasError, UnknownStore
from memfaas.messages import (
    DeleteStore,
    Done,
    LeaseGone,
    Lend,
    Locate,
    Located,
    OpenStore,
    Reclaim,
    Reclaimed,
    StoreOpened,
)
from memfaas.server import process
from memfaas.server.simulation.cluster import Client, Cluster, Speeds
from memfaas.server.simulation.donor import Node, Rules, SimulatedDonor
from memfaas.units import GIB

SPILL_RATE = 2.0 * GIB
SPILL_NODES = 8
_TOUCHED = GIB
_SAMPLE_EVERY_S = 60.0
_STORE_LIFE_S = 4 * 3600.0
"""On average; lives are as uneven as those of jobs."""
_ASK_AGAIN_S = 300.0
_BETWEEN_STORES_S = 1.0
_TENANTS = 8
_JOB = "job"
"""Who holds what the hook of the batch system took back."""


def replay(timeline: Timeline, policy: Policy, idle_free: float, seed: int = 1) -> Outcome:
    """Runs all of it on a virtual clock. Takes seconds to minutes of CPU time.

    Raises KeyboardInterrupt upon SIGINT or SIGTERM.
    """
    before = time.process_time()
    logger = logging.getLogger("memfaas")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # thousands of donors have something to say at each time
    try:
        outcome = trio.run(_run, timeline, policy, idle_free, seed, clock=MockClock(autojump_threshold=0))
    finally:
        logger.setLevel(level)
    outcome.cpu_seconds = time.process_time() - before
    return outcome


async def _run(timeline: Timeline, policy: Policy, idle_free: float, seed: int) -> Outcome:
    """A signal ends all tasks at once: raised in the midst of them, each would tell of it."""
    outcomes: list[Outcome] = []

    async def run() -> None:
        outcomes.append(await _Replay(timeline, policy, idle_free, seed).run())

    await process.until_signal(run)
    if not outcomes:
        raise KeyboardInterrupt
    return outcomes[0]


@dataclass
class _Plan:
    """What happens on one node next; a new plan takes the place of what is still to come of the one before."""

    busy: trio.Lock = field(default_factory=trio.Lock)
    number: int = 0


class _Replay:
    def __init__(self, timeline: Timeline, policy: Policy, idle_free: float, seed: int) -> None:
        self._timeline = timeline
        self._policy = policy
        self._random = random.Random(seed)
        self._plans = [_Plan() for _ in timeline.sizes]
        nodes = [
            Node(_name(number), size, int(size * (1 - idle_free)), policy.headroom)
            for number, size in enumerate(timeline.sizes)
        ]
        spilled = int(policy.spill * sum(timeline.sizes) / SPILL_NODES)
        if spilled:
            nodes += [Node(f"scratch{number}", spilled, 0, 0, spill=True) for number in range(SPILL_NODES)]
        speeds = Speeds(link=policy.link, free=policy.free_rate, spill=SPILL_RATE)
        self._cluster = Cluster(
            nodes, speeds, Rules(policy.moves_at_once, policy.calm, policy.landing, policy.activity_counts)
        )
        self._donors = [self._cluster.donors[_name(number)] for number in range(len(timeline.sizes))]
        self._operator = Client(self._cluster.broker, auth.OPERATOR)
        self._outcome = Outcome(policy, len(timeline.sizes), timeline.seconds)
        self._nursery: trio.Nursery

    async def run(self) -> Outcome:
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._cluster.run)
            for donor, used, idle in zip(self._donors, self._timeline.used, self._timeline.idle, strict=True):
                if not idle:
                    await self._take_back(donor, used)
            await self._start_stores()
            start = trio.current_time()
            copied = self._cluster.network.sent
            self._nursery.start_soon(self._sample, start)
            for change in self._timeline.changes:
                await trio.sleep_until(start + change.at)
                self._nursery.start_soon(self._apply, change)
            await trio.sleep_until(start + self._timeline.seconds)
            self._outcome.copied = self._cluster.network.sent - copied
            self._nursery.cancel_scope.cancel()
        return self._outcome

    # --- the machine ------------------------------------------------------------------------------

    async def _apply(self, change: Change) -> None:
        donor, plan = self._donors[change.node], self._plans[change.node]
        plan.number += 1
        async with plan.busy:
            if change.kind == "begin":
                self._outcome.add_job(await self._take_back(donor, change.used))
            elif change.kind == "end":
                donor.used = change.used
                await self._look(donor)
                self._later(plan, self._policy.settle, self._lend_again, donor)
            else:
                await self._change(donor, change.used)

    async def _take_back(self, donor: SimulatedDonor, used: int) -> Reclaimed:
        """What the batch system's hook does before a job begins."""
        size = max(1, used - donor.node.base)
        request = Reclaim(donor=donor.name, size=size, deadline=self._policy.deadline, holder=_JOB, in_all=True)
        reclaimed = await self._operator.ask(request, Reclaimed)
        donor.used = used
        return reclaimed

    async def _lend_again(self, donor: SimulatedDonor) -> None:
        await self._operator.ask(Lend(donor=donor.name, holder=_JOB), Done)

    async def _change(self, donor: SimulatedDonor, used: int) -> None:
        """A job that runs touches more memory, bit by bit, or gives some back: the donor sees it on its node."""
        grows = used > donor.used
        short = 0
        while donor.used < used:
            touched = min(_TOUCHED, used - donor.used)
            short = max(short, touched - donor.memory().available)
            donor.used += touched
            self._nursery.start_soon(self._look, donor)
            await trio.sleep(touched / GROWTH_RATE)
        if grows:
            self._outcome.add_growth(short)
        else:
            donor.used = used
            await self._look(donor)

    async def _look(self, donor: SimulatedDonor) -> None:
        reclaimed = await donor.look()
        if reclaimed is not None:
            self._outcome.add(reclaimed)

    def _later(self, plan: _Plan, seconds: float, what: Callable[..., Awaitable[None]], *args: object) -> None:
        """Does it then, unless something else has happened on the node meanwhile."""
        number = plan.number

        async def wait() -> None:
            await trio.sleep(seconds)
            async with plan.busy:
                if plan.number == number:
                    await what(*args)

        self._nursery.start_soon(wait)

    async def _sample(self, start: float) -> None:
        for number in itertools.count():
            await trio.sleep_until(start + number * _SAMPLE_EVERY_S)
            memories = [donor.memory() for donor in self._donors]
            self._outcome.samples.append(
                Sample(
                    at=trio.current_time() - start,
                    free=sum(donor.node.size - donor.used for donor in self._donors),
                    offered=sum(memory.offered for memory in memories),
                    leased=sum(memory.leased for memory in memories),
                )
            )

    # --- who uses its memory ------------------------------------------------------------------------

    async def _start_stores(self) -> None:
        free = sum(donor.node.size - donor.used for donor in self._donors)
        for number in range(max(1, round(self._policy.demand * free / self._policy.store))):
            client = Client(self._cluster.broker, f"tenant{number % _TENANTS}")
            await self._nursery.start(client.run)
            self._nursery.start_soon(self._use_stores, client, number)
            await trio.sleep(_BETWEEN_STORES_S)

    async def _use_stores(self, client: Client, number: int) -> None:
        """One store after the other."""
        for count in itertools.count():
            name = f"store-{number}-{count}"
            damaged = trio.Event()
            client.on_gone = functools.partial(self._gone, client, damaged)
            request = OpenStore(name=name, size=self._policy.store, on_reclaim=self._policy.on_reclaim)
            self._outcome.stores += 1
            try:
                await client.ask(request, StoreOpened)
            except CapacityError:
                self._outcome.refused += 1
                await trio.sleep(_ASK_AGAIN_S)
                continue
            with trio.move_on_after(self._random.expovariate(1 / _STORE_LIFE_S)):
                await damaged.wait()
                self._outcome.stores_damaged += 1
            client.on_gone = _ignore
            try:
                await client.ask(DeleteStore(name=name), Done)
            except UnknownStore:
                pass  # all of it was lost

    def _gone(self, client: Client, damaged: trio.Event, notice: LeaseGone) -> None:
        if notice.dropped is None:
            damaged.set()
        else:
            self._nursery.start_soon(self._fill_again, client, notice.lease)

    async def _fill_again(self, client: Client, lease: bytes) -> None:
        """A cache uses what was dropped as soon as there is room for it again."""
        while True:
            try:
                await client.ask(Locate(lease=lease), Located)
                return
            except CapacityError:
                await trio.sleep(_ASK_AGAIN_S)
            except MemfaasError:
                return  # the store is gone


def _ignore(_: LeaseGone) -> None:
    """It is about to be deleted anyway."""


def _name(number: int) -> str:
    return f"n{number}"
