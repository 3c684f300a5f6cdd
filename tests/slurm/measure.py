"""Bytes that the kernel has given to the shared memory of a donor: `python measure.py PID-OF-AGENT`.

A job runs it as its first step. It asks the kernel about every memfd that the agent or a process below
it holds, and nothing of memfaas.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_BLOCK = 512


def family(root: int) -> set[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # ended meanwhile
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found, waiting = set(), [root]
    while waiting:
        found.add(one := waiting.pop())
        waiting += children.get(one, [])
    return found


def memfd_bytes(root: int) -> int:
    files = {}
    for pid in family(root):
        try:
            descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                if os.readlink(descriptor).startswith("/memfd:"):
                    status = descriptor.stat()
                    files[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
            except OSError:
                continue
    return sum(files.values())


if __name__ == "__main__":
    print(memfd_bytes(int(sys.argv[1])))
