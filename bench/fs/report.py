"""The table of a run of `memfaas bench fs`, for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfaas.bench.fs.bars import FLOOR, FsResult


def show(result: FsResult) -> RenderableType:
    """Figures, what was skipped, and the bars."""
    machine = result.machine
    figures = Table("operations in a second", box=None, pad_edge=False)
    systems = [system for system in result.systems if system.skipped is None]
    for name in (*(system.name for system in systems), *result.published):
        figures.add_column(name, justify="right")
    floor = result.system(FLOOR)
    for operation in dict.fromkeys(operation for system in systems for operation in system.per_s):
        base = None if floor is None else floor.median(operation)
        cells = [_cell(system.median(operation), base) for system in systems]
        cells += [_cell(published.get(operation), base) for published in result.published.values()]
        figures.add_row(operation, *cells)
    bars = Table("bar", "operation", "figure", "at least", "of it", "", box=None, pad_edge=False)
    for one in result.verdicts:
        word = {True: Text("reached", "green"), False: Text("missed", "red"), None: Text("not measured", "yellow")}
        figure = "-" if one.figure is None else f"{one.figure:,.0f}" if one.threshold > 1 else f"{one.figure:.2f}"
        part = "-" if one.figure is None else f"{one.figure / one.threshold:.0%}"
        bars.add_row(one.bar, one.op, figure, f"{one.threshold:g}", part, word[one.passed])
    return Group(
        Text(f"memfaas bench fs  {result.started}, {result.seconds:.0f} s", "bold"),
        Text(
            f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}, load {machine.load_after:.2f}", "dim"
        ),
        figures,
        Text(f"In brackets: of {FLOOR}. A folder of many has {result.listed} names.", "dim"),
        *(Text(f"skipped {system.name}: {system.skipped}", "yellow") for system in result.systems if system.skipped),
        Text("Bars: operations in a second, or their ratio, at the median over rounds", "bold"),
        bars,
    )


def _cell(figure: float | None, base: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if not base else f"{figure:,.0f} ({figure / base:.0%})"
