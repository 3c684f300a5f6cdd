"""The interleaved run: every round visits every case, and in it every system, each time in another order.

A machine that is slow for some seconds then slows all systems of a case, and the ratios within a
round stay what they are.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from memfaas.bench.crew import Crew, CrewError, CrewLost
from memfaas.bench.measure import Slice
from memfaas.bench.plan import Case
from memfaas.bench.result import Cell, Round
from memfaas.bench.stats import fairness, quantile, thin

SHARED_FACTOR = 3
"""A slice with several clients is this much longer: what each of them gets shows only over scheduler periods."""

LEAST_OPS = 3
"""Slices are stretched until about so many operations fit."""

WANTED_ROUNDS = 8
LEAST_ROUNDS = 3
SHORTEST_SLICE_S = 0.01
LONGEST_SLICE_S = 0.25
LONGEST_STRETCH_S = 0.5
MOST_SINGLES = 2000
"""Of one slice; a sample is kept."""

Report = Callable[[float, str], None]
"""Called with the share of the budget that is used, and what is done now."""


@dataclass
class _Tally:
    """What has been found out about one system and case."""

    rounds: list[Round | None] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)
    operations: int = 0
    op_ns: float = 0.0
    failed: str | None = None


class Interleaved:
    """One run over these crews and cases."""

    def __init__(
        self,
        crews: Sequence[Crew],
        cases: Sequence[Case],
        rng: random.Random,
        *,
        now: Callable[[], float] = time.monotonic,
        report: Report = lambda share, doing: None,
    ) -> None:
        self._crews = list(crews)
        self._rng = rng
        self._now = now
        self._report = report
        self._cases = [case for case in cases if any(crew.can(case) for crew in crews)]
        self._tallies = {(crew.name, case): _Tally() for case in self._cases for crew in crews if crew.can(case)}
        self.lost: dict[str, str] = {}
        """Systems that went away during the run, with the reason."""
        self.rounds = 0

    def run(self, budget_s: float, least_rounds: int = LEAST_ROUNDS) -> None:
        """Load, then measure in rounds until the budget is used up, but at least `least_rounds` times."""
        for crew in self._crews:
            crew.rest()
        self._load()
        start = self._now()
        slice_s = self._slice_length(budget_s)
        while self._anything_left() and (
            self.rounds < least_rounds or (self._now() - start) * (self.rounds + 1) / self.rounds <= budget_s
        ):
            self._round(slice_s, lambda: (self._now() - start) / budget_s)
            self.rounds += 1

    def cells(self) -> list[Cell]:
        """The figures so far."""
        return [_cell(system, case, tally) for (system, case), tally in self._tallies.items()]

    def _load(self) -> None:
        for size in sorted({case.size for case in self._cases}):
            for crew in self._crews:
                mine = [case for case in self._cases if case.size == size and self._active(crew, case)]
                if not mine:
                    continue
                self._report(0.0, f"loading {crew.name}")
                try:
                    crew.load(size, max(case.clients for case in mine))
                except CrewError as error:
                    self._fail(crew, mine, error)
                crew.rest()

    def _slice_length(self, budget_s: float) -> float:
        """Seconds of one slice of one client, so that about the wanted number of rounds fit."""
        weights = sum(SHARED_FACTOR if case.clients > 1 else 1 for _, case in self._tallies)
        # A fifth of the time goes to preparing and to slices that are stretched.
        fitting = 0.8 * budget_s / (WANTED_ROUNDS * max(1, weights))
        return min(LONGEST_SLICE_S, max(SHORTEST_SLICE_S, fitting))

    def _round(self, slice_s: float, used: Callable[[], float]) -> None:
        cases = self._rng.sample(self._cases, len(self._cases))
        for case in cases:
            crews = [crew for crew in self._crews if (crew.name, case) in self._tallies]
            self._rng.shuffle(crews)
            for crew in crews:
                tally = self._tallies[crew.name, case]
                figures = None
                if self._active(crew, case):
                    self._report(used(), crew.name)
                    figures = self._measure(crew, case, tally, slice_s)
                tally.rounds.append(figures)

    def _measure(self, crew: Crew, case: Case, tally: _Tally, slice_s: float) -> Round | None:
        try:
            tally.op_ns = crew.prepare(case)
            slices = crew.run(case, self._window(case, tally.op_ns, slice_s))
        except CrewError as error:
            self._fail(crew, [case], error)
            return None
        finally:
            crew.rest()
        tally.operations += sum(part.ops for part in slices) * case.batch
        for part in slices:
            tally.singles += thin(part.singles, MOST_SINGLES, self._rng)
        return figures_of(slices, case.batch)

    def _window(self, case: Case, op_ns: float, slice_s: float) -> float:
        wanted = slice_s * (SHARED_FACTOR if case.clients > 1 else 1)
        stretched = LEAST_OPS * case.clients * op_ns / 1e9
        return max(wanted, min(stretched, LONGEST_STRETCH_S))

    def _anything_left(self) -> bool:
        return any(tally.failed is None for tally in self._tallies.values())

    def _active(self, crew: Crew, case: Case) -> bool:
        tally = self._tallies.get((crew.name, case))
        return tally is not None and tally.failed is None

    def _fail(self, crew: Crew, cases: Sequence[Case], error: CrewError) -> None:
        if isinstance(error, CrewLost):
            self.lost[crew.name] = str(error)
            cases = self._cases
        for case in cases:
            if self._active(crew, case):
                self._tallies[crew.name, case].failed = str(error)


def figures_of(slices: Sequence[Slice], batch: int = 1) -> Round:
    """One round's figures from what each client did; of a batch, per key."""
    rates = [part.ops * batch / part.elapsed_ns * 1e9 for part in slices]
    times = [t for part in slices for t in part.blocks]
    return Round(median_us=median(times) / batch / 1e3, rate=sum(rates), fairness=fairness(rates))


def _cell(system: str, case: Case, tally: _Tally) -> Cell:
    cell = Cell(system=system, op=case.op, size=case.size, clients=case.clients, batch=case.batch)
    cell.rounds, cell.failed, cell.operations = tally.rounds, tally.failed, tally.operations
    rounds = [figures for figures in tally.rounds if figures is not None]
    if rounds:
        cell.median_us = median(figures.median_us for figures in rounds)
        cell.p99_us = quantile(tally.singles, 0.99) / case.batch / 1e3
        cell.p99_samples = len(tally.singles)
        cell.rate = median(figures.rate for figures in rounds)
        cell.bytes_per_s = cell.rate * case.size
        cell.fairness = median(figures.fairness for figures in rounds) if case.clients > 1 else None
    return cell
