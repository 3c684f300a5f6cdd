"""The benchmark of a mount."""

from __future__ import annotations

import io
import os
import subprocess

import pytest
from rich.console import Console

from memfaas.bench.fs import run
from memfaas.bench.fs.bars import BARS, FLOOR, LISTED, PUBLISHED, SHM, TCP, FsResult, System, judge
from memfaas.bench.fs.report import show
from memfaas.bench.fs.run import JOBS, NAMES, SYSTEMS, measure
from memfaas.bench.result import this_machine
from memfaas.units import MIB


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_measured_and_leaves_nothing_behind(
    system: str, fuse_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, small in {"_FILE": 8 * MIB, "_STORE": 48 * MIB, "_NAMES": 50}.items():
        monkeypatch.setattr(run, name, small)
    before = subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout
    shared = set(os.listdir("/dev/shm"))
    measured = measure(system, 0.2, 100)
    names = set() if "nbd" in system else set(NAMES)
    many = {LISTED} if system in (SHM, TCP) else set()
    assert set(measured) == JOBS.keys() | names | many
    assert all(number > 0 for number in measured.values())
    assert subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout == before
    assert set(os.listdir("/dev/shm")) <= shared


def result(*systems: System) -> FsResult:
    return FsResult(started="now", seconds=1.0, listed=100, machine=this_machine(), systems=list(systems))


def test_bars_are_held_against_the_floor_of_the_same_round() -> None:
    floor = System(name=FLOOR, per_s={name: [100.0, 1000.0] for name in JOBS})
    ours = System(name=SHM, per_s={name: [85.0, 850.0] for name in JOBS} | {"creates": [2_000.0], "stats": [20_000.0]})
    verdicts = {(one.bar, one.op): one for one in judge(result(floor, ours))}
    assert len(verdicts) == sum(len(bar.operations) for bar in BARS)
    random, in_order = verdicts[BARS[0].text, next(iter(JOBS))], verdicts[BARS[1].text, list(JOBS)[-1]]
    assert [random.figure, in_order.figure] == pytest.approx([0.85, 0.85])
    assert [random.passed, in_order.passed] == [True, False]
    assert [verdicts[bar.text, bar.operations[0]].passed for bar in BARS[2:]] == [None, False, True, None]


def test_the_report_says_what_was_reached_and_what_others_say() -> None:
    floor = System(name=FLOOR, per_s={name: [100.0] for name in JOBS})
    found = result(
        floor, System(name=SHM, per_s={"creates": [6_000.0]}), System(name="nbd", skipped="nbdkit is missing")
    )
    found.verdicts = judge(found)
    console = Console(file=io.StringIO(), width=200)
    console.print(show(found))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert any("creates" in line and "6,000" in line and "1,400" in line for line in lines)
    assert any(line.split()[-3:] == ["3000", "200%", "reached"] for line in lines)
    assert "skipped nbd: nbdkit is missing" in lines
    assert all(name in console.file.getvalue() for name in PUBLISHED)
