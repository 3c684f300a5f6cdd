"""The benchmark of the verbs fabric judges what it measured, and measures software alone where there is no device."""

from __future__ import annotations

import io
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from memfaas.bench.cli import bench
from memfaas.bench.result import Machine, write
from memfaas.bench.verbs import bars, built, null, report, run
from memfaas.bench.verbs.bars import (
    BARE,
    NULL_BARE,
    NULL_OURS,
    OURS,
    PERFTEST,
    SIZES,
    Op,
    Row,
    SkippedError,
    VerbsResult,
    judge,
)
from memfaas.bench.verbs.ways import STORE_OPS
from memfaas.errors import FabricUnavailable
from memfaas.fabric import devices
from memfaas.testing import fsck
from memfaas.units import GIB, KIB

# --- bars and report ------------------------------------------------------------------------------------


def row(way: str, op: Op, size: int, us: list[float | None], skipped: str | None = None) -> Row:
    return Row(way=way, op=op, size=size, us=us, skipped=skipped)


def result_of(*rows: Row) -> VerbsResult:
    machine = Machine(
        processor="none", cores=1, memory_bytes=GIB, kernel="0", python="3", shmem_huge_pages="never", load_before=0
    )
    found = VerbsResult(started="now", seconds=1, device="mlx5_0:1:3", machine=machine, rows=[*rows])
    found.verdicts = judge(found)
    return found


def verdict_of(found: VerbsResult, bar: str, size: int) -> tuple[float | None, bool | None, str]:
    (verdict,) = [one for one in found.verdicts if one.bar.startswith(bar) and one.size == size]
    return verdict.figure, verdict.passed, verdict.note


def test_the_block_that_is_read_is_the_one_of_the_value() -> None:
    longest_key = 3
    assert fsck.block_size(bars.VALUE + 64 + longest_key) == bars.BLOCK


def test_a_get_is_set_against_a_read_of_its_block_too() -> None:
    found = result_of(
        row(OURS, "get", bars.VALUE, [6.0]), row(BARE, "read", bars.VALUE, [3.0]), row(BARE, "read", bars.BLOCK, [5.0])
    )
    figures = {one.bar: one.figure for one in found.verdicts if one.op == "get" and one.figure is not None}
    assert figures == {
        "get, its place known: at most 1.3 x one READ": 2.0,
        "get, its place known: at most 1.3 x one READ of its block": 1.2,
    }


def test_a_time_is_set_against_that_of_the_same_round() -> None:
    found = result_of(
        row(OURS, "read", 8, [2.0, 30.0, 9.0, None]),
        row(BARE, "read", 8, [2.0, 20.0, None, 1.0]),
        row(OURS, "read", 64 * KIB, [110.0]),
        row(BARE, "read", 64 * KIB, [100.0]),
        row(PERFTEST, "read", 64 * KIB, [50.0]),
    )
    assert verdict_of(found, "READ: at most", 8) == (1.25, False, "")
    assert verdict_of(found, "READ: at most", 64 * KIB) == (1.1, True, "")
    assert verdict_of(found, "READ: 0.9", 64 * KIB) == (2.2, False, "")


def test_what_a_store_adds_is_a_difference_of_two_times_without_a_device() -> None:
    found = result_of(
        row(NULL_OURS, "get", 4 * KIB, [1.0, 9.0, 2.0]),
        row(NULL_BARE, "read", 4 * KIB, [0.5, 0.5, 0.5]),
        row(NULL_OURS, "put", 4 * KIB, [23.0]),
        row(NULL_BARE, "exchange", 4 * KIB, [20.0]),
    )
    assert verdict_of(found, "no device: get", 4 * KIB) == (1.5, True, "")
    assert verdict_of(found, "no device: put", 4 * KIB) == (3.0, False, "")


def test_a_batch_must_be_eight_times_as_fast_for_each_key() -> None:
    slow = result_of(row(OURS, "get", 4 * KIB, [80.0]), row(OURS, "get in batches", 4 * KIB, [11.0]))
    fast = result_of(row(OURS, "get", 4 * KIB, [80.0]), row(OURS, "get in batches", 4 * KIB, [9.0]))
    assert verdict_of(slow, "get, batches", 4 * KIB)[1] is False
    assert verdict_of(fast, "get, batches", 4 * KIB)[1] is True


def test_a_bar_without_figures_is_no_pass_and_says_why() -> None:
    found = result_of(row(OURS, "write", 8, [1.0]), row(BARE, "write", 8, [None], skipped="no gcc"))
    assert verdict_of(found, "WRITE: at most", 8) == (None, None, f"{BARE} skipped: no gcc")
    assert verdict_of(found, "put: at most", 4 * KIB) == (None, None, "not measured in this run")


def test_the_report_shows_figures_bars_and_what_was_skipped() -> None:
    found = result_of(
        row(OURS, "write", 64 * KIB, [130.0]),
        row(BARE, "write", 64 * KIB, [100.0]),
        row(PERFTEST, "write", 64 * KIB, [None], skipped="no ib_write_bw: install it"),
    )
    file = io.StringIO()
    Console(file=file, width=200).print(report.show(found))
    text = file.getvalue()
    for part in ("RDMA device mlx5_0:1:3", "130.0", "480.8", f"skipped {PERFTEST}: no ib_write_bw: install it"):
        assert part in text
    for part in ("missed", "1.3", "not measured"):
        assert part in text


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    found = result_of(row(OURS, "get", 4 * KIB, [1.0, None]))
    write(found, tmp_path / "r.json")
    assert report.read(tmp_path / "r.json") == found
    (tmp_path / "r.json").write_text('{"schema": "memfaas-bench-verbs/0"}')
    with pytest.raises(msgspec.ValidationError):
        report.read(tmp_path / "r.json")


# --- without a device -------------------------------------------------------------------------------------


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(wanted: str = "") -> str:
        return devices.choose([], wanted)

    monkeypatch.setattr(run, "chosen_device", none)


@pytest.mark.slow
@pytest.mark.usefixtures("no_device")
def test_without_a_device_software_alone_is_measured() -> None:
    found = run.measure_verbs("", 2, lambda share, doing: None)
    without = {(one.way, one.op, one.size): one for one in found.rows if one.way in (NULL_OURS, NULL_BARE)}
    assert set(without) == set(null.OURS + null.BARE)
    assert [name for name, one in without.items() if one.skipped or len(one.us) != 2 or not all(one.us)] == []
    others = [one for one in found.rows if one.way not in (NULL_OURS, NULL_BARE)]
    assert {one.skipped for one in others} == {"verbs: this node has no RDMA device"}
    assert {(one.op, one.size) for one in others if one.way == OURS} == {
        *((op, size) for op in ("read", "write") for size in SIZES),
        *((op, 4 * KIB) for op in STORE_OPS),
    }
    judged = {one.bar for one in found.verdicts if one.passed is not None}
    assert judged == {one.bar for one in found.verdicts if one.bar.startswith("no device")}
    assert len(judged) == 4


@pytest.mark.usefixtures("no_device")
def test_a_device_that_is_demanded_and_not_there_is_an_error() -> None:
    with pytest.raises(FabricUnavailable, match="no RDMA device mlx5_7"):
        run.measure_verbs("mlx5_7", 1, lambda share, doing: None)


def test_an_emulated_processor_says_nothing_of_software() -> None:
    machine = result_of().machine
    machine.processor = "QEMU TCG CPU version 2.5+"
    _, make = run._null(machine)
    with ExitStack() as stack, pytest.raises(SkippedError, match="emulated"):
        make(stack)


@pytest.mark.slow
def test_a_process_that_ends_is_named_and_not_waited_for() -> None:
    with ExitStack() as stack:
        process = stack.enter_context(null.NullDevice(stack))
        ways = process.ways()
        assert ways[NULL_OURS, "read", 8]() > 0
        process._process.kill()
        process._process.wait()
        for _ in range(2):
            with pytest.raises(SkippedError, match="has ended"):
                ways[NULL_OURS, "read", 8]()


def test_without_a_compiler_the_way_is_skipped_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(built.BUILT, raising=False)
    with pytest.raises(SkippedError, match="apt-get install gcc libibverbs-dev"):
        built.build(tmp_path)


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_json_and_exits_by_the_bars_only_when_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def measure(wanted: str, rounds: int, report: object) -> VerbsResult:
        asked.append((wanted, rounds))
        return result_of(row(OURS, "read", 8, [2.0]), row(BARE, "read", 8, [1.0]))

    monkeypatch.setattr("memfaas.bench.cli.measure_verbs", measure)
    arguments = ["verbs", "--device", "mlx5_1", "--rounds", "7", "--output", str(tmp_path)]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    assert asked == [("mlx5_1", 7)]
    (path,) = tmp_path.glob("bench-verbs-*.json")
    assert [one.way for one in report.read(path).rows] == [OURS, BARE]
    assert CliRunner().invoke(bench, [*arguments, "--strict"]).exit_code == 1
