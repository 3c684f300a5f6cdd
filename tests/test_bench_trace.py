"""The replay of a machine's jobs: what is drawn adds up to the machine, and what is replayed adds up, too."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from memfaas.bench.trace import jobs, machine, policies, report
from memfaas.bench.trace.jobs import Timeline
from memfaas.bench.trace.outcome import Outcome
from memfaas.cli import main
from memfaas.cli import replay as replaying
from memfaas.cli.replay import _Replay, replay
from memfaas.errors import UsageError
from memfaas.units import GIB

HOUR = 3600.0
NODES = 40


@pytest.fixture(scope="module")
def series() -> machine.Series:
    return machine.like_daint(7 * HOUR).part(HOUR, 6 * HOUR)


@pytest.fixture(scope="module")
def timeline(series: machine.Series) -> Timeline:
    return jobs.Generator(series.part(0, HOUR / 2), NODES, seed=3).timeline()


def test_a_machine_like_the_one_that_was_measured_has_its_statistics() -> None:
    """The published ones: memory free 64 % at least and 81 % on average, and 5 % of the nodes idle."""
    free = machine.like_daint(14 * 24 * HOUR).free()
    assert 0.76 < float(np.mean(free)) < 0.86
    assert float(np.min(free)) > 0.5


def test_the_jobs_that_are_drawn_add_up_to_the_machine(series: machine.Series) -> None:
    """At every sample: the nodes without a job to within one, and the memory in use to within a percent."""
    nodes = 300
    timeline = jobs.Generator(series, nodes, seed=3).timeline()
    idle, used = jobs.sums(timeline, series.times)
    assert float(np.quantile(np.abs(idle - series.idle), 0.99)) * nodes <= 1
    assert float(np.quantile(np.abs(used / series.used - 1), 0.99)) < 0.01
    assert all(0 <= change.used <= timeline.sizes[change.node] for change in timeline.changes)


def test_idle_periods_last_as_long_as_those_of_the_machine() -> None:
    """The published shares; the series of one machine is not another's, hence the width."""
    drawn = machine.like_daint(48 * HOUR)
    periods = np.array(jobs.idle_periods(jobs.Generator(drawn, 300, seed=3).timeline()))
    assert len(periods) > 1000
    for seconds, least, most in ((300, 0.49, 0.70), (600, 0.70, 0.85), (1200, 0.85, 0.94), (1800, 0.90, 0.97)):
        assert least <= float(np.mean(periods < seconds)) <= most, seconds


def test_a_part_beyond_the_end_of_the_trace_is_refused(series: machine.Series) -> None:
    with pytest.raises(UsageError, match="beyond its end"):
        series.part(5 * HOUR, 2 * HOUR)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("time,idle\n1,2\n")
    with pytest.raises(UsageError):
        machine.read(file)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_replay_as_one_error(
    series: machine.Series, timeline: Timeline, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Replay, "_sample", lambda *_: _raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        replay(timeline, policies.variants()[0], series.idle_free)


async def _raise_signal(number: signal.Signals) -> None:
    signal.raise_signal(number)


def test_an_interrupted_benchmark_shows_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_, second = policies.variants()

    def interrupted(timeline: Timeline, policy: policies.Policy, idle_free: float, seed: int) -> Outcome:
        if policy == first:
            return replay(timeline, policy, idle_free, seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(replaying, "replay", interrupted)
    command = ["bench", "trace", "--nodes", str(NODES), "--hours", "0.2", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, [*command, "--policy", first.name, "--policy", second.name])
    assert result.exit_code == 130
    assert first.name in result.stdout
    assert second.name not in result.stdout
    assert "1 of 2 policies" in result.stderr
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.parametrize("name", ["default", "drop"])
def test_every_job_of_a_replay_gets_its_memory_or_is_counted_late(
    series: machine.Series, timeline: Timeline, name: str, tmp_path: Path
) -> None:
    (policy,) = [one for one in policies.variants() if one.name == name]
    outcome = replay(timeline, replace(policy, store=16 * GIB), series.idle_free)
    figures = outcome.figures()
    assert figures["jobs"] == sum(change.kind == "begin" for change in timeline.changes) > 0
    assert len(outcome.jobs) >= outcome.jobs_in_time > 0
    assert 0 < figures["leased_share"] <= 1
    assert all(sample.leased <= sample.free for sample in outcome.samples)
    if name == "drop":
        assert figures["migrated"] == figures["lost"] == 0
    else:
        assert figures["dropped"] == 0
    report.write([outcome], tmp_path / "figures.json", trace="drawn")
    assert (tmp_path / "figures.json").stat().st_size > 0
