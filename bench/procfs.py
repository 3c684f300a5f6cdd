"""What the kernel tells about processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PROC = Path("/proc")
_CPUCLOCK_SCHED = 2


def descendants(variable: str, value: str) -> list[int]:
    """Processes that inherited this environment variable, whoever their parent is now; not this process itself."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # it ended meanwhile, or is another user's
                continue
            if wanted in environment.split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def command_line(pid: int) -> list[str]:
    """The words of a process's command line."""
    return (_PROC / str(pid) / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")


def cpu_ns(pid: int) -> int:
    """Nanoseconds that all threads of a process have run so far, also those that have ended."""
    # The clock that clock_getcpuclockid(3) names; schedstat has no sum over ended threads.
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def cpu_ticks(pid: int) -> int:
    """Clock ticks of user and system time, as `top` counts them."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def pss(pid: int, lent: Callable[[str], bool]) -> tuple[int, int]:
    """Bytes of proportional set size of all mappings, and of those whose name `lent` accepts."""
    return sum_pss((_PROC / str(pid) / "smaps").read_text(errors="replace").splitlines(), lent)


def sum_pss(smaps: list[str], lent: Callable[[str], bool]) -> tuple[int, int]:
    """As `pss`, from the lines of a smaps file."""
    total = of_it_lent = 0
    for name, size in _mappings(smaps):
        total += size
        of_it_lent += size if lent(name) else 0
    return total, of_it_lent


def _mappings(smaps: list[str]) -> Iterator[tuple[str, int]]:
    """Name and PSS in bytes of each mapping."""
    name = ""
    for line in smaps:
        words = line.split(maxsplit=5)
        if "-" in words[0] and not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
        elif words[0] == "Pss:":
            yield name, int(words[1]) * 1024
