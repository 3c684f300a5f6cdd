"""Jobs on single nodes that add up to the series of a machine.

The trace has sums only: how many nodes are idle, how much memory jobs use. Who starts where and when
is drawn by chance, so that at every sample the sums are those of the trace, and idle periods last as
long as those of the machine did (`IDLE_PERIODS`). What the trace cannot tell is assumed: how many
nodes a job has (`_LARGEST_JOB`), and that a job's memory changes at any time of its life.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from memfaas.bench.trace.machine import Floats, Series
from memfaas.units import GIB

IDLE_PERIODS = ((40.0, 0.0), (300.0, 0.31), (600.0, 0.57), (1200.0, 0.77), (1800.0, 0.845), (7200.0, 0.97))
"""Seconds, and the share of idle periods that are shorter; between two of them, even in the logarithm. What
is drawn is a little longer than what the machine showed, for a sudden need of nodes ends periods early."""
_LONGEST_IDLE = 86_400.0
NODE_SIZES = ((64 * GIB, 0.75), (128 * GIB, 0.25))
"""Memory of a node, and the share of the nodes that have it."""
_LARGEST_JOB = 256
"""Nodes; sizes up to it are drawn even in the logarithm."""
_TOLERANCE = 0.002
"""Share of the memory in use by which the sum may be off before jobs change theirs."""
_MOST_OF_A_NODE = 0.95

Kind = Literal["begin", "change", "end"]


class Change(NamedTuple):
    """Something that happens on a node."""

    at: float
    """Seconds from the start."""
    node: int
    kind: Kind
    job: int
    used: int
    """Bytes in use on this node from now on."""


@dataclass(frozen=True)
class Timeline:
    """What happens on all nodes, in order."""

    sizes: list[int]
    """Bytes of memory, by node."""
    used: list[int]
    """Bytes in use at the start, by node."""
    idle: list[bool]
    """Whether no job runs at the start, by node."""
    changes: list[Change]
    seconds: float


@dataclass
class _Job:
    number: int
    nodes: list[int]
    share: float
    """Of each node's memory."""


@dataclass
class _State:
    """Between two samples."""

    jobs: dict[int, _Job] = field(default_factory=dict)
    leaving: list[tuple[float, int]] = field(default_factory=list)
    """A heap: when an idle node gets its next job, by what was drawn, and the node."""
    order: list[int] = field(default_factory=list)
    """The jobs' numbers, in any order, to choose from."""


def draw_idle_period(chance: float) -> float:
    """The idle period at this quantile, in seconds."""
    points = (*IDLE_PERIODS, (_LONGEST_IDLE, 1.0))
    logs = [math.log(seconds) for seconds, _ in points]
    return math.exp(float(np.interp(chance, [share for _, share in points], logs)))


class Generator:
    """Draws the jobs of `nodes` nodes, the same for the same seed."""

    def __init__(self, series: Series, nodes: int, seed: int = 1) -> None:
        self._series = series
        self._nodes = nodes
        self._random = np.random.default_rng(seed)
        sizes, shares = zip(*NODE_SIZES, strict=True)
        self._sizes = [int(size) for size in self._random.choice(sizes, nodes, p=shares)]
        self._base = 1 - series.idle_free
        self._next_job = 0
        self._state = _State()

    def timeline(self) -> Timeline:
        series = self._series
        used, idle = self._start()
        changes: list[Change] = []
        for step in range(1, len(series.times)):
            begin, end = float(series.times[step - 1]), float(series.times[step])
            changes += self._step(begin, end, round(series.idle[step] * self._nodes), float(series.used[step]))
        changes.sort(key=lambda change: change.at)
        return Timeline(self._sizes, used, idle, changes, series.seconds)

    def _start(self) -> tuple[list[int], list[bool]]:
        order = [int(node) for node in self._random.permutation(self._nodes)]
        count = round(self._series.idle[0] * self._nodes)
        for node in order[:count]:  # each is somewhere within its period
            heapq.heappush(self._state.leaving, (self._random.random() * self._period(), node))
        busy = order[count:]
        while busy:
            self._new_job([busy.pop() for _ in range(min(len(busy), self._job_size()))], float(self._series.used[0]))
        self._fit_memory(0.0, 0.0, float(self._series.used[0]), set())
        used = [self._bytes(node, self._base) for node in range(self._nodes)]
        for job in self._state.jobs.values():
            for node in job.nodes:
                used[node] = self._bytes(node, job.share)
        idle = [False] * self._nodes
        for node in order[:count]:
            idle[node] = True
        return used, idle

    # --- from one sample to the next --------------------------------------------------------------

    def _step(self, begin: float, end: float, idle: int, used: float) -> Iterator[Change]:
        ready: list[tuple[float, int]] = []
        while self._state.leaving and self._state.leaving[0][0] <= end:
            until, node = heapq.heappop(self._state.leaving)
            ready.append((max(begin, until), node))
        while len(self._state.leaving) > idle:  # more are needed: those that were next anyway
            _, node = heapq.heappop(self._state.leaving)
            ready.append((self._between(begin, end), node))
        ready.sort()
        new = set()
        missing = idle - len(self._state.leaving)
        while ready:
            group = [ready.pop(0) for _ in range(min(len(ready), self._job_size()))]
            job = self._new_job([node for _, node in group], used)
            new.add(job.number)
            for node in job.nodes:
                yield Change(group[-1][0], node, "begin", job.number, self._bytes(node, job.share))
        while missing > 0:
            at = self._between(begin, end)
            job, released = self._release(missing, new)
            missing -= len(released)
            for node in released:
                heapq.heappush(self._state.leaving, (at + self._period(), node))
                yield Change(at, node, "end", job.number, self._bytes(node, self._base))
        yield from self._fit_memory(begin, end, used, new)

    def _new_job(self, nodes: list[int], used: float) -> _Job:
        more = float(self._random.gamma(1.2, max(0.01, used - self._base) / 1.2))
        job = _Job(self._next_job, nodes, min(_MOST_OF_A_NODE, self._base + more))
        self._next_job += 1
        self._state.jobs[job.number] = job
        self._state.order.append(job.number)
        return job

    def _release(self, most: int, new: set[int]) -> tuple[_Job, list[int]]:
        """Some job ends, on no more than so many nodes; of those that have just begun only for want of others."""
        order = self._state.order
        while True:
            place = int(self._random.integers(len(order)))
            job = self._state.jobs[order[place]]
            if job.number not in new or len(order) <= len(new):
                break
        released, job.nodes = job.nodes[:most], job.nodes[most:]
        if not job.nodes:
            order[place] = order[-1]
            order.pop()
            del self._state.jobs[job.number]
        return job, released

    def _fit_memory(self, begin: float, end: float, used: float, new: set[int]) -> Iterator[Change]:
        """Running jobs change what they use until the sum is right."""
        weight = sum(self._sizes[node] for job in self._state.jobs.values() for node in job.nodes)
        now = sum(job.share * self._sizes[node] for job in self._state.jobs.values() for node in job.nodes)
        missing = used * weight - now
        changes: list[Change] = []
        for place in self._random.permutation(len(self._state.order)):
            if abs(missing) <= _TOLERANCE * used * weight:
                break
            job = self._state.jobs[self._state.order[place]]
            if job.number in new:
                continue
            size = sum(self._sizes[node] for node in job.nodes)
            limit = _MOST_OF_A_NODE if missing > 0 else self._base
            by = (limit - job.share) * float(self._random.uniform(0.1, 0.5))
            if abs(by * size) > abs(missing):
                by = missing / size
            job.share += by
            missing -= by * size
            at = self._between(begin, end)
            changes += [Change(at, node, "change", job.number, self._bytes(node, job.share)) for node in job.nodes]
        return iter(changes)

    # --- chance -----------------------------------------------------------------------------------

    def _period(self) -> float:
        return draw_idle_period(float(self._random.random()))

    def _job_size(self) -> int:
        return int(math.exp(float(self._random.uniform(0, math.log(_LARGEST_JOB + 1)))))

    def _between(self, begin: float, end: float) -> float:
        return float(self._random.uniform(begin, end))

    def _bytes(self, node: int, share: float) -> int:
        return int(share * self._sizes[node])


def sums(timeline: Timeline, times: Floats) -> tuple[Floats, Floats]:
    """Idle share of the nodes, and share of memory that is in use on the others, at these times."""
    used, idle = list(timeline.used), list(timeline.idle)
    changes = iter(timeline.changes)
    change = next(changes, None)
    idle_shares, used_shares = np.empty(len(times)), np.empty(len(times))
    for place, time in enumerate(times):
        while change is not None and change.at <= time:
            used[change.node] = change.used
            idle[change.node] = change.kind == "end"
            change = next(changes, None)
        busy = [node for node, free in enumerate(idle) if not free]
        idle_shares[place] = 1 - len(busy) / len(idle)
        used_shares[place] = sum(used[node] for node in busy) / sum(timeline.sizes[node] for node in busy)
    return idle_shares, used_shares


def idle_periods(timeline: Timeline) -> list[float]:
    """Seconds of every idle period that both began and ended."""
    since: dict[int, float] = {}
    periods = []
    for change in timeline.changes:
        if change.kind == "end":
            since[change.node] = change.at
        elif change.kind == "begin" and change.node in since:
            periods.append(change.at - since.pop(change.node))
    return periods
