"""`memfaas bench verbs` with an RDMA device: everything that it sets side by side takes part."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from memfaas.bench.verbs import perftest, report
from memfaas.bench.verbs.bars import BARE, NULL_BARE, NULL_OURS, OURS, PERFTEST, PERFTEST_LATENCY, PYVERBS
from memfaas.bench.verbs.ways import COUNTS
from memfaas.cli import main

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]

WITHOUT_DEVICE = {NULL_OURS, NULL_BARE}


def test_every_way_is_measured_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perftest, "COUNTS", dict.fromkeys(COUNTS, 5))  # for figures, more are needed
    done = CliRunner().invoke(main, ["bench", "verbs", "--rounds", "1", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("bench-verbs-*.json")
    found = report.read(path)
    assert found.device.startswith("rxe0:1:")
    with_device = [row for row in found.rows if row.way not in WITHOUT_DEVICE]
    assert {row.way for row in with_device} == {OURS, BARE, PYVERBS, PERFTEST, PERFTEST_LATENCY}
    assert [(row.way, row.op, row.size, row.skipped) for row in with_device if row.skipped] == []
    for row in with_device:
        assert len(row.us) == 1
        if row.way not in (PERFTEST, PERFTEST_LATENCY):  # a difference of two times can be none
            assert row.median_us is not None
    assert {row.skipped for row in found.rows if row.way in WITHOUT_DEVICE} == {
        "an emulated processor says nothing of what software takes"
    }
    judged = {one.bar.partition(":")[0] for one in found.verdicts if one.passed is not None}
    assert {"READ", "WRITE", "get, its place known", "get, its place not known", "put"} <= judged
