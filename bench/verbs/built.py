"""The C side of the benchmark: what is built of it, and how it is called."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from array import array
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

from memfaas.bench.verbs.bars import Op, SkippedError

BUILT = "MEMFAAS_BENCH_VERBS"
"""Environment variable that names the folder in which `build` has been, for where compilers are slow."""
BARE_LIBRARY = "bare.so"
NULL_LIBRARY = "null.so"
"""bare.c too, but with a libibverbs.so.1 that has no device."""
_LINKED = {
    BARE_LIBRARY: ["bare.c", "-libverbs"],
    NULL_LIBRARY: ["bare.c", "null.c", "-Wl,-soname,libibverbs.so.1", "-Wl,-Bsymbolic"],
}
_CODES: dict[Op, int] = {"read": 0, "write": 1, "exchange": 2}


def built(library: str, stack: ExitStack) -> Path:
    """The library, which is compiled first unless it has been. Raises SkippedError."""
    if BUILT in os.environ:
        return Path(os.environ[BUILT], library)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memfaas-bench-")))
    _compile(library, folder)
    return folder / library


def build(folder: Path) -> None:
    """Compiles both libraries into the folder. Raises SkippedError."""
    for library in _LINKED:
        _compile(library, folder)


def _compile(library: str, folder: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        raise SkippedError("no gcc: sudo apt-get install gcc libibverbs-dev")
    with as_file(files("memfaas.bench.verbs")) as sources:
        parts = [str(sources / part) if part.endswith(".c") else part for part in _LINKED[library]]
        command = [gcc, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(folder / library), *parts]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise SkippedError(f"gcc can't build {library} ({last}): sudo apt-get install libibverbs-dev")


class Bare:
    """Two ends of one connection of the device NAME:PORT:GID, used by C alone. Raises OSError."""

    def __init__(self, library: Path, device: str, size: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.bare_open.restype = ctypes.c_void_p
        name, port, gid = device.split(":")
        error = ctypes.c_int()
        handle = self._library.bare_open(name.encode(), int(port), int(gid), ctypes.c_size_t(size), ctypes.byref(error))
        if not handle:
            raise OSError(error.value, os.strerror(error.value))
        self._handle = ctypes.c_void_p(handle)

    def run(self, op: Op, size: int, count: int) -> float:
        """Microseconds of one, at the median."""
        times = array("q", bytes(8 * count))
        where = ctypes.c_void_p(times.buffer_info()[0])
        if error := self._library.bare_run(self._handle, _CODES[op], ctypes.c_size_t(size), count, where):
            raise OSError(error, os.strerror(error))
        return median(times) / 1e3

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.bare_close(self._handle)
