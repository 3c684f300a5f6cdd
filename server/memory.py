"""The memory of leases, and how much of it a node can spare.

A lease's memory is two memfds. They are sealed so that nobody to whom they are passed can change
their size, except that their owner can cut the data off: that frees it at once, for everybody.

On a spill donor the data is a file without a name, in a folder of local scratch. All its blocks are
allocated when it is made: a disk that is full refuses a lease, and never kills who writes to one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from memfaas import _native
from memfaas.errors import CapacityError, UsageError
from memfaas.messages import Kind, Memory
from memfaas.units import format_size


def make(kind: Kind, size: int, name: str, backing: Path | None = None) -> tuple[int, int]:
    """Fresh data and control memory for `size` usable bytes; not yet formatted, nor backed by pages.

    With `backing`, the data is a file in this folder, with all its blocks; making it may take a while
    where the file system cannot allocate without writing. CapacityError when it has not so many bytes,
    UsageError when no file can be made there.
    """
    data_bytes, control_bytes = _native.geometry(kind, size)
    grow, shrink, seal = fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL
    data = _memfd(f"memfaas:{name}", data_bytes, grow | seal) if backing is None else _file(backing, data_bytes)
    try:
        return data, _memfd(f"memfaas:{name}:control", control_bytes, grow | shrink | seal)
    except BaseException:
        os.close(data)
        raise


def _memfd(name: str, size: int, seals: int) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _file(folder: Path, size: int) -> int:
    descriptor = _unnamed(folder)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(f"{folder} has no room for {format_size(size)}: {error.strerror}") from error
        raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unnamed(folder: Path) -> int:
    """A new file that is gone when nobody has it open. Raises UsageError."""
    try:
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # NFS and others
                raise
        descriptor, path = tempfile.mkstemp(prefix=".memfaas-", dir=folder)
        os.unlink(path)
        return descriptor
    except OSError as error:
        raise UsageError(f"cannot make a file in {folder} to lend: {error.strerror}") from error


def check_backing(folder: Path) -> None:
    """Whether leases can lie in this folder. UsageError when they cannot."""
    os.close(_unnamed(folder))


def populated(data: int) -> int:
    """Bytes of a lease's memory that are backed by pages, or by blocks of the disk."""
    return os.fstat(data).st_blocks * 512


# --- what the node can spare ------------------------------------------------------------------------


def available(proc: Path = Path("/proc"), backing: Path | None = None) -> int:
    """Bytes that the node could give to programs now, within the limits of our own control groups.

    With `backing`: that the file system of this folder could give to users now.
    """
    if backing is not None:
        space = os.statvfs(backing)
        return space.f_bavail * space.f_frsize
    return min([_mem_available(proc), *(level.available() for level in _levels(proc))])


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
class _Level:
    """One control group on the way from ours to the root."""

    folder: Path
    limits: tuple[str, ...]
    usage: str
    cache: str

    def available(self) -> int:
        """Free below its limit, counting file cache that the kernel would drop; a lot if it has none."""
        limit = min(_number(self.folder / name) for name in self.limits)
        if limit >= _NO_LIMIT:
            return _NO_LIMIT
        used = _number(self.folder / self.usage)
        return max(0, limit - max(0, used - self._cache()))

    def _cache(self) -> int:
        try:
            lines = (self.folder / "memory.stat").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith(self.cache + " ")), 0)


_PAGE = os.sysconf("SC_PAGE_SIZE")
_NO_LIMIT = 1 << 60
"""Kernels write about 2^63 for "none"."""


def _number(file: Path) -> int:
    try:
        text = file.read_text().strip()
    except OSError:
        return _NO_LIMIT
    return _NO_LIMIT if text == "max" else int(text)


def _levels(proc: Path) -> list[_Level]:
    """The memory control groups that limit us, of version 1, version 2, or a mixture."""
    levels = []
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _folders(proc, "cgroup2", "", path):
                levels.append(_Level(folder, ("memory.max", "memory.high"), "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            for folder in _folders(proc, "cgroup", "memory", path):
                levels.append(
                    _Level(folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
                )
    return levels


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


# --- accounts ---------------------------------------------------------------------------------------


def check_room(memory: Memory, size: int, what: str) -> None:
    """Whether a lease of this many bytes may be made. CapacityError when it must not.

    What is leased but not yet backed by pages will be taken from the node later, so it counts now.
    """
    if memory.leased + size > memory.offered:
        raise CapacityError(
            f"{what} needs {format_size(size)}, but of the {format_size(memory.offered)} that are lent "
            f"{format_size(memory.leased)} are taken"
        )
    spare = memory.available - max(0, memory.leased - memory.populated)
    if spare - size < memory.headroom:
        raise CapacityError(
            f"{what} needs {format_size(size)}, but the node has {format_size(max(0, spare))} left, "
            f"of which {format_size(memory.headroom)} are its headroom"
        )
