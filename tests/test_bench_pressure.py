"""`memfaas bench pressure` on nodes where it can and where it cannot measure."""

from __future__ import annotations

import click.testing
import pytest

from memfaas.bench import pressure
from memfaas.cli import main
from memfaas.errors import LeaseLost
from memfaas.units import MIB


def test_what_was_disturbed_is_measured_again_and_that_is_told() -> None:
    left = [LeaseLost("it is gone"), pressure.Disturbed("it was not calm")]

    def measure() -> int:
        if left:
            raise left.pop()
        return 7

    told: list[tuple[float, str]] = []
    assert pressure._undisturbed(measure, "watching", 0.5, lambda share, doing: told.append((share, doing))) == 7
    assert told == [
        (0.5, "pressure: watching"),
        (0.5, "pressure: watching, again: it was not calm"),
        (0.5, "pressure: watching, again: it is gone"),
    ]


def test_a_node_that_is_never_calm_is_named_and_no_figure_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "mem_available", lambda: 100 * MIB)
    result = click.testing.CliRunner().invoke(main, ["bench", "pressure", "--seconds", "1ms"])
    assert result.exit_code == 1
    assert "only 100 MiB are available" in result.output
    assert "% of one core" not in result.output


def test_the_figures_are_a_share_of_one_core_and_times_in_order() -> None:
    cost, times = pressure.PressureFigures(10.0, 5_000_000, [0.09, 0.0613]).lines()
    assert "0.050 % of one core, over 10 s" in cost
    assert times.endswith("61, 90 ms")
