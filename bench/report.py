"""Tables of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from memfaas.bench.bars import BARS, Bar
from memfaas.bench.plan import BATCH, BATCH_SIZE
from memfaas.bench.result import Cell, IdleFigures, LeaseFigures, Result, SystemInfo, Verdict
from memfaas.bench.stats import paired_ratio
from memfaas.units import MIB, format_size

_STYLES = {"memfaas": "bold green", "floor": "dim", "peer": "default"}


def show(result: Result) -> RenderableType:
    """Everything about a run: figures, what was skipped or failed, and the bars."""
    parts: list[RenderableType] = [_heading(result)]
    for clients in sorted({cell.clients for cell in result.cells}):
        for op in _ops(result, clients):
            parts.append(_figures(result, op, clients))
    if any(cell.batch > 1 for cell in result.cells):
        parts.append(_batches(result))
    if result.leases:
        parts.append(show_leases(result.leases))
    if result.idle is not None:
        parts.append(show_idle(result.idle))
    parts += _absent(result)
    if result.verdicts:
        parts.append(show_verdicts(result.verdicts))
    return Group(*parts)


def show_leases(leases: Sequence[LeaseFigures]) -> RenderableType:
    """From the request for a lease to the first byte served."""
    table = _table()
    for name in ("lease", "fabric", "size", "grants", "median", "p99", "worst"):
        table.add_column(name, justify="left" if name in ("lease", "fabric") else "right")
    for lease in leases:
        times = [f"{t:.1f} ms" for t in (lease.median_ms, lease.p99_ms, lease.worst_ms)]
        table.add_row(lease.what, lease.fabric, format_size(lease.size), str(lease.grants), *times)
    return _titled("From the request for a lease to the first byte served", table)


def show_idle(idle: IdleFigures) -> RenderableType:
    """What the processes of an idle donor cost."""
    table = _table()
    for name in ("process", "pid", "CPU time", "ticks", "memory (PSS)", "of it lent", "its own"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for process in idle.processes:
        own = process.pss_bytes - process.lent_pss_bytes
        sizes = [format_size(size) for size in (process.pss_bytes, process.lent_pss_bytes, own)]
        table.add_row(process.role, str(process.pid), f"{process.cpu_ns / 1e6:.2f} ms", str(process.ticks), *sizes)
    return _titled(f"An idle donor over {idle.seconds:.1f} s", table)


def show_verdicts(verdicts: Sequence[Verdict]) -> RenderableType:
    """The bars, with their figure at each size or for each kind, and what could not be measured and why."""
    sizes = sorted({verdict.size for verdict in verdicts if verdict.size is not None})
    by_size, others = _table(), _table()
    by_size.add_column("bar")
    by_size.add_column("")
    for size in sizes:
        by_size.add_column(format_size(size), justify="right", no_wrap=True)
    by_size.add_column("")
    for name in ("bar", "", "figure", ""):
        others.add_column(name)
    for bar in BARS:
        name = bar.text
        for op, mine in _by_op(bar, verdicts).items():
            if bar.sizes:
                figures = {verdict.size: _bar_figure(bar, verdict) for verdict in mine}
                by_size.add_row(name, op, *(figures.get(size, "") for size in sizes), _summary(mine))
            else:
                others.add_row(name, op, *(_bar_figure(bar, verdict) for verdict in mine), _summary(mine))
            name = ""
    notes = dict.fromkeys(f"{verdict.bar}: {verdict.note}" for verdict in verdicts if verdict.note)
    return Group(_titled("Bars", by_size), others, *(Text(note, style="dim") for note in notes))


def _heading(result: Result) -> Text:
    machine = result.machine
    text = Text()
    text.append(f"memfaas bench {result.command}", style="bold")
    text.append(f"  {result.started}, {result.rounds} rounds in {result.seconds:.0f} s\n")
    text.append(
        f"{machine.processor}, {machine.cores} cores, {format_size(machine.memory_bytes)}, Linux {machine.kernel}, "
        f"Python {machine.python}; load {machine.load_before:.2f} before, {machine.load_after:.2f} after\n",
        style="dim",
    )
    for system in result.systems:
        if system.skipped is None:
            text.append(f"{system.name}: ", style=_STYLES[system.kind])
            text.append(f"{system.detail}\n", style="dim")
    return text


def _ops(result: Result, clients: int) -> list[str]:
    return list(dict.fromkeys(c.op for c in result.cells if c.clients == clients and c.batch == 1))


def _figures(result: Result, op: str, clients: int) -> RenderableType:
    """One operation: a row for each system, a column for each size."""
    cells = [c for c in result.cells if (c.op, c.clients, c.batch) == (op, clients, 1)]
    sizes = sorted({cell.size for cell in cells})
    if clients == 1:
        title = f"{op}, one client: median time; below it p99, or throughput"
    else:
        title = f"{op}, {clients} clients: all together; below it worst client / mean"
    table = _table()
    table.add_column("system", no_wrap=True)
    for size in sizes:
        table.add_column(format_size(size), justify="right", no_wrap=True)
    for system in _present(result):
        row = {cell.size: cell for cell in cells if cell.system == system.name}
        if row:
            reference = _reference(result, system)
            texts = [_cell_text(result, row.get(size), reference) for size in sizes]
            name = Text(system.name, style=_STYLES[system.kind])
            if any("x" in text.plain for text in texts):
                name.append(f"\n\n  vs {reference}", style="dim")
            table.add_row(name, *texts)
            table.add_section()
    return _titled(title, table)


def _cell_text(result: Result, cell: Cell | None, reference: str | None) -> Text:
    if cell is None:
        return Text("")
    if cell.failed is not None or cell.median_us is None or cell.p99_us is None or cell.rate is None:
        return Text("failed", style="red")
    if cell.clients == 1:
        text = Text(_time(cell.median_us))
        tail = _time(cell.p99_us) if cell.size < MIB else _throughput(cell.size / cell.median_us * 1e6)
    else:
        text = Text(_rate(cell.rate) if cell.size < MIB else _throughput(cell.rate * cell.size))
        tail = f"{cell.fairness:.2f}"
    text.append(f"\n{tail}", style="dim")
    other = result.cell(reference, cell.op, cell.size, cell.clients) if reference else None
    ratio = _ratio(cell, other) if other is not None else None
    if ratio is not None:
        text.append(f"\n{_times(ratio)}", style="cyan" if ratio >= 1 else "yellow")
    return text


def _ratio(cell: Cell, memfaas: Cell) -> float | None:
    if cell.clients == 1:
        return paired_ratio(cell.times(), memfaas.times())
    return paired_ratio(memfaas.rates(), cell.rates())


def _reference(result: Result, system: SystemInfo) -> str | None:
    """Which fabric of memfaas a system is set beside: the one that reaches as far as the system does."""
    if system.kind == "memfaas":
        return None
    name = "memfaas tcp" if system.networked else "memfaas shm"
    return name if any(s.name == name and s.skipped is None for s in result.systems) else None


def _batches(result: Result) -> RenderableType:
    table = _table()
    table.add_column("system")
    ops = ("put", "get")
    for op in ops:
        table.add_column(f"{op}_many", justify="right")
    for system in _present(result):
        texts = []
        for op in ops:
            batch = result.cell(system.name, f"{op}_many", BATCH_SIZE, 1, BATCH)
            single = result.cell(system.name, op, BATCH_SIZE, 1)
            texts.append(_batch_text(batch, single))
        if any(texts):
            table.add_row(Text(system.name, style=_STYLES[system.kind]), *texts)
    return _titled(f"{BATCH} values of {BATCH_SIZE} B at once: time for each value, multiple of the single rate", table)


def _batch_text(batch: Cell | None, single: Cell | None) -> Text:
    if batch is None:
        return Text("")
    if batch.failed is not None or batch.median_us is None:
        return Text("failed", style="red")
    text = Text(_time(batch.median_us))
    if single is not None:
        ratio = paired_ratio(batch.rates(), single.rates())
        if ratio is not None:
            text.append(f" {_times(ratio)}", style="cyan")
    return text


def _absent(result: Result) -> Iterator[Text]:
    for system in result.skipped():
        yield Text.from_markup(f"[bold yellow]skipped[/] {escape(system.name)}: {escape(system.skipped or '')}")
    for cell in result.failures():
        what = f"{cell.op} of {format_size(cell.size)}, {cell.clients} client{'s' if cell.clients > 1 else ''}"
        yield Text.from_markup(f"[bold red]failed[/] {escape(cell.system)}, {what}: {escape(cell.failed or '')}")


def _by_op(bar: Bar, verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    mine = [verdict for verdict in verdicts if verdict.bar == bar.text]
    return {op: [v for v in mine if v.op == op] for op in dict.fromkeys(verdict.op for verdict in mine)}


def _bar_figure(bar: Bar, verdict: Verdict) -> Text:
    if verdict.figure is None:
        return Text("?", style="bold yellow")
    match bar.figure:
        case "lease":
            text = f"{verdict.figure:.1f} ms"
        case "idle cpu":
            text = f"{verdict.figure:.3f} %"
        case "idle memory":
            text = f"{verdict.figure:.1f} MiB"
        case _:
            text = f"{verdict.figure:.2f}"
    return Text(text, style="green" if verdict.passed else "bold red")


def _summary(verdicts: Sequence[Verdict]) -> Text:
    if any(verdict.passed is False for verdict in verdicts):
        return Text("MISS", style="bold red")
    if any(verdict.passed is None for verdict in verdicts):
        return Text("?", style="bold yellow")
    return Text("PASS", style="bold green")


def _present(result: Result) -> list[SystemInfo]:
    return [system for system in result.systems if system.skipped is None]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def _titled(title: str, table: Table) -> Group:
    """A table under its title: a title of its own would be wrapped to the width of a narrow table."""
    return Group(Text(title, style="bold"), table)


def _time(us: float) -> str:
    if us < 1000:
        return f"{us:.2f} µs" if us < 10 else f"{us:.1f} µs" if us < 100 else f"{us:.0f} µs"
    return f"{us / 1e3:.2f} ms" if us < 10_000 else f"{us / 1e3:.1f} ms"


def _rate(rate: float) -> str:
    if rate < 1e3:
        return f"{rate:.0f} /s"
    number, unit = (rate / 1e3, "k/s") if rate < 1e6 else (rate / 1e6, "M/s")
    return f"{number:.1f} {unit}" if number < 99.95 else f"{number:.0f} {unit}"


def _throughput(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.0f} MB/s"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"
