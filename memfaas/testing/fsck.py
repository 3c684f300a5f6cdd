"""Is a shard whole, and does anybody hold anything in it? Asked of the C code's own structures."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from memfaas.testing.compiling import compile_with_core
from memfaas.testing.lease import Kind

_FIELDS = (
    "locks", "pins", "spans", "places", "broken", "shared", "leaked", "dangling", "limbo", "counted_wrong", "unproved",
)  # fmt: skip


class _Report(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in _FIELDS]


BUILT = "MEMFAAS_TEST_FSCK"
"""Environment variable that names what `build` made, for where compilers are slow."""


def build(path: Path) -> None:
    compile_with_core(Path(__file__).with_name("fsck.c"), path, ["-O1", "-shared", "-fPIC"], without=["shard.c"])


@functools.cache
def _library() -> ctypes.CDLL:
    if BUILT in os.environ:
        library = ctypes.CDLL(os.environ[BUILT])
    else:
        with tempfile.TemporaryDirectory(prefix="memfaas-fsck-") as folder:
            path = Path(folder, "fsck.so")
            build(path)
            library = ctypes.CDLL(str(path))
    library.fsck.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Report)]
    library.held.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(_Report)]
    library.block_size.argtypes = [ctypes.c_uint64]
    library.block_size.restype = ctypes.c_uint32
    return library


def report(data_fd: int, control_fd: int) -> Mapping[str, int]:
    """Counts, each by the comment in fsck.c. Nothing may run on the memory meanwhile."""
    found = _Report()
    error = _library().fsck(data_fd, control_fd, ctypes.byref(found))
    if error:
        raise OSError(error, os.strerror(error))
    return {name: getattr(found, name) for name in _FIELDS}


def faults(data_fd: int, control_fd: int) -> Mapping[str, int]:
    """Those counts that must be 0 when every operation has ended, and are not."""
    innocent = ("places", "limbo")
    return {name: n for name, n in report(data_fd, control_fd).items() if n and name not in innocent}


def held(control_fd: int, kind: Kind, size: int) -> Mapping[str, int]:
    """Locks, pins and spans that are held, also when the data is gone already."""
    found = _Report()
    error = _library().held(control_fd, {"shard": 1, "region": 2}[kind], size, ctypes.byref(found))
    if error:
        raise OSError(error, os.strerror(error))
    return {name: n for name in ("locks", "pins", "spans") if (n := getattr(found, name))}


def block_size(size: int) -> int:
    """Bytes of the heap that a block for so many bytes takes."""
    return int(_library().block_size(size))
