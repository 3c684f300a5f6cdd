"""`memfaas bench fs`: a mount beside tmpfs, which is the limit, and beside others through FUSE: a bare file system by
pyfuse3, which is the floor, and one file of NBD (nbdkit's memory, shown by nbdfuse), which is C.

Data is read and written by fio, one request at a time, past the kernel's cache where it says *direct*. Names are made,
found, listed and taken away by a program of this module.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from memfaas.bench.fs.bars import FLOOR, IN_ORDER, LISTED, RANDOM, SHM, TCP, FsResult, System, judge
from memfaas.bench.result import this_machine
from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.errors import UsageError
from memfaas.fs.records import ROOT
from memfaas.fs.volume import Volume
from memfaas.units import MIB

ROUNDS = 3
MANY = 100_000
_FILE = 128 * MIB
_STORE = 704 * MIB
_NAMES = 3000
_KERNEL_FORGETS_S = 1.1
_START_S = 30.0
JOBS: dict[str, tuple[str, str, bool]] = dict(
    zip(
        (*RANDOM, *IN_ORDER),
        (
            ("randread", "4k", True),
            ("randwrite", "4k", True),
            ("read", "1m", True),
            ("read", "1m", False),
            ("write", "1m", False),
        ),
        strict=True,
    )
)
NAMES = ("creates", "stats", "names listed", "opens", "unlinks")


class SkippedError(Exception):
    """A system cannot take part here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a system shows its files."""

    file: Path
    """For data; its folder is for names."""
    has_names: bool = True
    many: Path | None = None
    """A folder with many names."""


@contextmanager
def _tmpfs(folder: Path, many: int) -> Iterator[Place]:
    place = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield Place(place / "data")
    finally:
        shutil.rmtree(place)


@contextmanager
def _bare(folder: Path, many: int) -> Iterator[Place]:
    command = [sys.executable, "-m", "memfaas.bench.fs.bare", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise UsageError(f"the bare file system cannot be mounted on {folder}")
        try:
            yield Place(folder / "data")
        finally:
            process.terminate()


@contextmanager
def _nbd(folder: Path, many: int) -> Iterator[Place]:
    for program, package in (("nbdkit", "nbdkit"), ("nbdfuse", "libnbd-bin")):
        if shutil.which(program) is None:
            raise SkippedError(f"{program} is missing: install {package}")
    file = folder / "data"
    server = ["nbdkit", "--exit-with-parent", "memory", str(_FILE)]
    with subprocess.Popen(["nbdfuse", str(file), "[", *server, "]"]) as process:
        deadline = time.monotonic() + _START_S
        while not os.path.ismount(folder):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise UsageError(f"nbdfuse cannot be mounted on {folder}")
            time.sleep(0.01)
        try:
            yield Place(file, has_names=False)
        finally:
            subprocess.run(["fusermount3", "-u", str(folder)], check=True)


def _memfaas(fabric: str) -> Callable[[Path, int], AbstractContextManager[Place]]:
    @contextmanager
    def mount(folder: Path, many: int) -> Iterator[Place]:
        command = [sys.executable, "-m", "memfaas.cli"]
        with LocalCluster(memory=int(1.1 * _STORE) + 64 * MIB) as cluster:
            with connect(cluster.address) as session:
                volume = Volume(session.store("bench", size=_STORE, persistent=True))
                above, _ = volume.make(ROOT, b"many", stat.S_IFDIR | 0o755, os.getuid(), os.getgid())
                for number in range(many):
                    volume.make(above, b"name%d" % number, stat.S_IFREG | 0o644, os.getuid(), os.getgid())
                volume.close()
            log = folder.with_suffix(".log")
            options = ["--broker", cluster.address, "--fabric", fabric, "--log", str(log)]
            subprocess.run([*command, "mount", "bench", str(folder), *options], check=True)
            try:
                yield Place(folder / "data", many=folder / "many")
            finally:
                subprocess.run([*command, "umount", str(folder)], check=True)
                log.unlink()

    return mount


SYSTEMS: dict[str, Callable[[Path, int], AbstractContextManager[Place]]] = {
    "tmpfs": _tmpfs,
    FLOOR: _bare,
    "nbdkit, nbdfuse": _nbd,
    SHM: _memfaas("shm"),
    TCP: _memfaas("tcp"),
}


def measure_fs(seconds: float, rounds: int, many: int, progress: Callable[[float, str], None]) -> FsResult:
    """seconds: of each measurement of reads and writes. many: how many names a folder has that is listed.

    Raises UsageError when fio is missing, or a system cannot be mounted.
    """
    machine = this_machine()
    started, clock = datetime.now().isoformat(timespec="seconds"), time.monotonic()
    systems = [System(name=name) for name in SYSTEMS]
    for turn in range(rounds):
        for number, system in enumerate(systems):
            progress((turn + number / len(systems)) / rounds, system.name)
            if system.skipped is None:
                try:
                    for operation, rate in measure(system.name, seconds, many).items():
                        system.per_s.setdefault(operation, []).append(rate)
                except SkippedError as error:
                    system.skipped = str(error)
    machine.load_after = os.getloadavg()[0]
    result = FsResult(started=started, seconds=time.monotonic() - clock, listed=many, machine=machine, systems=systems)
    result.verdicts = judge(result)
    return result


def measure(system: str, seconds: float, many: int) -> dict[str, float]:
    """Operations in a second, by what was done. Raises SkippedError, and UsageError as `measure_fs`."""
    if shutil.which("fio") is None:
        raise UsageError("this needs fio: install it")
    per_s: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="memfaas-bench-"))
        stack.callback(folder.rmdir)
        place = stack.enter_context(SYSTEMS[system](folder, many))
        with place.file.open("r+b" if place.file.exists() else "wb") as file:
            file.write(os.urandom(_FILE))
        for name, (kind, size, direct) in JOBS.items():
            per_s[name] = _fio(place.file, kind, size, direct, seconds)
        if place.has_names:
            place.file.unlink()
            per_s.update(_names(place.file.parent))
        if place.many is not None:
            began = time.perf_counter()
            per_s[LISTED] = len(os.listdir(place.many)) / (time.perf_counter() - began)
    return per_s


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
