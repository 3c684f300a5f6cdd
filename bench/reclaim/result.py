"""What a run of `memfaas bench reclaim` found out, as it is written to and read from the JSON file."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

from memfaas.bench.reclaim.pages import Pages
from memfaas.bench.result import Machine, Verdict
from memfaas.bench.stats import quantile

Kind = Literal["memfaas", "limit"]


class Row(msgspec.Struct, kw_only=True):
    """One way to get so much memory back. `seconds` has one entry for each turn, None where there is no figure."""

    way: str
    kind: Kind
    size: int
    pages: Pages
    seconds: list[float | None] = []
    skipped: str | None = None
    """Why it did not take part, or takes part no more."""

    def measured(self) -> list[float]:
        return [seconds for seconds in self.seconds if seconds is not None]

    @property
    def p50(self) -> float | None:
        return median(found) if (found := self.measured()) else None

    @property
    def p99(self) -> float | None:
        """Of fewer than 100 figures the largest."""
        return quantile(found, 0.99) if (found := self.measured()) else None


class First(msgspec.Struct, kw_only=True):
    """Seconds until the first byte of a lease was served."""

    what: str
    seconds: list[float] = []
    skipped: str | None = None


class ReclaimResult(msgspec.Struct, kw_only=True):
    """Everything about one run."""

    schema: Literal["memfaas-bench-reclaim/1"] = "memfaas-bench-reclaim/1"
    started: str
    seconds: float
    seed: int
    machine: Machine
    rows: list[Row]
    firsts: list[First]
    verdicts: list[Verdict] = []

    def row(self, way: str, size: int, pages: Pages) -> Row | None:
        for row in self.rows:
            if (row.way, row.size, row.pages) == (way, size, pages):
                return row
        return None


def read(path: Path) -> ReclaimResult:
    """Read a JSON file. Raises msgspec.ValidationError when it is no result of this version."""
    return msgspec.json.decode(path.read_bytes(), type=ReclaimResult)
