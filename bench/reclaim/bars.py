"""The bars for giving memory back, as data, and how a run is held against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from memfaas.bench.reclaim import ways
from memfaas.bench.reclaim.pages import Pages
from memfaas.bench.reclaim.result import ReclaimResult, Row
from memfaas.bench.result import Verdict
from memfaas.bench.stats import paired_ratio


@dataclass(frozen=True)
class Bar:
    """The time of `way` divided by that of the fastest of `limits` in the same turn, at the median, at most `most`."""

    text: str
    way: str
    limits: tuple[str, ...]
    most: float


@dataclass(frozen=True)
class FirstBar:
    """Seconds until the first byte of a lease, at the median."""

    text: str
    what: str
    most: float


LENT_MEMORY = (ways.PUNCH_HOLE, ways.TRUNCATE)
"""What frees shared memory. Private memory of 4 KiB pages comes back faster, but cannot be lent."""

BARS: tuple[Bar, ...] = (
    Bar("unlent: at most 1.3 x the bare limit", ways.UNLENT, LENT_MEMORY, 1.3),
    Bar("punched: at most 1.3 x the bare limit", ways.PUNCHED, LENT_MEMORY, 1.3),
    Bar("dropped: at most 1.3 x the bare limit", ways.DROPPED, LENT_MEMORY, 1.3),
    Bar("migrated: at most 1.3 x a bare copy", ways.MIGRATED, (ways.COPY,), 1.3),
)
FIRST_BARS: tuple[FirstBar, ...] = (
    FirstBar("first lease from the warm pool: 100 ms", ways.FROM_POOL, 0.1),
    FirstBar("first lease of a donor that lends 8 GiB: 1 s after its start", ways.FROM_START, 1.0),
)


def judge(result: ReclaimResult) -> list[Verdict]:
    """Every bar held against every figure that it covers."""
    sizes = sorted({(row.size, row.pages) for row in result.rows})
    verdicts = [_judge(result, bar, size, pages) for bar in BARS for size, pages in sizes]
    return verdicts + [_judge_first(result, bar) for bar in FIRST_BARS]


def ratio(subject: Row, limits: Sequence[Row]) -> float | None:
    """The median over turns of the subject's time / the fastest limit's; None without a turn that has both."""
    turns = zip(*(limit.seconds for limit in limits), strict=True)
    best = [min((seconds for seconds in turn if seconds is not None), default=None) for turn in turns]
    return paired_ratio(subject.seconds, best) if best else None


def _judge(result: ReclaimResult, bar: Bar, size: int, pages: Pages) -> Verdict:
    subject = result.row(bar.way, size, pages)
    limits = [row for way in bar.limits if (row := result.row(way, size, pages)) is not None]
    if subject is None or not limits:
        return Verdict(bar=bar.text, op=pages, size=size, figure=None, threshold=bar.most, passed=None, note="not run")
    notes = [f"{row.way} skipped: {row.skipped}" for row in (subject, *limits) if row.skipped is not None]
    figure = ratio(subject, limits)
    passed = None if figure is None else figure <= bar.most
    note = "; ".join(notes)
    return Verdict(bar=bar.text, op=pages, size=size, figure=figure, threshold=bar.most, passed=passed, note=note)


def _judge_first(result: ReclaimResult, bar: FirstBar) -> Verdict:
    first = next((first for first in result.firsts if first.what == bar.what), None)
    figure, note = None, "not run"
    if first is not None:
        figure = median(first.seconds) if first.seconds else None
        note = f"{bar.what} skipped: {first.skipped}" if first.skipped is not None else ""
    passed = None if figure is None else figure <= bar.most
    return Verdict(bar=bar.text, op="", size=None, figure=figure, threshold=bar.most, passed=passed, note=note)
