"""The virtual machine of the tests is the node that they expect."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.slow]


def test_the_machine_has_an_rdma_device_in_software() -> None:
    port = Path("/sys/class/infiniband/rxe0/ports/1")
    assert "ACTIVE" in (port / "state").read_text()


def test_the_kernel_tells_of_memory_pressure_and_has_control_groups_of_version_2() -> None:
    assert Path("/proc/pressure/memory").read_text().startswith("some ")
    assert "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
