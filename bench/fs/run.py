"""`memfaas bench fs`: a mount beside tmpfs, which is the limit, and a bare file system by pyfuse3, which is the floor.

Data is read and written by fio, one request at a time, past the kernel's cache where it says *direct*. Names are made,
found, listed and taken away by a program of this module.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from memfaas.client.local import LocalCluster
from memfaas.errors import UsageError
from memfaas.units import MIB

_FILE = 128 * MIB
_STORE = 640 * MIB
_NAMES = 3000
_KERNEL_FORGETS_S = 1.1
JOBS: dict[str, tuple[str, str, bool]] = {
    "random reads, 4 KiB, direct": ("randread", "4k", True),
    "random writes, 4 KiB, direct": ("randwrite", "4k", True),
    "reads in order, 1 MiB, direct": ("read", "1m", True),
    "reads in order, 1 MiB": ("read", "1m", False),
    "writes in order, 1 MiB": ("write", "1m", False),
}


@dataclass
class Measured:
    system: str
    per_s: dict[str, float] = field(default_factory=dict)
    """Operations in a second, by what was done."""


@contextmanager
def _tmpfs(folder: Path) -> Iterator[Path]:
    yield Path(tempfile.mkdtemp(dir="/dev/shm"))


@contextmanager
def _bare(folder: Path) -> Iterator[Path]:
    command = [sys.executable, "-m", "memfaas.bench.fs.bare", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise UsageError(f"the bare file system cannot be mounted on {folder}")
        try:
            yield folder
        finally:
            process.terminate()


def _memfaas(fabric: str) -> Callable[[Path], object]:
    @contextmanager
    def mount(folder: Path) -> Iterator[Path]:
        command = [sys.executable, "-m", "memfaas.cli"]
        with LocalCluster(memory=int(1.1 * _STORE) + 64 * MIB) as cluster:
            options = ["--broker", cluster.address, "--fabric", fabric, "--size", str(_STORE)]
            subprocess.run([*command, "mount", "bench", str(folder), *options], check=True)
            try:
                yield folder
            finally:
                subprocess.run([*command, "umount", str(folder)], check=True)

    return mount


SYSTEMS: dict[str, Callable[[Path], object]] = {
    "tmpfs": _tmpfs,
    "bare pyfuse3": _bare,
    "memfaas, shm": _memfaas("shm"),
    "memfaas, tcp": _memfaas("tcp"),
}


def measure(system: str, seconds: float) -> Measured:
    """Raises UsageError when fio is missing, or the system cannot be mounted."""
    if shutil.which("fio") is None:
        raise UsageError("this needs fio: install it")
    measured = Measured(system)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="memfaas-bench-"))
        stack.callback(shutil.rmtree, folder)
        mounted: Path = stack.enter_context(SYSTEMS[system](folder))  # type: ignore[arg-type]
        if system == "tmpfs":
            stack.callback(shutil.rmtree, mounted)
        path = mounted / "fio"
        path.write_bytes(os.urandom(_FILE))
        for name, (kind, size, direct) in JOBS.items():
            measured.per_s[name] = _fio(path, kind, size, direct, seconds)
        path.unlink()
        measured.per_s.update(_names(mounted))
    return measured


def _fio(path: Path, kind: str, size: str, direct: bool, seconds: float) -> float:
    done = subprocess.run(
        [
            *("fio", "--name=x", f"--filename={path}", f"--size={_FILE}", f"--rw={kind}", f"--bs={size}"),
            *(f"--direct={int(direct)}", "--time_based", f"--runtime={seconds}", "--output-format=json"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    job = json.loads(done.stdout)["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def _names(folder: Path) -> dict[str, float]:
    paths = [str(folder / f"f{number}") for number in range(_NAMES)]
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[str], object]) -> None:
        started = time.perf_counter()
        for path in paths:
            work(path)
        found[name] = _NAMES / (time.perf_counter() - started)

    timed("creates", lambda path: _open_and_close(path, os.O_CREAT | os.O_WRONLY))
    time.sleep(_KERNEL_FORGETS_S)
    timed("stats", os.stat)
    time.sleep(_KERNEL_FORGETS_S)
    started = time.perf_counter()
    found["names listed"] = len(os.listdir(folder)) / (time.perf_counter() - started)
    timed("opens", lambda path: _open_and_close(path, os.O_RDONLY))
    timed("unlinks", lambda path: Path(path).unlink())
    return found


def _open_and_close(path: str, flags: int) -> None:
    os.close(os.open(path, flags))
