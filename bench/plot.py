"""A picture of a run: how long one operation takes, how fast large values move, what four clients get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memfaas.bench.peers import SYSTEMS
from memfaas.bench.result import Cell, Result, SystemInfo
from memfaas.units import MIB, format_size

_COLORS = {
    "memfaas shm": "#1a7f37",
    "memfaas tcp": "#0969da",
    "memory copy": "#57606a",
    "C round trip": "#afb8c1",
    "LMDB": "#bf8700",
    "redis (unix)": "#cf222e",
    "redis (tcp)": "#ff8182",
    "memcached (tcp)": "#8250df",
    "Mooncake Store (tcp)": "#bf3989",
    "DragonHPC DDict": "#953800",
}
_FLOOR_LINES = {"memory copy": ":", "C round trip": "--"}
_HATCHES = {"memory copy": "..", "C round trip": "//"}


def plot(result: Result, path: Path) -> None:
    """Write the picture as a PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shared = any(cell.clients > 1 for cell in result.cells)
    rows = 3 if shared else 2
    figure, axes = plt.subplots(rows, 2, figsize=(14, 5.6 * rows), sharey="row", layout="constrained")
    for column, op in enumerate(("put", "get")):
        _latency(axes[0][column], result, op)
        _throughput(axes[1][column], result, op)
        if shared:
            _shared(axes[2][column], result, op)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    machine = result.machine
    figure.suptitle(
        f"memfaas bench {result.command}, {result.started}\n"
        f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}; medians of {result.rounds} rounds",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _latency(axes: Any, result: Result, op: str) -> None:
    axes.set_title(f"{op}, one client: time of one operation (thin line: up to p99)")
    for system in _present(result):
        cells = _row(result, system, op, 1)
        if not cells:
            continue
        sizes, medians = [c.size for c in cells], [c.median_us for c in cells]
        style = _style(system)
        axes.plot(sizes, medians, label=system.name, **style)
        if system.kind != "floor":
            axes.vlines(sizes, medians, [c.p99_us for c in cells], color=style["color"], linewidth=0.8, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = _sizes(result)
    axes.set_xticks(sizes, [format_size(size) for size in sizes])
    axes.yaxis.set_major_formatter(lambda us, _: f"{us / 1e3:g} ms" if us >= 1e3 else f"{us:g} µs")
    _tidy(axes, "both")


def _throughput(axes: Any, result: Result, op: str) -> None:
    sizes = [size for size in _sizes(result) if size >= MIB]
    axes.set_title(f"{op}, one client: throughput of large values")
    _bars(axes, result, op, 1, sizes, lambda cell: cell.size / (cell.median_us or 1) / 1e3, "{:.1f}")
    axes.set_ylabel("GB/s")


def _shared(axes: Any, result: Result, op: str) -> None:
    clients = max(cell.clients for cell in result.cells)
    sizes = _sizes(result)
    axes.set_title(f"{op}, {clients} clients: operations per second, all together")
    _bars(axes, result, op, clients, sizes, lambda cell: cell.rate or 0, "")
    axes.set_yscale("log")
    axes.set_ylabel("operations per second")


def _bars(axes: Any, result: Result, op: str, clients: int, sizes: list[int], height: Any, label: str) -> None:
    """A group of bars for each size, a bar for each system."""
    systems = [system for system in _present(result) if _row(result, system, op, clients)]
    width = 0.85 / max(1, len(systems))
    for number, system in enumerate(systems):
        cells = {cell.size: cell for cell in _row(result, system, op, clients)}
        places = [(i + (number - (len(systems) - 1) / 2) * width, cells[s]) for i, s in enumerate(sizes) if s in cells]
        style = _style(system)
        drawn = axes.bar(
            [x for x, _ in places],
            [height(cell) for _, cell in places],
            width * 0.92,
            color=style["color"],
            hatch=_HATCHES.get(system.name),
            edgecolor="white",
            linewidth=0.4,
        )
        if label:
            axes.bar_label(drawn, fmt=label, fontsize=7, padding=1)
    axes.set_xticks(range(len(sizes)), [format_size(size) for size in sizes])
    _tidy(axes, "y")


def _tidy(axes: Any, grid: str) -> None:
    axes.grid(True, axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)


def _row(result: Result, system: SystemInfo, op: str, clients: int) -> list[Cell]:
    cells = [c for c in result.cells if (c.system, c.op, c.clients, c.batch) == (system.name, op, clients, 1)]
    return sorted((c for c in cells if c.median_us is not None and c.failed is None), key=lambda c: c.size)


def _present(result: Result) -> list[SystemInfo]:
    order = list(SYSTEMS)
    present = [system for system in result.systems if system.skipped is None]
    return sorted(present, key=lambda system: order.index(system.name) if system.name in order else len(order))


def _sizes(result: Result) -> list[int]:
    return sorted({cell.size for cell in result.cells if cell.batch == 1})


def _style(system: SystemInfo) -> dict[str, Any]:
    color = _COLORS.get(system.name, "#000000")
    if system.kind == "floor":
        return {"color": color, "linestyle": _FLOOR_LINES.get(system.name, "--"), "linewidth": 1.5}
    heavy = system.kind == "memfaas"
    return {
        "color": color,
        "linewidth": 2.4 if heavy else 1.3,
        "marker": "o",
        "markersize": 5 if heavy else 3.5,
    }
