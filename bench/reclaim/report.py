"""The table of a run of `memfaas bench reclaim`, for a terminal."""

from __future__ import annotations

from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfaas.bench.reclaim.bars import BARS, ratio
from memfaas.bench.reclaim.pages import ALL
from memfaas.bench.reclaim.result import First, ReclaimResult, Row
from memfaas.bench.result import Verdict
from memfaas.bench.stats import quantile
from memfaas.units import GIB, format_size


def show(result: ReclaimResult) -> RenderableType:
    """Figures, what was skipped, and the bars."""
    skipped: dict[str, list[str]] = {}
    for row in result.rows:
        if row.skipped is not None:
            where = f"{format_size(row.size)} in pages of {row.pages}"
            skipped.setdefault(f"{where}: {row.skipped}", []).append(row.way)
    for first in result.firsts:
        if first.skipped is not None:
            skipped.setdefault(first.skipped, []).append(first.what)
    return Group(
        _heading(result),
        Text(
            "From the request until the memory is free in the kernel: p50, p99, GiB/s at p50, x the limit", style="bold"
        ),
        _figures(result),
        *(Text(f"skipped {', '.join(ways)}, {why}", style="yellow") for why, ways in skipped.items()),
        Text("From the request, or from the start of the donor, to the first byte served", style="bold"),
        _firsts(result.firsts),
        Text("Bars", style="bold"),
        _verdicts(result.verdicts),
        *(Text(note, style="dim") for note in dict.fromkeys(f"{v.bar}: {v.note}" for v in result.verdicts if v.note)),
    )


def _heading(result: ReclaimResult) -> Text:
    machine = result.machine
    text = Text()
    text.append("memfaas bench reclaim", style="bold")
    text.append(f"  {result.started}, {result.seconds:.0f} s\n")
    text.append(
        f"{machine.processor}, {machine.cores} cores, {format_size(machine.memory_bytes)}, Linux {machine.kernel}, "
        f"Python {machine.python}; load {machine.load_before:.2f} before, {machine.load_after:.2f} after",
        style="dim",
    )
    return text


def _figures(result: ReclaimResult) -> Table:
    """A row for each way, a column for each size and kind of pages."""
    cases = [(size, pages) for size in sorted({row.size for row in result.rows}) for pages in ALL]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for size, pages in cases:
        table.add_column(f"{format_size(size)}\n{pages}", justify="right", no_wrap=True)
    for way in dict.fromkeys(row.way for row in result.rows):
        rows = [result.row(way, size, pages) for size, pages in cases]
        table.add_row(Text(way, style=_style(rows)), *(_cell(result, row) for row in rows))
    return table


def _style(rows: list[Row | None]) -> str:
    return "bold green" if any(row is not None and row.kind == "memfaas" for row in rows) else "dim"


def _cell(result: ReclaimResult, row: Row | None) -> Text:
    if row is None or row.p50 is None or row.p99 is None:
        return Text("skipped", style="yellow")
    text = Text(f"{_time(row.p50)}\n")
    text.append(f"{_time(row.p99)}\n{_speed(row.size / row.p50)}", style="dim")
    bar = next((bar for bar in BARS if bar.way == row.way), None)
    if bar is not None:
        limits = [found for way in bar.limits if (found := result.row(way, row.size, row.pages)) is not None]
        figure = ratio(row, limits)
        if figure is not None:
            text.append(f"\n{figure:.2f}x", style="cyan" if figure <= bar.most else "red")
    return text


def _firsts(firsts: list[First]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "leases", "p50", "p99", "worst"):
        table.add_column(name, justify="right" if name else "left")
    for first in firsts:
        if first.seconds:
            figures = (median(first.seconds), quantile(first.seconds, 0.99), max(first.seconds))
            table.add_row(first.what, str(len(first.seconds)), *map(_time, figures))
    return table


def _verdicts(verdicts: list[Verdict]) -> Table:
    """A row for each bar and kind of pages, a column for each size."""
    sizes = sorted({verdict.size for verdict in verdicts if verdict.size is not None})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("bar", "pages", *map(format_size, sizes), ""):
        table.add_column(name, justify="right" if name not in ("bar", "") else "left")
    for bar, op in dict.fromkeys((verdict.bar, verdict.op) for verdict in verdicts):
        mine = [verdict for verdict in verdicts if (verdict.bar, verdict.op) == (bar, op)]
        figures = {verdict.size: _figure(verdict) for verdict in mine}
        cells = [figures.get(size, Text()) for size in sizes]
        table.add_row(bar, op, *cells, figures.get(None, Text()) + _outcome(mine))
    return table


def _figure(verdict: Verdict) -> Text:
    if verdict.figure is None:
        return Text("?", style="bold yellow")
    text = f"{verdict.figure:.2f}" if verdict.size is not None else f"{_time(verdict.figure)} "
    return Text(text, style="green" if verdict.passed else "bold red")


def _outcome(verdicts: list[Verdict]) -> Text:
    if any(verdict.passed is False for verdict in verdicts):
        return Text("MISS", style="bold red")
    if any(verdict.passed is None for verdict in verdicts):
        return Text("?", style="bold yellow")
    return Text("PASS", style="bold green")


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2f} ms"


def _speed(bytes_per_s: float) -> str:
    speed = bytes_per_s / GIB
    return f"{speed:.1f} GiB/s" if speed < 100 else f"{speed:.0f} GiB/s"
