"""What came of a replay, added up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memfaas.bench.trace.policies import Policy
from memfaas.messages import Reclaimed
from memfaas.units import GIB

GROWTH_RATE = 1.0 * GIB
"""Bytes per second at which a running job touches new memory."""


@dataclass
class Sample:
    """Bytes, of the whole cluster at one time."""

    at: float
    free: int
    offered: int
    leased: int


@dataclass
class Outcome:
    """Of one policy. `add` takes what each reclaim gave back."""

    policy: Policy
    nodes: int
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    """Seconds until the memory of each job that began was free."""
    jobs_in_time: int = 0
    growths: int = 0
    """How often a running job touched more memory."""
    short: list[int] = field(default_factory=list)
    """The largest lack of free bytes while a job touched more, when there was one."""
    steps: Counter[str] = field(default_factory=Counter)
    """Bytes given back, by how."""
    pauses: list[float] = field(default_factory=list)
    """Seconds for which each lease that moved was not served."""
    copied: int = 0
    """Bytes over the network."""
    stores: int = 0
    refused: int = 0
    """How often a store was wanted and there was no room."""
    stores_damaged: int = 0
    """Stores of which a shard was lost."""
    cpu_seconds: float = 0.0
    """That the replay took."""

    def add(self, reclaimed: Reclaimed) -> None:
        for step in reclaimed.steps:
            self.steps[step.how] += step.size
            if step.how in ("migrated", "spilled"):
                self.pauses.append(step.pause)

    def add_job(self, reclaimed: Reclaimed) -> None:
        self.add(reclaimed)
        self.jobs.append(reclaimed.seconds)
        self.jobs_in_time += reclaimed.in_time

    def add_growth(self, short: int) -> None:
        """A running job touched more memory, and `short` bytes of it before they were free."""
        self.growths += 1
        if short > 0:
            self.short.append(short)

    def mean(self, what: str) -> float:
        """Of a field of the samples, over time. The samples are equally far apart."""
        return float(np.mean([getattr(sample, what) for sample in self.samples]))

    def figures(self) -> dict[str, Any]:
        """For JSON and tables. Sizes in bytes, GiB·h by name, times in seconds."""
        hours = self.seconds / 3600
        p50, p99, most = _quantiles(self.jobs)
        pause50, pause99, pause_most = _quantiles(self.pauses)
        return {
            "policy": self.policy.name,
            "free_gib_h": self.mean("free") * hours / GIB,
            "offered_share": self.mean("offered") / self.mean("free"),
            "leased_gib_h": self.mean("leased") * hours / GIB,
            "leased_share": self.mean("leased") / self.mean("free"),
            "jobs": len(self.jobs),
            "jobs_in_time": self.jobs_in_time,
            "job_p50_s": p50,
            "job_p99_s": p99,
            "job_max_s": most,
            "growths": self.growths,
            "growths_short": len(self.short),
            "largest_short": max(self.short, default=0),
            **{how: self.steps[how] for how in ("unlent", "punched", "migrated", "spilled", "dropped", "lost")},
            "copied": self.copied,
            "moves": len(self.pauses),
            "pause_p50_s": pause50,
            "pause_p99_s": pause99,
            "pause_max_s": pause_most,
            "stores": self.stores,
            "refused": self.refused,
            "stores_damaged": self.stores_damaged,
            "cpu_s": self.cpu_seconds,
        }


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p99 and the largest; zeros when there are none."""
    if not values:
        return 0.0, 0.0, 0.0
    return float(np.quantile(values, 0.5)), float(np.quantile(values, 0.99)), max(values)
