"""Looks at a local cluster from outside: which processes serve what, and what memory they hold."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from memfaas.client.local import LocalCluster, _processes_with

LIMIT_S = 60.0
"""For what a test waits for: far more than it takes, so that only a hang is a failure."""


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def processes_of(cluster: LocalCluster) -> list[int]:
    return _processes_with(f"MEMFAAS_LOCAL_CLUSTER={cluster._token}")


def functions_of(cluster: LocalCluster) -> dict[str, int]:
    """The memory functions that serve a lease: process ids by the first 8 digits of the lease."""
    prefix = "mf-"
    return {name.removeprefix(prefix): pid for pid, name in _names_of(cluster).items() if name.startswith(prefix)}


def idle_functions_of(cluster: LocalCluster) -> int:
    """How many memory functions wait for a lease."""
    return list(_names_of(cluster).values()).count("memfaas-idle")


def _names_of(cluster: LocalCluster) -> dict[int, str]:
    found = {}
    for pid in processes_of(cluster):
        try:
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # it has ended meanwhile
            pass
    return found


def kill(pid: int) -> None:
    """Returns when it has ended: until then a network device may still reach its memory."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        until(lambda: _has_ended(pid))


def _has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


class Backing(NamedTuple):
    """A lease's data memory, as the kernel knows it."""

    path: Path
    """Opens it, for as long as the process lives that it was found in."""
    inode: int
    bytes: int
    """Backed by pages."""


def memory_of(pid: int) -> tuple[Path, Path]:
    """Data and control memory that a memory function serves, as files to open while it lives."""
    found: dict[bool, Path] = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection that ended just now
            target = os.readlink(path)
            if target.startswith("/memfd:memfaas:"):
                found[":control" in target] = path
    return found[False], found[True]


def backing_of(pid: int) -> Backing:
    """The data memory that a memory function serves."""
    path, _ = memory_of(pid)
    status = path.stat()
    return Backing(path, status.st_ino, status.st_blocks * 512)
