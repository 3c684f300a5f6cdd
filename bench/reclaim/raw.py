"""Memory as the kernel's calls give it: of pages of one kind, populated, and aligned so that they can be large."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from memfaas.bench.reclaim.pages import Pages
from memfaas.units import MIB, format_size

_HUGE = 2 * MIB
_MAP_FIXED = 0x10
_PROT_NONE = 0
_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class WrongPagesError(Exception):
    """The kernel gave pages of another kind than was asked for; the message says what it gave."""


class Raw:
    """`size` bytes, mapped here. Shared memory is a memfd, as that of a lease is; the other is this process's own."""

    def __init__(self, size: int, pages: Pages, *, shared: bool) -> None:
        self.size = size
        self._pages = pages
        self._descriptor = os.memfd_create("memfaas-bench", os.MFD_CLOEXEC) if shared else -1
        self._room = 0
        try:
            if shared:
                os.ftruncate(self._descriptor, size)
            self._room = _mmap(0, size + _HUGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            start = -(-self._room // _HUGE) * _HUGE
            self._start = _mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, kind | _MAP_FIXED, self._descriptor)
            self._advise(mmap.MADV_HUGEPAGE if pages == "2 MiB" else mmap.MADV_NOHUGEPAGE)
        except BaseException:
            self.close()
            raise

    def populate(self) -> None:
        """Backs all of it by pages now. Raises WrongPagesError, MemoryError."""
        self._advise(_MADV_POPULATE_WRITE)
        huge = _in_huge_pages(self._start)
        if huge < 0.95 * self.size if self._pages == "2 MiB" else huge > 0:
            raise WrongPagesError(f"the kernel gave {format_size(huge)} of {format_size(self.size)} in pages of 2 MiB")

    @property
    def view(self) -> memoryview:
        return memoryview((ctypes.c_char * self.size).from_address(self._start)).cast("B")

    def backed(self) -> int:
        """Bytes of shared memory that the kernel has in pages."""
        return os.fstat(self._descriptor).st_blocks * 512

    def punch(self) -> None:
        """Frees the pages of shared memory; the memory stays."""
        kind = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        _check(_libc.fallocate(self._descriptor, kind, 0, self.size), "fallocate")

    def truncate(self) -> None:
        """Frees shared memory, for good."""
        os.ftruncate(self._descriptor, 0)

    def unmap(self) -> None:
        """Frees memory of our own."""
        _check(_libc.munmap(self._start, self.size), "munmap")

    def close(self) -> None:
        """Lets go of all of it. Views of it must not be used any more."""
        if self._room:
            _libc.munmap(self._room, self.size + _HUGE)
            self._room = 0
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _advise(self, advice: int) -> None:
        _check(_libc.madvise(self._start, self.size, advice), "madvise")


def _mmap(start: int, size: int, protection: int, kind: int, descriptor: int) -> int:
    found: int | None = _libc.mmap(start or None, size, protection, kind, descriptor, 0)
    if found is None or found == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"mmap: {os.strerror(error)}")
    return found


def _check(status: int, call: str) -> None:
    if status:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")


def _in_huge_pages(start: int) -> int:
    """Bytes of the mapping that begins there which are mapped by pages of 2 MiB."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            here = int(words[0].partition("-")[0], 16) == start
        elif here and words[0] in ("AnonHugePages:", "ShmemPmdMapped:"):
            found += int(words[1]) * 1024
    return found
