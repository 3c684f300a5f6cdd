"""The benchmark of reclaims measures what it says, and leaves the machine as it was."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from memfaas import node
from memfaas.bench.cli import bench
from memfaas.bench.reclaim import bars, lent, limits, report, result, ways
from memfaas.bench.reclaim.helper import Helper, HelperError
from memfaas.bench.reclaim.pages import ALL, Pages, Turns, turns
from memfaas.bench.reclaim.raw import Raw, WrongPagesError
from memfaas.bench.reclaim.result import First, ReclaimResult, Row
from memfaas.bench.reclaim.run import Run, Way
from memfaas.bench.result import Machine, write
from memfaas.messages import FreedBytes, Reclaimed, Step
from memfaas.units import GIB, KIB, MIB

SIZE = 4 * MIB

# --- pages ------------------------------------------------------------------------------------------


@pytest.fixture
def choosable() -> Iterator[str]:
    """The kernel's choice, which must be the same afterwards."""
    if not os.access(node.SHMEM_ENABLED, os.W_OK):
        pytest.skip(f"only root may change {node.SHMEM_ENABLED}")
    before = node.SHMEM_ENABLED.read_text()
    yield before
    after = node.SHMEM_ENABLED.read_text()
    if after != before:
        node.SHMEM_ENABLED.write_text(before.partition("[")[2].partition("]")[0])
    assert after == before


def test_the_choice_of_pages_is_put_back_when_the_run_is_interrupted(choosable: str) -> None:
    def interrupted() -> None:
        with turns() as choose:
            choose.take("2 MiB")
            assert node.gives_huge_pages()
            choose.take("4 KiB")
            assert not node.gives_huge_pages()
            choose.take("2 MiB")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert node.SHMEM_ENABLED.read_text() == choosable


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_the_choice_of_pages_is_put_back_when_the_run_is_killed(choosable: str, sent: signal.Signals) -> None:
    script = """
import sys
from memfaas.bench.reclaim.pages import turns
with turns() as choose:
    for pages in ("4 KiB", "2 MiB"):
        choose.take(pages)
    print("taken", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        assert node.gives_huge_pages()
        process.send_signal(sent)
        process.stdout.read()  # ends when the guard has ended too, for it has inherited it
    finally:
        process.kill()
        process.communicate()
    assert node.SHMEM_ENABLED.read_text() == choosable


def test_pages_that_may_not_be_chosen_are_refused_with_the_reason(tmp_path: Path) -> None:
    with turns(tmp_path) as choose:
        choose.take("4 KiB")
        with pytest.raises(OSError, match="says nothing, and only root may change it"):
            choose.take("2 MiB")


# --- the limits ---------------------------------------------------------------------------------------


@pytest.fixture(params=ALL)
def pages(request: pytest.FixtureRequest) -> Iterator[Pages]:
    """Each kind that can be had, taken."""
    kind: Pages = request.param
    with turns() as choose:
        try:
            choose.take(kind)
        except OSError as error:
            pytest.skip(str(error))
        yield kind


def test_shared_memory_has_the_pages_that_were_asked_for_and_loses_them(pages: Pages) -> None:
    for free in (Raw.punch, Raw.truncate):
        memory = Raw(SIZE, pages, shared=True)
        assert memory.backed() == 0
        memory.populate()
        assert memory.backed() == SIZE
        free(memory)
        assert memory.backed() == 0
        memory.close()


def test_pages_of_another_kind_are_noticed(choosable: str) -> None:
    with turns() as choose:
        choose.take("4 KiB")
        memory = Raw(SIZE, "2 MiB", shared=True)
        with pytest.raises(WrongPagesError, match="0 B of 4 MiB"):
            memory.populate()
        memory.close()
        choose.take("4 KiB")
        with pytest.raises(HelperError, match="0 B of 4 MiB"):
            Helper("receive", SIZE, "2 MiB", populated=True)


@pytest.mark.parametrize("limit", [limits.punch, limits.truncate, limits.unmap])
def test_a_limit_is_longer_for_more_memory(limit: object, pages: Pages) -> None:
    assert callable(limit)
    small = min(limit(SIZE, pages) for _ in range(3))
    large = min(limit(16 * SIZE, pages) for _ in range(3))
    assert 0 < small < large


def test_a_killed_helper_is_gone_when_the_time_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    def kill(self: Helper) -> None:
        real(self)
        killed.append(self._process.pid)
        assert not Path(f"/proc/{self._process.pid}").exists()

    real = Helper.kill
    monkeypatch.setattr(Helper, "kill", kill)
    assert limits.kill(SIZE, "4 KiB") > 0
    assert len(killed) == 1


@pytest.mark.parametrize("copy", [limits.copy_to_fresh, limits.copy_to_populated, limits.write])
def test_a_bare_copy_ends_when_all_has_arrived(copy: object) -> None:
    assert callable(copy)
    assert copy(SIZE, "4 KiB") > 0


# --- the run ------------------------------------------------------------------------------------------


class AnyPages(Turns):
    def __init__(self) -> None:
        self.taken: list[Pages] = []

    def take(self, pages: Pages) -> None:
        self.taken.append(pages)


@dataclass
class FakeWay:
    """Takes a second for each MiB, and fails in the turns that are named."""

    fails: tuple[int, ...] = ()
    calls: list[tuple[int, Pages]] = field(default_factory=list)

    def run(self, size: int, pages: Pages) -> float:
        self.calls.append((size, pages))
        if len(self.calls) in self.fails:
            raise lent.NotSo("it stayed where it was")
        return size / MIB


def run_of(*fakes: FakeWay, sizes: tuple[int, ...] = (MIB,), rounds: int = 1, copies: int = 1) -> Run:
    chosen = [Way(f"way {number}", "memfaas", fake.run, copies) for number, fake in enumerate(fakes)]
    run = Run(chosen, sizes, 2 * GIB, random.Random(1))
    run.run(rounds, AnyPages(), lambda share, doing: None)
    return run


def test_all_ways_take_part_in_every_turn() -> None:
    one, other = FakeWay(), FakeWay()
    run = run_of(one, other, sizes=(MIB, 2 * MIB), rounds=2)
    assert sorted(one.calls) == sorted(other.calls)
    assert len(run.rows) == 2 * 2 * 2
    # A small size has more turns in each round, as they are shorter.
    assert {row.size: len(row.measured()) for row in run.rows} == {MIB: 4, 2 * MIB: 2}
    assert {row.p50 for row in run.rows if row.size == MIB} == {1.0}


def test_a_way_that_fails_is_named_and_takes_part_no_more() -> None:
    bad, good = FakeWay(fails=(1,)), FakeWay()
    run = run_of(bad, good, rounds=2)
    by_way = {way: [row for row in run.rows if row.way == way] for way in ("way 0", "way 1")}
    assert [row.skipped for row in by_way["way 1"]] == [None, None]
    failed = [row for row in by_way["way 0"] if row.skipped is not None]
    assert [(row.skipped, row.seconds) for row in failed] == [("it stayed where it was", [None, None])]
    assert {len(row.seconds) for row in run.rows} == {2}


def test_what_the_memory_cannot_hold_is_not_tried() -> None:
    fake = FakeWay()
    run = run_of(fake, sizes=(MIB, 768 * MIB), copies=2)
    assert {size for size, _ in fake.calls} == {MIB}
    assert {row.skipped for row in run.rows if row.size > MIB} == {"needs 2.5 GiB, and 2 GiB are available"}
    assert run.most == 2 * MIB


# --- bars and report ------------------------------------------------------------------------------------


def row(way: str, seconds: list[float | None], skipped: str | None = None) -> Row:
    kind: result.Kind = "limit" if way.startswith("bare") else "memfaas"
    return Row(way=way, kind=kind, size=GIB, pages="2 MiB", seconds=seconds, skipped=skipped)


def result_of(*rows: Row, firsts: tuple[First, ...] = ()) -> ReclaimResult:
    machine = Machine(
        processor="none", cores=1, memory_bytes=GIB, kernel="0", python="3", shmem_huge_pages="never", load_before=0
    )
    found = ReclaimResult(started="now", seconds=1, seed=1, machine=machine, rows=[*rows], firsts=[*firsts])
    found.verdicts = bars.judge(found)
    return found


def test_a_step_is_set_against_the_fastest_limit_of_the_same_turn() -> None:
    found = result_of(
        row(ways.DROPPED, [2.0, 6.0, None]), row(ways.PUNCH_HOLE, [1.0, 9.0, 1.0]), row(ways.TRUNCATE, [4.0, 3.0, 1.0])
    )
    verdict = next(one for one in found.verdicts if one.bar.startswith("dropped"))
    assert (verdict.figure, verdict.passed) == (2.0, False)
    found = result_of(row(ways.MIGRATED, [1.3]), row(ways.COPY, [1.0]), row(ways.COPY_POPULATED, [0.5]))
    verdict = next(one for one in found.verdicts if one.bar.startswith("migrated"))
    assert (verdict.figure, verdict.passed) == (1.3, True)


def test_a_bar_without_figures_is_no_pass_and_says_why() -> None:
    found = result_of(row(ways.UNLENT, [None], skipped="there is none"), row(ways.TRUNCATE, [1.0]))
    by_bar = {verdict.bar.partition(":")[0]: verdict for verdict in found.verdicts}
    assert (by_bar["unlent"].passed, by_bar["unlent"].note) == (None, "unlent skipped: there is none")
    assert (by_bar["punched"].passed, by_bar["punched"].note) == (None, "not run")
    assert by_bar["first lease from the warm pool"].passed is None


def test_first_leases_are_judged_by_their_median() -> None:
    firsts = (First(what=ways.FROM_POOL, seconds=[0.02, 0.03, 5.0]), First(what=ways.FROM_START, seconds=[1.5]))
    passed = {verdict.bar.partition(":")[0]: verdict.passed for verdict in result_of(firsts=firsts).verdicts}
    assert passed["first lease from the warm pool"] is True
    assert passed["first lease of a donor that lends 8 GiB"] is False


def test_the_report_shows_figures_ratios_and_what_was_skipped() -> None:
    found = result_of(
        row(ways.DROPPED, [0.004, 0.004]),
        row(ways.PUNCH_HOLE, [0.002, 0.002]),
        row(ways.TRUNCATE, [0.003, 0.003]),
        row(ways.SPILLED, [None], skipped="no scratch"),
        firsts=(First(what=ways.FROM_POOL, seconds=[0.02]), First(what=ways.FROM_START, skipped="no donor")),
    )
    file = io.StringIO()
    Console(file=file, width=200).print(report.show(found))
    text = file.getvalue()
    for part in ("4.00 ms", "250 GiB/s", "2.00x", "skipped spilled, 1 GiB in pages of 2 MiB: no scratch"):
        assert part in text
    for part in (f"skipped {ways.FROM_START}, no donor", "MISS", "20 ms PASS"):
        assert part in text


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    found = result_of(row(ways.DROPPED, [1.0, None]))
    write(found, tmp_path / "r.json")
    assert result.read(tmp_path / "r.json") == found
    (tmp_path / "r.json").write_text('{"schema": "memfaas-bench-reclaim/0"}')
    with pytest.raises(msgspec.ValidationError):
        result.read(tmp_path / "r.json")


# --- the steps ------------------------------------------------------------------------------------------


def reclaimed(*steps: tuple[Step, int], in_time: bool = True) -> Reclaimed:
    parts = [FreedBytes(how=how, size=size, seconds=0.1) for how, size in steps]
    freed = sum(size for _, size in steps)
    return Reclaimed(donor="d", asked=freed, freed=freed, seconds=0.1, in_time=in_time, steps=parts)


def test_memory_that_came_back_otherwise_is_no_figure() -> None:
    lent._check(reclaimed(("unlent", KIB), ("migrated", MIB)), MIB, "migrated")
    with pytest.raises(lent.NotSo, match="1 MiB were to be migrated, but the donor says: 1 MiB lost"):
        lent._check(reclaimed(("lost", MIB)), MIB, "migrated")
    with pytest.raises(lent.NotSo, match="the donor says: nothing"):
        lent._check(reclaimed(), MIB, "unlent")
    with pytest.raises(lent.NotSo, match="only 1 MiB were free"):
        lent._check(reclaimed(("migrated", MIB), in_time=False), MIB, "migrated")


@pytest.mark.slow
@pytest.mark.parametrize("step", [lent.unlent, lent.punched, lent.dropped, lent.migrated, lent.spilled])
def test_each_step_frees_memory_of_a_real_donor(step: object) -> None:
    assert callable(step)
    assert step(32 * MIB, "4 KiB") > 0


@pytest.mark.slow
def test_the_first_lease_of_a_donor_is_served() -> None:
    assert 0 < lent.first_from_pool() < lent.DEADLINE_S
    assert 0 < lent.first_from_start() < lent.DEADLINE_S


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_json_and_exits_by_the_bars_only_when_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def measure(*arguments: object, report: object) -> ReclaimResult:
        asked.append(arguments)
        return result_of(row(ways.DROPPED, [2.0]), row(ways.TRUNCATE, [1.0]))

    monkeypatch.setattr("memfaas.bench.cli.measure_reclaim", measure)
    arguments = ["reclaim", "--size", "64MiB", "--rounds", "7", "--output", str(tmp_path)]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    assert asked == [((64 * MIB,), 7)]
    (path,) = tmp_path.glob("bench-reclaim-*.json")
    assert [one.way for one in result.read(path).rows] == [ways.DROPPED, ways.TRUNCATE]
    assert CliRunner().invoke(bench, [*arguments, "--strict"]).exit_code == 1
    assert CliRunner().invoke(bench, ["reclaim", "--size", "much"]).exit_code == 2
