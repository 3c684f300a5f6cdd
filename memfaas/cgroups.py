"""The memory control groups that a process is in: of version 1, of version 2, or a mixture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 1 << 60
"""Kernels write about 2^63 for "none"."""
_V2_USAGE = "memory.current"


@dataclass(frozen=True)
class Group:
    """One control group on the way from ours to the root."""

    folder: Path
    limits: tuple[str, ...]
    usage: str
    cache: str

    @property
    def version(self) -> int:
        """1 or 2."""
        return 2 if self.usage == _V2_USAGE else 1

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


def groups(proc: Path = Path("/proc"), root: Path = Path("/")) -> list[Group]:
    """Our own memory control groups and those above them; `root` is where the mounts are looked for."""
    found = []
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _folders(proc, root, "cgroup2", "", path):
                found.append(Group(folder, ("memory.max", "memory.high"), _V2_USAGE, "inactive_file"))
        elif "memory" in controllers.split(","):
            for folder in _folders(proc, root, "cgroup", "memory", path):
                found.append(Group(folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"))
    return found


def _folders(proc: Path, root: Path, kind: str, controller: str, path: str) -> list[Path]:
    """The folder of a control group and those above it, as far as they are mounted here."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        filesystem, _, options = right.split()[:3]
        shown, mount = left.split()[3:5]
        if filesystem != kind or (controller and controller not in options.split(",")):
            continue
        top = root / mount.lstrip("/")
        # A container may see only its own group, under another name.
        folder = top / os.path.relpath(path, shown) if Path(path).is_relative_to(shown) else top
        return [above for above in (folder, *folder.parents) if above.is_relative_to(top)]
    return []
