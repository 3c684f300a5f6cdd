"""Locks within a mount and between mounts; fallocate."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfaas.client.store import Store
from memfaas.fs import members
from memfaas.fs.locks import FLOCK, POSIX
from memfaas.fs.volume import Volume
from tests.fuse.conftest import Mount, Mounter

_HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
how, kind = sys.argv[2], fcntl.LOCK_EX if sys.argv[3] == "exclusive" else fcntl.LOCK_SH
(fcntl.flock if how == "flock" else fcntl.lockf)(descriptor, kind)
print("locked", flush=True)
sys.stdin.readline()
os.pwrite(descriptor, b"by the holder", 0)
(fcntl.flock if how == "flock" else fcntl.lockf)(descriptor, fcntl.LOCK_UN)
print("unlocked", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(path: Path, how: str, kind: str = "exclusive") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    command = [sys.executable, "-c", _HOLDER, str(path), how, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def step(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


LOCKS = {"flock": fcntl.flock, "posix": fcntl.lockf}


@pytest.fixture(params=["one mount", "two mounts"])
def paths(mount: Mounter, store: Store, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Of one file. Its mounts' kernels keep its times for long."""
    mounts = [mount(store.name, "--cache", "1h") for _ in range(1 if request.param == "one mount" else 2)]
    (mounts[0] / "f").write_bytes(bytes(100))
    return mounts[0] / "f", mounts[-1] / "f"


@pytest.mark.parametrize("how", LOCKS)
def test_a_lock_keeps_others_out_until_it_is_given_up(paths: tuple[Path, Path], how: str) -> None:
    lock = LOCKS[how]
    with holder(paths[0], how) as process, paths[1].open("r+b") as file:
        with pytest.raises(BlockingIOError):
            lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            lock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert os.pread(file.fileno(), 13, 0) == bytes(13)
        step(process)
        lock(file.fileno(), fcntl.LOCK_EX)  # waits
        assert os.pread(file.fileno(), 13, 0) == b"by the holder", "what was written under the lock is seen"


@pytest.mark.parametrize("how", LOCKS)
def test_who_only_reads_may_do_so_together(paths: tuple[Path, Path], how: str) -> None:
    lock = LOCKS[how]
    with holder(paths[0], how, "shared"), paths[1].open("r+b") as file:
        lock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("how", LOCKS)
def test_a_process_that_ends_holds_nothing(paths: tuple[Path, Path], how: str) -> None:
    with paths[1].open("r+b") as file:
        with holder(paths[0], how):
            pass
        LOCKS[how](file.fileno(), fcntl.LOCK_EX)


def test_closing_any_descriptor_gives_up_the_posix_locks_of_the_process(paths: tuple[Path, Path]) -> None:
    one, two = os.open(paths[0], os.O_RDWR), os.open(paths[0], os.O_RDWR)
    fcntl.lockf(one, fcntl.LOCK_EX)
    os.close(two)
    with holder(paths[1], "posix"):
        os.close(one)


def test_ranges_are_locked_apart(paths: tuple[Path, Path]) -> None:
    script = (
        "import fcntl,sys;f=open(sys.argv[1],'r+b');fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,*map(int,sys.argv[2:]))"
    )

    def locks(length: int, start: int) -> bool:
        command = [sys.executable, "-c", script, str(paths[1]), str(length), str(start)]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    with paths[0].open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 30, 10)
        assert locks(10, 0)
        assert not locks(11, 0)
        assert not locks(0, 39)
        assert locks(0, 40)
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 20)  # out of the middle
        assert locks(10, 20)
        assert not locks(1, 19)
        assert not locks(1, 30)


def test_who_waits_can_be_interrupted(paths: tuple[Path, Path]) -> None:
    class Alarm(Exception):
        pass

    def on_alarm(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with holder(paths[0], "posix"), paths[1].open("r+b") as file:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Alarm):
                fcntl.lockf(file.fileno(), fcntl.LOCK_EX)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_locks_of_a_dead_mount_hold_nobody_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = Volume(store), Volume(store)
    for kind in (POSIX, FLOCK):
        assert dead.locks.take(7, kind, 1, exclusive=True)
        assert not alive.locks.take(7, kind, 1, exclusive=True)
    monkeypatch.setattr(members, "DEAD_S", 0.0)
    alive.tick()
    alive.tick()
    for kind in (POSIX, FLOCK):
        assert alive.locks.take(7, kind, 1, exclusive=True)


# --- fallocate ------------------------------------------------------------------------------------------------

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate64(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def test_room_is_asked_for_in_advance(mounted: Mount) -> None:
    with (mounted / "f").open("w+b", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 10 << 20)
        assert os.fstat(file.fileno()).st_size == 10 << 20
        assert os.fstat(file.fileno()).st_blocks == 0, "it is not kept free"
        fallocate(file.fileno(), KEEP_SIZE, 10 << 20, 1 << 20)
        assert os.fstat(file.fileno()).st_size == 10 << 20
        assert file.read() == bytes(10 << 20)
        for mode, length in itertools.product((0, KEEP_SIZE), (1 << 30, 1 << 60)):
            with pytest.raises(OSError, match="fallocate") as caught:
                fallocate(file.fileno(), mode, 0, length)
            assert caught.value.errno == errno.ENOSPC
        assert os.fstat(file.fileno()).st_size == 10 << 20


def test_holes_can_be_punched(mounted: Mount, store: Store) -> None:
    with (mounted / "f").open("w+b", buffering=0) as file:
        file.write(b"x" * (4 << 20))
        os.fsync(file.fileno())
        used = store.info().used
        fallocate(file.fileno(), PUNCH_HOLE | KEEP_SIZE, 100_000, 3 << 20)
        assert os.fstat(file.fileno()).st_blocks * 512 < (4 << 20) - (3 << 20) + 3 * 65536
        assert os.pread(file.fileno(), 4 << 20, 0) == b"x" * 100_000 + bytes(3 << 20) + b"x" * ((1 << 20) - 100_000)
        deadline = time.monotonic() + 10
        while store.info().used > used - (2 << 20):
            assert time.monotonic() < deadline
        fallocate(file.fileno(), ZERO_RANGE, (4 << 20) - 10, 20)
        assert os.pread(file.fileno(), 100, (4 << 20) - 11) == b"x" + bytes(20)
        with pytest.raises(OSError, match="fallocate") as caught:
            fallocate(file.fileno(), COLLAPSE, 0, 65536)
        assert caught.value.errno == errno.EOPNOTSUPP
