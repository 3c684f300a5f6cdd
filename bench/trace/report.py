"""The outcomes of policies side by side: as a table, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from memfaas.bench.trace.outcome import Outcome
from memfaas.units import format_duration, format_size

COLUMNS = {
    "policy": "policy",
    "lent": "leased, of what was free",
    "jobs in time": "of the jobs that began, those whose memory was free by the deadline",
    "p99": "until the memory of a job was free",
    "short": "times that a running job touched more memory than was free just then",
    "punched": "cut out of shards",
    "moved": "to other donors",
    "spilled": "to spill donors",
    "dropped": "as the store had asked for",
    "lost": "not saved in time",
    "pause p99": "of a lease that moved",
    "copied": "over the network",
    "refused": "stores for which there was no room, of those that were wanted",
}
"""Of the table, and what each is."""

WIDTH = 150
"""That the table needs."""


def show(outcomes: Sequence[Outcome]) -> Table:
    first = outcomes[0]
    title = (
        f"{first.nodes} nodes for {format_duration(first.seconds)}, with {format_size(int(first.mean('free')))} free"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*_row(outcome.figures()))
    return table


def _row(figures: dict[str, Any]) -> list[str]:
    sizes = [figures[how] for how in ("punched", "migrated", "spilled", "dropped", "lost")]
    return [
        figures["policy"],
        f"{figures['leased_share']:.1%}",
        f"{figures['jobs_in_time']} of {figures['jobs']}",
        format_duration(figures["job_p99_s"]),
        f"{figures['growths_short']} of {figures['growths']}",
        *(format_size(size) if size else "-" for size in sizes),
        format_duration(figures["pause_p99_s"]) if figures["moves"] else "-",
        format_size(figures["copied"]) if figures["copied"] else "-",
        f"{figures['refused']} of {figures['stores']}",
    ]


def write(outcomes: Sequence[Outcome], file: Path, *, trace: str) -> None:
    """Of each policy its settings, its figures, and the samples over time."""
    content = {
        "trace": trace,
        "nodes": outcomes[0].nodes,
        "seconds": outcomes[0].seconds,
        "policies": [
            {
                "settings": asdict(outcome.policy),
                "figures": outcome.figures(),
                "samples": [asdict(sample) for sample in outcome.samples],
            }
            for outcome in outcomes
        ],
    }
    file.write_text(json.dumps(content, indent=1))
