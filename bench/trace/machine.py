"""What a whole machine looked like: samples of how many nodes were idle, and of how much memory was used.

`read` takes the trace of Piz Daint (two weeks of March 2022, a sample about every 100 s) from the public
artifact of "Software Resource Disaggregation for HPC with Serverless Computing": the folder
data/daint_utilization of github.com/spcl/serverless-software-disaggregation-artifact. It has no licence,
so it is not here. `like_daint` draws a machine with the same statistics.

Nodes that are down or drained are left out: they lend nothing and need nothing.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memfaas.errors import UsageError

_COLUMNS = ("partially_free_mem", "free_mem", "allocated_nodes", "idle_nodes", "total_nodes")
_SMOOTH = 9
"""Samples. Memory and nodes were not asked for at the same moment, so each sample of what jobs use is off a little."""
_LEAST_USED, _MOST_USED = 0.08, 0.6

_SAMPLE_S = 100.0
# What the trace has, fitted; the first two are mean and deviation of the natural logarithm.
_LOG_IDLE = (-3.32, 1.02)
_LOG_USED = (-1.85, 0.26)
_IDLE_MEMORY_S = (50.0, 3600.0, 10_800.0, 43_200.0)
_USED_MEMORY_S = (57_600.0,)
_IDLE_RANGE = (0.002, 0.45)
_IDLE_FREE = 0.927

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Samples of a machine in service. All arrays have the same length."""

    times: Floats
    """Seconds from the first sample."""
    idle: Floats
    """Share of the nodes in service on which no job runs."""
    used: Floats
    """Share of their nodes' memory that jobs (and what runs beside them) use."""
    idle_free: float
    """Share of an idle node's memory that is free."""

    @property
    def seconds(self) -> float:
        return float(self.times[-1])

    def free(self) -> Floats:
        """Share of all memory in service that is free."""
        return self.idle * self.idle_free + (1 - self.idle) * (1 - self.used)

    def part(self, start: float, seconds: float) -> Series:
        """From `start` on for so long. Raises UsageError when the trace does not reach so far."""
        if start < 0 or seconds <= 0 or start + seconds > self.seconds:
            raise UsageError(f"the trace has {self.seconds / 3600:.1f} h; the part asked for is beyond its end")
        inside = (self.times >= start) & (self.times <= start + seconds)
        if inside.sum() < 2:
            raise UsageError("a part of the trace needs two samples, which are about 100 s apart")
        times = self.times[inside]
        return Series(times - times[0], self.idle[inside], self.used[inside], self.idle_free)


def read(path: Path) -> Series:
    """A CSV file, or a folder of them (`out_*.csv`), in any order. Raises UsageError for what is no such trace."""
    files = sorted(path.glob("out_*.csv")) if path.is_dir() else [path]
    try:
        rows = [row for file in files for row in csv.DictReader(io.StringIO(file.read_text()))]
        samples = {_time(row): row for row in rows}
        times = np.array(sorted(samples))
        column = {name: np.array([float(samples[time][name]) for time in times]) for name in _COLUMNS}
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is not a trace of a machine: {error!r}") from error
    if len(times) < _SMOOTH:
        raise UsageError(f"{path} is not a trace of a machine: it has {len(times)} samples")
    idle, busy, total = column["idle_nodes"], column["allocated_nodes"], column["total_nodes"]
    used = 1 - column["partially_free_mem"] * total / busy
    return Series(
        times=times - times[0],
        idle=idle / (idle + busy),
        used=np.clip(_median_filter(used, _SMOOTH), _LEAST_USED, _MOST_USED),
        idle_free=float(np.median(np.clip(column["free_mem"] * total / idle, 0, 1))),
    )


def like_daint(seconds: float, seed: int = 1) -> Series:
    """A machine with the distributions and the correlations in time that the trace has (see `docs/trace.md`)."""
    random = np.random.default_rng(seed)
    times = np.arange(0, seconds + _SAMPLE_S, _SAMPLE_S)
    idle = np.exp(_LOG_IDLE[0] + _LOG_IDLE[1] * _noise(random, len(times), _IDLE_MEMORY_S))
    used = np.exp(_LOG_USED[0] + _LOG_USED[1] * _noise(random, len(times), _USED_MEMORY_S))
    return Series(times, np.clip(idle, *_IDLE_RANGE), np.clip(used, _LEAST_USED, _MOST_USED), _IDLE_FREE)


def _noise(random: np.random.Generator, count: int, memories_s: tuple[float, ...]) -> Floats:
    """Of mean 0 and deviation 1: equal parts that forget within so many seconds each.

    What is forgotten at once comes in a few large jumps: fifth powers of normal numbers.
    """
    total = np.zeros(count)
    for memory_s in memories_s:
        keep = math.exp(-_SAMPLE_S / memory_s)
        value = random.standard_normal()
        for step, fresh in enumerate(random.standard_normal(count) * math.sqrt(1 - keep * keep)):
            total[step] += value**5 / math.sqrt(945) if memory_s < _SAMPLE_S else value
            value = keep * value + fresh
    return total / math.sqrt(len(memories_s))


def _time(row: dict[str, str]) -> float:
    """Seconds since 1970, from either form of the trace."""
    if "date" in row:
        return datetime.strptime(row["date"], "%d-%m-%y %H:%M:%S").timestamp()
    return datetime.fromisoformat(row["time"]).timestamp()


def _median_filter(values: Floats, width: int) -> Floats:
    padded = np.pad(values, width // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
