"""The figures of a file system, the bars that a mount set itself, as data, and how they are held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import msgspec

from memfaas.bench.result import Machine, Verdict
from memfaas.bench.stats import paired_ratio

FLOOR = "bare pyfuse3"
SHM, TCP = "memfaas, shm", "memfaas, tcp"

RANDOM = ("random reads, 4 KiB, direct", "random writes, 4 KiB, direct")
IN_ORDER = ("reads in order, 1 MiB, direct", "reads in order, 1 MiB", "writes in order, 1 MiB")
LISTED = "names listed, of many"

PUBLISHED = {
    "JuiceFS, published": {"random reads, 4 KiB, direct": 25_000.0, "creates": 1_400.0, "stats": 5_000.0},
}
"""What others say of themselves, with a local Redis, and their own cache for reads: no run of ours on this machine."""


class System(msgspec.Struct, kw_only=True):
    """`per_s`: operations in a second, by what was done; one entry for each round."""

    name: str
    per_s: dict[str, list[float]] = {}
    skipped: str | None = None

    def median(self, operation: str) -> float | None:
        found = self.per_s.get(operation)
        return median(found) if found else None


class FsResult(msgspec.Struct, kw_only=True):
    """Everything about one run. `listed`: how many names a folder had that was listed."""

    schema: Literal["memfaas-bench-fs/1"] = "memfaas-bench-fs/1"
    started: str
    seconds: float
    listed: int
    machine: Machine
    systems: list[System]
    published: dict[str, dict[str, float]] = msgspec.field(default_factory=lambda: PUBLISHED)
    verdicts: list[Verdict] = []

    def system(self, name: str) -> System | None:
        return next((system for system in self.systems if system.name == name), None)


@dataclass(frozen=True)
class Bar:
    """The rate of each of `operations` by `subject`, divided by that of what it is `against`, is `least` at least.

    Without anything to be against, it is the rate in a second that is `least` at least.
    """

    text: str
    subject: str
    operations: tuple[str, ...]
    least: float
    against: str | None = None


BARS = (
    Bar("shm: 0.8 of bare pyfuse3, random", SHM, RANDOM, 0.8, FLOOR),
    Bar("shm: 0.9 of bare pyfuse3, in order", SHM, IN_ORDER, 0.9, FLOOR),
    Bar("tcp: 0.7 of bare pyfuse3", TCP, RANDOM + IN_ORDER, 0.7, FLOOR),
    Bar("shm: 3000 creates in a second", SHM, ("creates",), 3_000),
    Bar("shm: 15000 stats in a second", SHM, ("stats",), 15_000),
    Bar("shm: 100000 names listed in 2 s", SHM, (LISTED,), 50_000),
)


def judge(result: FsResult, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Every bar held against every figure it covers."""
    return [_verdict(result, bar, operation) for bar in bars for operation in bar.operations]


def _verdict(result: FsResult, bar: Bar, operation: str) -> Verdict:
    subject, against = result.system(bar.subject), result.system(bar.against or "")
    rates = subject.per_s.get(operation) if subject is not None else None
    base = against.per_s.get(operation) if against is not None else None
    figure = None
    if rates and bar.against is None:
        figure = median(rates)
    elif rates and base:
        figure = paired_ratio(rates, base)
    return Verdict(
        bar=bar.text,
        op=operation,
        size=None,
        figure=figure,
        threshold=bar.least,
        passed=None if figure is None else figure >= bar.least,
        note="" if figure is not None else "not measured in this run",
    )
