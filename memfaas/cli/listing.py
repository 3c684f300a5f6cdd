"""Tables for people, of what other people named: shown as it is, and as wide as there is room."""

from __future__ import annotations

import copy

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

_WIDTH_OF_A_FILE = 200
_ANY_WIDTH = 10_000


def make_console() -> Console:
    """A file or pipe is as wide as the tables."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_A_FILE
    return console


class Listing(Table):
    """A table without lines. Text in its cells is no markup, whatever brackets stand in it."""

    def __init__(self, title: str | None, spare: tuple[str, ...]) -> None:
        super().__init__(
            title=None if title is None else Text(title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        self._spare = spare

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        super().add_row(
            *(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style, end_section=end_section
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self
        for name in self._spare:
            if Measurement.get(console, options.update(max_width=_ANY_WIDTH), shown).maximum <= options.max_width:
                break
            shown = shown._without(name)
        return super(Listing, shown).__rich_console__(console, options)

    def _without(self, name: str) -> Listing:
        fewer = copy.copy(self)
        fewer.columns = [copy.copy(column) for column in self.columns if str(column.header) != name]
        for index, column in enumerate(fewer.columns):
            column._index = index
        return fewer


def make_table(title: str | None, *columns: str, spare: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Listing:
    """A column whose name begins with > is aligned to the right.

    Where not all of it has room, the columns `spare` are left out, the first of them first; then those in
    `fold` are folded.
    """
    table = Listing(title, spare)
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(
            Text(name),
            justify="right" if name != column else "left",
            no_wrap=name not in fold,
            min_width=len(name),
            header_style="dim",
        )
    return table
