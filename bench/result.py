"""What a run found out, as it is written to and read from the JSON file.

Times are microseconds, rates are operations (of a batch: keys) per second.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal

import msgspec

from memfaas.bench.peers.base import Kind
from memfaas.node import huge_page_choice


class Machine(msgspec.Struct, kw_only=True):
    """Where a run took place."""

    processor: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    shmem_huge_pages: str
    load_before: float
    load_after: float = 0.0


class SystemInfo(msgspec.Struct, kw_only=True):
    """A system that took part, or that was skipped, with the reason."""

    name: str
    kind: Kind
    networked: bool
    detail: str = ""
    skipped: str | None = None


class Round(msgspec.Struct):
    """One system's figures for one case in one round."""

    median_us: float
    rate: float
    fairness: float


class Cell(msgspec.Struct, kw_only=True):
    """One system's figures for one case: medians over the rounds, p99 over all single operations.

    `rounds` has one entry for each round of the run, None where this cell was not measured.
    `failed` is the reason when the system could not do it.
    """

    system: str
    op: str
    size: int
    clients: int
    batch: int
    operations: int = 0
    median_us: float | None = None
    p99_us: float | None = None
    p99_samples: int = 0
    rate: float | None = None
    bytes_per_s: float | None = None
    fairness: float | None = None
    rounds: list[Round | None] = []
    failed: str | None = None

    def times(self) -> list[float | None]:
        """The median of each round."""
        return [None if figures is None else figures.median_us for figures in self.rounds]

    def rates(self) -> list[float | None]:
        """The rate of each round."""
        return [None if figures is None else figures.rate for figures in self.rounds]


class LeaseFigures(msgspec.Struct, kw_only=True):
    """From the request for a lease to the first byte served."""

    what: Literal["region", "store"]
    fabric: str
    grants: int
    size: int
    median_ms: float
    p99_ms: float
    worst_ms: float


Role = Literal["broker", "donor", "function", "helper"]
"""A function holds the memory of a lease; helpers are the others, such as functions that wait for one."""


class IdleProcess(msgspec.Struct, kw_only=True):
    """What one process of a donor costs while nobody asks anything of it."""

    pid: int
    role: Role
    cpu_ns: int
    ticks: int
    pss_bytes: int
    lent_pss_bytes: int


class IdleFigures(msgspec.Struct, kw_only=True):
    """The processes of an idle donor over some seconds."""

    seconds: float
    processes: list[IdleProcess]


class Verdict(msgspec.Struct, kw_only=True):
    """One bar held against one figure. `figure` is None when it was not measured; `note` then says why."""

    bar: str
    op: str
    size: int | None
    figure: float | None
    threshold: float
    passed: bool | None
    note: str = ""


class Result(msgspec.Struct, kw_only=True):
    """Everything about one run."""

    schema: Literal["memfaas-bench-kv/1"] = "memfaas-bench-kv/1"
    command: str
    started: str
    seconds: float
    seed: int
    rounds: int
    machine: Machine
    systems: list[SystemInfo]
    cells: list[Cell]
    leases: list[LeaseFigures] = []
    idle: IdleFigures | None = None
    verdicts: list[Verdict] = []

    def cell(self, system: str, op: str, size: int, clients: int, batch: int = 1) -> Cell | None:
        """The cell of one system and case."""
        wanted = (system, op, size, clients, batch)
        for cell in self.cells:
            if (cell.system, cell.op, cell.size, cell.clients, cell.batch) == wanted:
                return cell
        return None

    def skipped(self) -> list[SystemInfo]:
        """The systems that did not take part."""
        return [system for system in self.systems if system.skipped is not None]

    def failures(self) -> list[Cell]:
        """What a system that took part could not do."""
        return [cell for cell in self.cells if cell.failed is not None]


def write(result: msgspec.Struct, path: Path) -> None:
    """Write the JSON file of a run, of whatever benchmark."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def read(path: Path) -> Result:
    """Read a JSON file. Raises msgspec.ValidationError when it is no result of this version."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def this_machine() -> Machine:
    """The machine as it is now."""
    return Machine(
        processor=_line_of(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        shmem_huge_pages=huge_page_choice() or "unknown",
        load_before=os.getloadavg()[0],
    )


def _line_of(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""
