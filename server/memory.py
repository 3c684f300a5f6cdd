"""The memory of leases.

A lease's memory is two memfds. They are sealed so that nobody to whom they are passed can change
their size, except that their owner can cut the data off: that frees it at once, for everybody.

On a spill donor the data is a file without a name, in a folder of local scratch. All its blocks are
allocated when it is made: a disk that is full refuses a lease, and never kills who writes to one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from memfaas import _native, node
from memfaas.errors import CapacityError, UsageError
from memfaas.messages import Kind, Memory
from memfaas.units import MIB, format_size

_HUGE_PAGE = 2 * MIB

logger = logging.getLogger(__name__)


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
    """Whether leases can lie in this folder. UsageError when they cannot, or must not."""
    descriptor = _unnamed(folder)
    try:
        kind = node.file_system_of(descriptor)
    finally:
        os.close(descriptor)
    if kind in node.MEMORY_FILE_SYSTEMS:
        raise UsageError(f"{folder} is on {kind}, which is memory itself; give a folder on a local disk")
    if kind in node.NETWORK_FILE_SYSTEMS:
        raise UsageError(f"{folder} is on {kind}, over the network; give a folder on a local disk")


def populated(data: int) -> int:
    """Bytes of a lease's memory that are backed by pages, or by blocks of the disk."""
    return os.fstat(data).st_blocks * 512


@dataclass(frozen=True)
class Cut:
    """Memory of a lease that was cut off."""

    before: _native.State
    """Of the memory, "revoked" also when there was none."""
    size: int
    """Bytes of data that are gone."""
    index: _native.Memory | None
    """What is left, if it was to be kept, for `cut_off_index`."""


def cut_off(data: int, control: int, *, keep_index: bool) -> Cut:
    """Revokes memory, so that every operation on it ends, and then frees the data; of a shard all but its index,
    if that is kept. Blocks while the kernel frees the pages."""
    before: _native.State = "revoked"
    index = None
    left, size = 0, os.fstat(data).st_size
    try:
        mapped = _native.Memory(data, control)
    except (OSError, ValueError) as error:  # it was never formatted, or was cut off before
        logger.debug("a lease was cut off without a notice: %s", error)
    else:
        before = mapped.revoke()
        if keep_index:
            index, left = mapped, _end_of_index(mapped)
        else:
            mapped.close()
    os.ftruncate(data, left)
    return Cut(before, size - left, index)


def _end_of_index(shard: _native.Memory) -> int:
    """Behind it there is nothing but values, and no half of a 2 MiB page, which the kernel would have to split."""
    return -(-(shard.data_bytes - shard.size) // _HUGE_PAGE) * _HUGE_PAGE


def cut_off_index(index: _native.Memory, data: int, control: int) -> int:
    """Frees the rest, too; returns how many keys it had. Blocks."""
    try:
        return index.stats()["keys"]
    except OSError:  # it is gone already
        return 0
    finally:
        index.close()
        os.ftruncate(data, 0)


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
