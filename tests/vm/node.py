"""What the kernel says of the node's memory, and programs that want some of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from memfaas.units import MIB

GROUPS = Path("/sys/fs/cgroup")
_PATIENCE_S = 90.0
_TAKER = """
import mmap, sys, time
kept = []
for line in sys.stdin:
    for _ in range(int(line) >> 22):
        kept.append(mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        for page in range(0, 4 << 20, 4096):
            kept[-1][page] = 1
        time.sleep(0.02)
    print("taken", flush=True)
"""


def meminfo(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def figure(file: Path, name: str) -> int:
    """One line of a file that has a name and a number in each."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name + " "))


def wait_until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not met():
        assert time.monotonic() < deadline, f"waited {_PATIENCE_S:g} s in vain until {what}"
        time.sleep(0.05)


def make_group(name: str, **limits: int) -> Path:
    """A control group of version 2 with these settings, `memory_max` and so on."""
    (GROUPS / "cgroup.subtree_control").write_text("+memory")
    group = GROUPS / name
    group.mkdir()
    for setting, value in limits.items():
        (group / setting.replace("_", ".")).write_text(str(value))
    return group


class Program:
    """Takes memory when it is told to, some 200 MiB a second at most, and keeps it to its end."""

    def __init__(self, group: Path = GROUPS) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        (group / "cgroup.procs").write_text(str(self._process.pid))

    def begin_to_take(self, size: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % -(-size // (4 * MIB) * (4 * MIB)))

    def take(self, size: int) -> None:
        """Returns when it has all of it."""
        self.begin_to_take(size)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"taken\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
