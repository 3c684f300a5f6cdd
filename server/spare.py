"""How much memory the node can spare: what is available, within the limits of our own control groups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from memfaas import cgroups, node

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
    # Free pages that MemAvailable leaves out count, too.
    return min([node.mem_available(proc) + _in_processor_lists(proc), *(group.available() for group in found)])


def _in_processor_lists(proc: Path) -> int:
    """Up to half a GiB for each processor. Memory that was just given back lies there for seconds."""
    try:
        lines = (proc / "zoneinfo").read_text().splitlines()
    except OSError:
        return 0
    counts = (line.split() for line in lines if line.lstrip().startswith("count:"))
    return sum(int(words[1]) for words in counts) * _PAGE
