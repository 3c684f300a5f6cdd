"""The bars of the verbs fabric, as data, and the figures that they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import msgspec

from memfaas.bench.result import Machine, Verdict
from memfaas.bench.stats import paired_difference, paired_ratio
from memfaas.units import KIB, MIB

SIZES = (8, 4 * KIB, 64 * KIB, MIB)
SMALL = SIZES[:2]
VALUE = 4 * KIB
"""Bytes of what stores get and put."""
BLOCK = VALUE + 576
"""Bytes of the block that it lies in, which is what a get READs: one packet more, where packets have 4 KiB."""
BATCH = 64

OURS = "memfaas"
BARE = "bare loop in C"
PYVERBS = "pyverbs"
PERFTEST = "perftest, many at once"
PERFTEST_LATENCY = "perftest, one by one"
NULL_OURS = "memfaas, no device"
NULL_BARE = "bare loop in C, no device"
"""Over a verbs library that does everything at once, by a copy: what is left is the software's time."""

Op = Literal["read", "write", "get", "get, not seen before", "put", "exchange", "get in batches", "put in batches"]
"""exchange: a WRITE, a SEND behind it and an answer, both ends blocking: the least that a put needs."""


class SkippedError(Exception):
    """A way cannot take part here; the text says why."""


class Row(msgspec.Struct, kw_only=True):
    """One way to do one operation. `us`: microseconds of one (of a batch: of one key), one entry for each round."""

    way: str
    op: Op
    size: int
    us: list[float | None] = []
    skipped: str | None = None

    @property
    def median_us(self) -> float | None:
        found = [one for one in self.us if one is not None]
        return median(found) if found else None


class VerbsResult(msgspec.Struct, kw_only=True):
    """Everything about one run. `device`: NAME:PORT:GID, or empty when there is none."""

    schema: Literal["memfaas-bench-verbs/1"] = "memfaas-bench-verbs/1"
    started: str
    seconds: float
    device: str
    machine: Machine
    rows: list[Row]
    verdicts: list[Verdict] = []

    def row(self, way: str, op: Op, size: int) -> Row | None:
        return next((row for row in self.rows if (row.way, row.op, row.size) == (way, op, size)), None)


@dataclass(frozen=True)
class Bar:
    """The time of `op` by memfaas, divided by that of what it is `against`, is `most` at most.

    `added`: what is judged is the difference of the two, in microseconds.
    """

    text: str
    op: Op
    against: tuple[str, Op]
    most: float
    sizes: tuple[int, ...] = (VALUE,)
    subject: str = OURS
    added: bool = False
    against_size: int | None = None
    """None: the same."""


def _adds(op: Op, against: Op, sizes: tuple[int, ...]) -> Bar:
    text = f"no device: {op} adds at most 2 us to the bare loop"
    return Bar(text, op, (NULL_BARE, against), 2.0, sizes, subject=NULL_OURS, added=True)


BARS: tuple[Bar, ...] = (
    Bar("READ: at most 1.2 x the bare loop", "read", (BARE, "read"), 1.2, SIZES),
    Bar("WRITE: at most 1.2 x the bare loop", "write", (BARE, "write"), 1.2, SIZES),
    Bar("READ: 0.9 of ib_read_bw", "read", (PERFTEST, "read"), 1 / 0.9, SIZES[2:]),
    Bar("WRITE: 0.9 of ib_write_bw", "write", (PERFTEST, "write"), 1 / 0.9, SIZES[2:]),
    Bar("get, its place known: at most 1.3 x one READ", "get", (BARE, "read"), 1.3),
    Bar("get, its place known: at most 1.3 x one READ of its block", "get", (BARE, "read"), 1.3, against_size=BLOCK),
    Bar("get, its place not known: at most 2.3 x one READ", "get, not seen before", (BARE, "read"), 2.3),
    Bar("put: at most 1.3 x WRITE, SEND and answer", "put", (BARE, "exchange"), 1.3),
    Bar(f"get, batches of {BATCH}: 8 x the single rate", "get in batches", (OURS, "get"), 1 / 8),
    Bar(f"put, batches of {BATCH}: 8 x the single rate", "put in batches", (OURS, "put"), 1 / 8),
    _adds("read", "read", SMALL),
    _adds("write", "write", SMALL),
    _adds("get", "read", (VALUE,)),
    _adds("put", "exchange", (VALUE,)),
)


def judge(result: VerbsResult, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Every bar held against every figure that it covers."""
    return [_judge(result, bar, size) for bar in bars for size in bar.sizes]


def _judge(result: VerbsResult, bar: Bar, size: int) -> Verdict:
    subject, limit = result.row(bar.subject, bar.op, size), result.row(*bar.against, bar.against_size or size)
    why = [f"{row.way} skipped: {row.skipped}" for row in (subject, limit) if row is not None and row.skipped]
    compare = paired_difference if bar.added else paired_ratio
    figure = compare(subject.us, limit.us) if subject is not None and limit is not None else None
    return Verdict(
        bar=bar.text,
        op=bar.op,
        size=size,
        figure=figure,
        threshold=bar.most,
        passed=None if figure is None else figure <= bar.most,
        note="; ".join(why) or ("" if figure is not None else "not measured in this run"),
    )
