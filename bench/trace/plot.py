"""The plot of a replay: memory over time, and the policies side by side. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from memfaas.bench.trace.outcome import Outcome
from memfaas.units import GIB, TIB

matplotlib.use("agg")

HOW = {
    "punched": "#9ecae1",
    "migrated": "#3182bd",
    "spilled": "#756bb1",
    "dropped": "#fdae6b",
    "lost": "#de2d26",
}
"""How bytes came back that somebody had leased, and the colour of each."""


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """PNG or SVG, by the file's name."""
    figure = Figure(figsize=(13, 4 + 0.3 * len(outcomes)), layout="constrained")
    over_time, came_back, harvested = figure.subplots(1, 3, width_ratios=(4, 3, 2))

    first = outcomes[0]
    hours = [sample.at / 3600 for sample in first.samples]
    for what, color in (("free", "#969696"), ("offered", "#74c476"), ("leased", "#3182bd")):
        over_time.plot(hours, [getattr(sample, what) / TIB for sample in first.samples], label=what, color=color)
    over_time.set(title=f"{first.nodes} nodes, policy: {first.policy.name}", xlabel="hours", ylabel="TiB")
    over_time.set_ylim(bottom=0)
    over_time.legend(loc="lower right")

    names = [outcome.policy.name for outcome in outcomes]
    left = [0.0] * len(outcomes)
    for how, color in HOW.items():
        sizes = [outcome.steps[how] / GIB for outcome in outcomes]
        came_back.barh(names, sizes, left=left, color=color, label=how)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    came_back.set(title="leased memory that was taken back", xlabel="GiB")
    came_back.invert_yaxis()
    came_back.legend(fontsize="small")

    shares = [100 * outcome.mean("leased") / outcome.mean("free") for outcome in outcomes]
    harvested.barh(names, shares, color="#3182bd")
    harvested.set(title="leased, of what was free", xlabel="%", yticks=[])
    harvested.invert_yaxis()

    figure.savefig(file, dpi=120)
