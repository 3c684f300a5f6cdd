"""The command `memfaas bench fs`."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from memfaas.bench.fs.run import SYSTEMS, measure
from memfaas.units import parse_duration

FLOOR = "bare pyfuse3"


@click.command()
@click.option("--duration", default="3s", show_default=True, help="Of each measurement of reads and writes.")
def fs(duration: str) -> None:
    """Measure a mount beside tmpfs and a bare FUSE file system, in one run.

    \b
    Example:
        memfaas bench fs --duration 10s
    """
    seconds = parse_duration(duration)
    results = [measure(system, seconds) for system in SYSTEMS]
    floor = next(one for one in results if one.system == FLOOR)
    table = Table("operations in a second")
    for one in results:
        table.add_column(one.system, justify="right")
    for name in floor.per_s:
        cells = [f"{one.per_s[name]:,.0f} ({one.per_s[name] / floor.per_s[name]:.0%})" for one in results]
        table.add_row(name, *cells)
    Console(width=None if Console().is_terminal else 120).print(table)
    click.echo(f"Percentages are of {FLOOR}.")
