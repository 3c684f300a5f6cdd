"""How much memory the node can spare: what is available, within the limits of our own control groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
NO_LIMIT = 1 << 60
"""Kernels write about 2^63 for "none"."""


def available(proc: Path = Path("/proc"), backing: Path | None = None) -> int:
    """Bytes that the node could give to programs now, within the limits of our own control groups.

    With `backing`: that the file system of this folder could give to users now.
    """
    if backing is not None:
        space = os.statvfs(backing)
        return space.f_bavail * space.f_frsize
    return min([_mem_available(proc), *(group.available() for group in groups(proc))])


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


@dataclass(frozen=True)
class Group:
    """One control group on the way from ours to the root."""

    folder: Path
    limits: tuple[str, ...]
    usage: str
    cache: str

    def limit(self) -> int:
        """Bytes; NO_LIMIT or more if it has none."""
        return min(_number(self.folder / name) for name in self.limits)

    def available(self) -> int:
        """Free below its limit, counting file cache that the kernel would drop; a lot if it has none."""
        limit = self.limit()
        if limit >= NO_LIMIT:
            return NO_LIMIT
        used = _number(self.folder / self.usage)
        return max(0, limit - max(0, used - self._cache()))

    def _cache(self) -> int:
        try:
            lines = (self.folder / "memory.stat").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith(self.cache + " ")), 0)


def _number(file: Path) -> int:
    try:
        text = file.read_text().strip()
    except OSError:
        return NO_LIMIT
    return NO_LIMIT if text == "max" else int(text)


def groups(proc: Path) -> list[Group]:
    """The memory control groups that limit us, of version 1, version 2, or a mixture."""
    found = []
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _folders(proc, "cgroup2", "", path):
                found.append(Group(folder, ("memory.max", "memory.high"), "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            for folder in _folders(proc, "cgroup", "memory", path):
                found.append(Group(folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"))
    return found


def _folders(proc: Path, kind: str, controller: str, path: str) -> list[Path]:
    """The folder of a control group and those above it, as far as they are mounted here."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        filesystem, _, options = right.split()[:3]
        root, mount = left.split()[3:5]
        if filesystem != kind or (controller and controller not in options.split(",")):
            continue
        top = Path(mount)
        # A container may see only its own group, under another name.
        folder = top / os.path.relpath(path, root) if Path(path).is_relative_to(root) else top
        return [above for above in (folder, *folder.parents) if above.is_relative_to(top)]
    return []
