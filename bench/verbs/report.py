"""The table of a run of `memfaas bench verbs`, for a terminal, and its JSON file."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfaas.bench.verbs.bars import VerbsResult
from memfaas.units import format_size


def show(result: VerbsResult) -> RenderableType:
    """Figures, what was skipped, and the bars."""
    machine = result.machine
    device = f"RDMA device {result.device}" if result.device else "no RDMA device"
    figures = Table("way", "operation", "size", "us, median", "MiB/s", box=None, pad_edge=False)
    for row in sorted(result.rows, key=lambda row: (row.op, row.size, row.way)):
        if (us := row.median_us) is not None:
            shown = f"{us:.1f}" if us >= 10 else f"{us:.2f}"
            figures.add_row(row.way, row.op, format_size(row.size), shown, f"{row.size / us * 1e6 / 2**20:.1f}")
    bars = Table("bar", "size", "figure", "threshold", "", box=None, pad_edge=False)
    for one in result.verdicts:
        size = format_size(one.size) if one.size is not None else ""
        figure = "-" if one.figure is None else f"{one.figure:.3g}"
        word = {True: Text("reached", "green"), False: Text("missed", "red"), None: Text("not measured", "yellow")}
        bars.add_row(one.bar, size, figure, f"<= {one.threshold:.3g}", word[one.passed])
    skipped = dict.fromkeys(f"skipped {row.way}: {row.skipped}" for row in result.rows if row.skipped)
    return Group(
        Text(f"memfaas bench verbs  {result.started}, {result.seconds:.0f} s, {device}", "bold"),
        Text(
            f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}, load {machine.load_after:.2f}", "dim"
        ),
        figures,
        *(Text(line, "yellow") for line in skipped),
        Text("Bars: time / time, or microseconds that are added, at the median over rounds", "bold"),
        bars,
    )


def read(path: Path) -> VerbsResult:
    """Read a JSON file. Raises msgspec.ValidationError when it is no result of this version."""
    return msgspec.json.decode(path.read_bytes(), type=VerbsResult)
