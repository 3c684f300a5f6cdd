"""The mounts of memfaas on this node, as the kernel lists them. Needs neither pyfuse3 nor libfuse."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path

from memfaas.errors import UsageError

TYPE = "fuse.memfaas"
PID_XATTR = "memfaas.pid"
"""Of the root of a mount: which process serves it."""
_TABLE = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def is_mounted(folder: Path) -> bool:
    """Whether memfaas is mounted there, with or without a process that serves it."""
    table = _by_place()
    place = os.fsencode(os.path.abspath(folder))
    if place not in table:  # to look where a link leads asks the mount's process, which may hang
        place = os.fsencode(os.path.realpath(folder))
    return table.get(place) == TYPE.encode()


def _by_place() -> dict[bytes, bytes]:
    """Of each mount point: the type of what is on top."""
    table = {}
    for line in _TABLE.read_bytes().splitlines():
        where, _, what = line.partition(b" - ")
        place = _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), where.split()[4])
        table[place] = what.split()[0]
    return table


def is_dead(folder: Path) -> bool:
    """Whether the process that served what is mounted there has ended without unmounting."""
    try:
        os.stat(folder)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def pid_of(folder: Path) -> int | None:
    """Which process serves the mount; None when there is none any more."""
    try:
        return int(os.getxattr(folder, PID_XATTR))
    except (OSError, ValueError):
        return None


def unmount(folder: Path, lazy: bool = False) -> None:
    """Takes the mount out of the tree; `lazy`: also while files are open. Raises UsageError, also when it is busy."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(folder)]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise UsageError("unmounting needs fusermount3: install fuse3") from None
    if done.returncode:
        raise UsageError(f"cannot unmount {folder}: {done.stderr.strip()}")
