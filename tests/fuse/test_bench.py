"""The benchmark of a mount."""

from __future__ import annotations

import os
import subprocess

import pytest

from memfaas.bench.fs.run import JOBS, SYSTEMS, measure


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_measured_and_leaves_nothing_behind(system: str, fuse_device: None) -> None:
    before = subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout
    shared = set(os.listdir("/dev/shm"))
    measured = measure(system, 0.2)
    assert set(measured.per_s) == {*JOBS, "creates", "stats", "names listed", "opens", "unlinks"}
    assert all(number > 0 for number in measured.per_s.values())
    assert subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout == before
    assert set(os.listdir("/dev/shm")) <= shared
