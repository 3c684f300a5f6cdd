"""How much memory the node can spare: what is available, within the limits of our own control groups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from memfaas import cgroups

_PAGE = os.sysconf("SC_PAGE_SIZE")


def available(
    proc: Path = Path("/proc"), backing: Path | None = None, groups: Iterable[cgroups.Group] | None = None
) -> int:
    """Bytes that the node could give to programs now, within the limits of our own control groups.

    `groups` are these, for one who looks often: to find them takes half of the time. With `backing`: that the
    file system of this folder could give to users now.
    """
    if backing is not None:
        space = os.statvfs(backing)
        return space.f_bavail * space.f_frsize
    found = cgroups.groups(proc) if groups is None else groups
    return min([_mem_available(proc), *(group.available() for group in found)])


def _mem_available(proc: Path) -> int:
    """MemAvailable, and the free pages that it leaves out.

    Those are in lists of each processor, up to half a GiB in each. Memory that was just given back
    lies there for seconds.
    """
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024 + _in_processor_lists(proc)
    raise RuntimeError(f"{proc}/meminfo has no MemAvailable")  # kernels before 3.14


def _in_processor_lists(proc: Path) -> int:
    try:
        lines = (proc / "zoneinfo").read_text().splitlines()
    except OSError:
        return 0
    counts = (line.split() for line in lines if line.lstrip().startswith("count:"))
    return sum(int(words[1]) for words in counts) * _PAGE
