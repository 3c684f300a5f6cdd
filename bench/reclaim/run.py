"""The interleaved run: in every turn each way frees so much memory once, in another order each time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product

from memfaas.bench.reclaim import lent, limits, ways
from memfaas.bench.reclaim.bars import judge
from memfaas.bench.reclaim.helper import HelperError
from memfaas.bench.reclaim.pages import ALL, Pages, Turns, turns
from memfaas.bench.reclaim.raw import Raw, WrongPagesError
from memfaas.bench.reclaim.result import First, Kind, ReclaimResult, Row
from memfaas.bench.result import this_machine
from memfaas.errors import MemfaasError
from memfaas.node import mem_available
from memfaas.units import GIB, MIB, format_size

SIZES = (256 * MIB, GIB, 4 * GIB)
ROUNDS = 3
_SMALL_TURNS = 4
"""Turns of a size in each round, at most: as many as do not take longer than one of the largest size."""
_MARGIN = 1 * GIB
"""Of the machine's memory, for everything else."""
FIRSTS = 10

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Way:
    """`run` takes so much memory of such pages, gives it back once, and returns the seconds that took."""

    name: str
    kind: Kind
    run: Callable[[int, Pages], float]
    copies: int = 1
    """How many times the size it needs at once."""


WAYS: tuple[Way, ...] = (
    Way(ways.PUNCH_HOLE, "limit", limits.punch),
    Way(ways.TRUNCATE, "limit", limits.truncate),
    Way(ways.MUNMAP, "limit", limits.unmap),
    Way(ways.KILL, "limit", limits.kill),
    Way(ways.COPY, "limit", limits.copy_to_fresh, copies=2),
    Way(ways.COPY_POPULATED, "limit", limits.copy_to_populated, copies=2),
    Way(ways.WRITE, "limit", limits.write, copies=2),
    Way(ways.UNLENT, "memfaas", lent.unlent),
    Way(ways.PUNCHED, "memfaas", lent.punched, copies=2),
    Way(ways.DROPPED, "memfaas", lent.dropped),
    Way(ways.MIGRATED, "memfaas", lent.migrated, copies=2),
    Way(ways.SPILLED, "memfaas", lent.spilled, copies=2),
)


class Run:
    """Measures the ways in turns. A way that fails takes part no more, and its row says why."""

    def __init__(self, chosen: Sequence[Way], sizes: Sequence[int], available: int, rng: random.Random) -> None:
        self._ways = chosen
        self._rng = rng
        self._rows = {
            (way.name, size, pages): Row(way=way.name, kind=way.kind, size=size, pages=pages)
            for size, pages, way in product(sizes, ALL, chosen)
        }
        for way, size, pages in product(chosen, sizes, ALL):
            needed = way.copies * size + _MARGIN
            if needed > available:
                why = f"needs {format_size(needed)}, and {format_size(available)} are available"
                self._rows[way.name, size, pages].skipped = why

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def most(self) -> int:
        """Bytes that a way of this run takes at once, at most."""
        taking = (
            way.copies * row.size
            for way in self._ways
            for row in self.rows
            if (row.way, row.skipped) == (way.name, None)
        )
        return max(taking, default=0)

    def run(self, rounds: int, choose: Turns, report: Report) -> None:
        sizes = sorted({size for _, size, _ in self._rows})
        plan = [case for size in sizes for case in product([size], ALL) for _ in range(_turns(size, sizes[-1]))]
        for number in range(rounds):
            self._rng.shuffle(plan)
            for index, (size, pages) in enumerate(plan):
                done = (number + index / len(plan)) / rounds
                report(done, f"{format_size(size)} in pages of {pages}")
                self._turn(size, pages, choose)

    def _turn(self, size: int, pages: Pages, choose: Turns) -> None:
        for way in self._rng.sample(self._ways, len(self._ways)):
            row = self._rows[way.name, size, pages]
            figure = None
            if row.skipped is None:
                try:
                    choose.take(pages)
                    figure = way.run(size, pages)
                except (MemfaasError, HelperError, WrongPagesError, lent.NotSo, OSError) as error:
                    row.skipped = str(error)
            row.seconds.append(figure)


def _turns(size: int, largest: int) -> int:
    return max(1, min(_SMALL_TURNS, largest // size))


def measure_reclaim(
    sizes: Sequence[int] = SIZES,
    rounds: int = ROUNDS,
    firsts: int = FIRSTS,
    chosen: Sequence[Way] = WAYS,
    report: Report = lambda share, doing: None,
) -> ReclaimResult:
    """Measure all ways side by side, and how fast first leases are served. Verdicts are in the result."""
    machine, started, begin = this_machine(), datetime.now(), time.monotonic()
    seed = random.SystemRandom().randrange(1 << 32)
    run = Run(chosen, sorted(sizes), mem_available(), random.Random(seed))
    with turns() as choose:
        report(0.0, "touching the memory")
        _touch(min(2 * run.most, max(0, mem_available() - _MARGIN)))
        run.run(rounds, choose, report)
    first = [
        _first(ways.FROM_POOL, lent.first_from_pool, firsts, report),
        _first(ways.FROM_START, lent.first_from_start, firsts, report),
    ]
    machine.load_after = this_machine().load_before
    result = ReclaimResult(
        started=started.isoformat(sep=" ", timespec="seconds"),
        seconds=time.monotonic() - begin,
        seed=seed,
        machine=machine,
        rows=run.rows,
        firsts=first,
    )
    result.verdicts = judge(result)
    return result


def _first(what: str, measure: Callable[[], float], count: int, report: Report) -> First:
    first = First(what=what)
    try:
        for _ in range(count):
            report(1.0, what)
            first.seconds.append(measure())
    except (MemfaasError, lent.NotSo, OSError) as error:  # what was measured before must not be lost
        first.skipped = str(error)
    return first


def _touch(size: int) -> None:
    """In a virtual machine, the first use ever of a page costs much more than the next ones."""
    if size:
        memory = Raw(size // MIB * MIB, "4 KiB", shared=False)
        memory.populate()
        memory.close()
