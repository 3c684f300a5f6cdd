"""The bars that memfaas set itself, as data, and how a run is held against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from memfaas.bench.plan import BATCH, BATCH_SIZE, SIZES
from memfaas.bench.result import Cell, Result, SystemInfo, Verdict
from memfaas.bench.stats import paired_ratio
from memfaas.units import KIB, MIB

Figure = Literal["speed", "slowness", "rate", "fairness", "batch", "lease", "idle cpu", "idle memory"]
"""What a bar looks at.

speed: time of the reference / time of the subject. slowness: the inverse. rate: operations per second of all
clients / those of the reference. fairness: worst client / mean. batch: keys per second in batches / one by one.
lease: milliseconds to the first byte, at the median. idle cpu: per cent of one core, idle memory: MiB of one function.
"""

PEERS = "every peer"
NETWORKED_PEERS = "every networked peer"

_SMALL = tuple(size for size in SIZES if size <= 4 * KIB)
_LARGE = tuple(size for size in SIZES if size >= MIB)
_LARGEST = (SIZES[-1],)


@dataclass(frozen=True)
class Bar:
    """`figure` of `subject`, set against a system or a group of systems, must reach or stay below a threshold."""

    text: str
    figure: Figure
    subject: str
    threshold: float
    against: str = ""
    ops: tuple[str, ...] = ("put", "get")
    sizes: tuple[int, ...] = SIZES
    clients: int = 1
    at_least: bool = True

    def passed(self, figure: float) -> bool:
        """Whether the figure is on the right side of the threshold."""
        return figure >= self.threshold if self.at_least else figure <= self.threshold


BARS: tuple[Bar, ...] = (
    Bar("shm: 2 x as fast as LMDB", "speed", "memfaas shm", 2, "LMDB", sizes=_SMALL),
    Bar("shm: 30 x as fast as redis-py", "speed", "memfaas shm", 30, "redis (unix)", sizes=_SMALL),
    Bar("shm: 0.7 of a plain memory copy", "speed", "memfaas shm", 0.7, "memory copy", sizes=_LARGE),
    Bar(
        "tcp: at most 1.4 x a C round trip",
        "slowness",
        "memfaas tcp",
        1.4,
        "C round trip",
        sizes=_SMALL,
        at_least=False,
    ),
    Bar("tcp: 2 x as fast as redis-py", "speed", "memfaas tcp", 2, "redis (tcp)", sizes=_SMALL),
    Bar("tcp: 0.9 of the C stream", "speed", "memfaas tcp", 0.9, "C round trip", sizes=_LARGEST),
    Bar("tcp: 1.5 x as fast as every networked peer", "speed", "memfaas tcp", 1.5, NETWORKED_PEERS, sizes=_LARGEST),
    Bar(f"tcp: batches of {BATCH} at 5 x the single rate", "batch", "memfaas tcp", 5, sizes=(BATCH_SIZE,)),
    Bar("shm, four clients: the total of the best peer", "rate", "memfaas shm", 1, PEERS, clients=4),
    Bar("tcp, four clients: the total of the best such peer", "rate", "memfaas tcp", 1, NETWORKED_PEERS, clients=4),
    Bar("shm, four clients: worst at half the mean", "fairness", "memfaas shm", 0.5, clients=4),
    Bar("tcp, four clients: worst at half the mean", "fairness", "memfaas tcp", 0.5, clients=4),
    Bar("lease: first byte in 100 ms", "lease", "memfaas", 100, ops=("region", "store"), sizes=(), at_least=False),
    Bar("idle donor: 0.0 % CPU", "idle cpu", "memfaas", 0.05, ops=(), sizes=(), at_least=False),
    Bar("idle function: 15 MiB beyond the lent memory", "idle memory", "memfaas", 15, ops=(), sizes=(), at_least=False),
)


def judge(result: Result, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Every bar held against every figure it covers."""
    return [verdict for bar in bars for verdict in _judge_bar(result, bar)]


def missed(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts that are no pass: a bar that could not be measured has not been reached."""
    return [verdict for verdict in verdicts if not verdict.passed]


def _judge_bar(result: Result, bar: Bar) -> list[Verdict]:
    match bar.figure:
        case "lease":
            return [_lease(result, bar, what) for what in bar.ops]
        case "idle cpu" | "idle memory":
            return [_idle(result, bar)]
        case _:
            return [_cell_verdict(result, bar, op, size) for op in bar.ops for size in bar.sizes]


def _cell_verdict(result: Result, bar: Bar, op: str, size: int) -> Verdict:
    subject = result.cell(bar.subject, op, size, bar.clients)
    if (why := _why_not(result, bar.subject, subject)) is not None or subject is None:
        return _verdict(bar, op, size, None, why or "")
    if bar.figure == "fairness":
        return _verdict(bar, op, size, subject.fairness)
    if bar.figure == "batch":
        batches = result.cell(bar.subject, f"{op}_many", size, bar.clients, BATCH)
        if (why := _why_not(result, bar.subject, batches)) is not None or batches is None:
            return _verdict(bar, op, size, None, why or "")
        return _verdict(bar, op, size, paired_ratio(batches.rates(), subject.rates()))
    references, note = _references(result, bar, op, size)
    if not references:
        return _verdict(bar, op, size, None, note)
    match bar.figure:
        case "rate":
            best = [max(some, default=None) for some in _by_round(references, Cell.rates)]
            figure = paired_ratio(subject.rates(), best)
        case "slowness":
            best = [min(some, default=None) for some in _by_round(references, Cell.times)]
            figure = paired_ratio(subject.times(), best)
        case _:
            best = [min(some, default=None) for some in _by_round(references, Cell.times)]
            figure = paired_ratio(best, subject.times())
    return _verdict(bar, op, size, figure, note)


def _references(result: Result, bar: Bar, op: str, size: int) -> tuple[list[Cell], str]:
    """The cells that the subject is set against, and a note that names those that are missing."""
    found: list[Cell] = []
    notes: list[str] = []
    for system in _members(result, bar.against):
        cell = result.cell(system, op, size, bar.clients)
        if (why := _why_not(result, system, cell)) is not None or cell is None:
            notes.append(why or "")
        else:
            found.append(cell)
    return found, "; ".join(notes) or ("" if found else f"{bar.against} did not take part")


def _members(result: Result, group: str) -> list[str]:
    def belongs(system: SystemInfo) -> bool:
        if group in (PEERS, NETWORKED_PEERS):
            return system.kind == "peer" and (group == PEERS or system.networked)
        return system.name == group

    return [system.name for system in result.systems if belongs(system)]


def _why_not(result: Result, name: str, cell: Cell | None) -> str | None:
    """Why there is no figure in this cell, or None when there is one."""
    if cell is not None and cell.failed is not None:
        return f"{name} failed: {cell.failed}"
    if cell is not None and cell.median_us is not None:
        return None
    for system in result.systems:
        if system.name == name and system.skipped is not None:
            return f"{name} skipped: {system.skipped}"
    return f"{name} did not take part"


def _by_round(cells: Sequence[Cell], figures: Callable[[Cell], list[float | None]]) -> list[list[float]]:
    """For each round, the figures of those cells that have one."""
    columns = zip(*(figures(cell) for cell in cells), strict=True)
    return [[figure for figure in column if figure is not None] for column in columns]


def _lease(result: Result, bar: Bar, what: str) -> Verdict:
    figures = [lease.median_ms for lease in result.leases if lease.what == what]
    if not figures:
        return _verdict(bar, what, None, None, "not measured in this run")
    return _verdict(bar, what, None, max(figures))


def _idle(result: Result, bar: Bar) -> Verdict:
    if result.idle is None:
        return _verdict(bar, "", None, None, "not measured in this run")
    if bar.figure == "idle cpu":
        used = sum(process.cpu_ns for process in result.idle.processes if process.role != "broker")
        return _verdict(bar, "", None, used / result.idle.seconds / 1e7)
    functions = [process for process in result.idle.processes if process.role == "function"]
    own = max((process.pss_bytes - process.lent_pss_bytes for process in functions), default=None)
    return _verdict(bar, "", None, None if own is None else own / MIB, "" if functions else "no function was found")


def _verdict(bar: Bar, op: str, size: int | None, figure: float | None, note: str = "") -> Verdict:
    passed = None if figure is None else bar.passed(figure)
    return Verdict(bar=bar.text, op=op, size=size, figure=figure, threshold=bar.threshold, passed=passed, note=note)
