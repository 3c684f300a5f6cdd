"""What stands beside pyfuse3: that it fits libfuse, and that no error leaves a lock behind or ends the mount."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from memfaas.errors import LeaseLost
from memfaas.fs.locks import END, FLOCK, POSIX
from memfaas.fs.volume import Volume
from memfaas.fuse import _extra
from memfaas.fuse.extra import Extra

# --- libfuse ----------------------------------------------------------------------------------------------


def mount_fails(folder: Path, program: str, **environment: str) -> str:
    code = f"{program}\nfrom memfaas.cli import main\nmain(['mount', '--local', {str(folder)!r}, '--foreground'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert not os.path.ismount(folder)
    return done.stderr


def other_version() -> str:
    """The next one whose structures are others than those of the libfuse that this was built for."""
    minor = int(_extra.built_for().split(".")[1])
    return "3.16.2" if not 15 <= minor < 17 else "3.17.1"


def test_it_fits_the_libfuse_that_it_was_built_for() -> None:
    assert _extra.fits()
    assert _extra.here().startswith("3.")


def test_a_libfuse_with_other_structures_is_refused(fuse_device: None, tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text(f'const char *fuse_pkgversion(void) {{ return "{other_version()}"; }}\n')
    library = source.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    said = mount_fails(tmp_path, "", LD_PRELOAD=str(library))
    assert f"was built for libfuse {_extra.built_for()}, and here is {other_version()}" in said


@pytest.mark.slow
def test_a_pyfuse3_that_passes_us_by_is_refused(fuse_device: None, tmp_path: Path) -> None:
    said = mount_fails(tmp_path, "from memfaas.fuse import _extra\n_extra.used = lambda: False")
    assert "were built for different libfuses" in said


# --- errors -----------------------------------------------------------------------------------------------


@dataclass
class Request:
    """As the kernel makes them; see _extra.pyi."""

    ino: int
    owner: int
    type: int
    waits: bool = False
    interrupted: bool = False
    start: int = 0
    length: int = 0
    pid: int = 1
    replies: list[int] = field(default_factory=list)

    def reply(self, error: int) -> None:
        self.replies.append(error)


class Operations:
    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.outdated = False
        self.error: Exception | None = None

    def is_outdated(self, ino: int) -> bool:
        if self.error is not None and not self.outdated:
            raise self.error
        return self.outdated

    def forget_data(self, ino: int) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def operations(volume: Volume) -> Operations:
    return Operations(volume)


@pytest.fixture
def extra(operations: Operations) -> Extra:
    return Extra(operations)  # type: ignore[arg-type]


@pytest.fixture
def ino(volume: Volume) -> int:
    return volume.make(1, b"f", 0o100644, 0, 0)[0]


def is_locked(volume: Volume, ino: int, kind: int = POSIX) -> bool:
    return not volume.locks.take(ino, kind, 99, exclusive=True, start=0, end=END, pid=3)


def take(extra: Extra, kind: int, ino: int) -> Request:
    request: Any
    if kind == FLOCK:
        request = Request(ino, 7, fcntl.LOCK_EX)
        extra.set_flock(request)
    else:
        request = Request(ino, 7, fcntl.F_WRLCK)
        extra.set_lock(request)
    taken: Request = request
    return taken


def fails(*_: object) -> None:
    raise LeaseLost("its donor is gone")


@pytest.mark.parametrize("kind", [FLOCK, POSIX])
def test_a_lock_is_given_back_though_what_was_written_cannot_be(
    extra: Extra, volume: Volume, ino: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume.files, "flush_inode", fails)
    assert take(extra, kind, ino).replies == [0]
    request: Any = Request(ino, 7, fcntl.LOCK_UN if kind == FLOCK else fcntl.F_UNLCK)
    (extra.set_flock if kind == FLOCK else extra.set_lock)(request)
    assert request.replies == [errno.EIO]
    assert not is_locked(volume, ino, kind)


def test_what_could_not_be_stored_under_a_lock_is_not_stored_after_it(
    extra: Extra, volume: Volume, ino: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = volume.files.open(ino)
    assert take(extra, FLOCK, ino).replies == [0]
    volume.files.write(file, 0, b"under the lock")
    with monkeypatch.context() as patched:
        patched.setattr(volume.files, "flush_inode", fails)
        request: Any = Request(ino, 7, fcntl.LOCK_UN)
        extra.set_flock(request)
    assert request.replies == [errno.EIO]
    with pytest.raises(OSError, match="Input/output"):
        volume.files.flush(file)
    volume.tick()
    assert volume.inode(ino).size == 0


@pytest.mark.parametrize("kind", [FLOCK, POSIX])
def test_the_end_of_a_program_frees_its_locks_though_what_it_wrote_cannot_be_written(
    extra: Extra, volume: Volume, ino: int, kind: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(volume.files, "flush_inode", fails)
    assert take(extra, kind, ino).replies == [0]
    (extra.unlocked if kind == FLOCK else extra.closed)(ino, 7)
    assert not is_locked(volume, ino, kind)
    assert "its donor is gone" in caplog.text


@pytest.mark.parametrize("error", [LeaseLost("gone"), OSError(errno.EIO, "gone"), RuntimeError("a mistake")])
@pytest.mark.parametrize("outdated", [False, True])
async def test_who_cannot_see_what_was_written_under_a_lock_does_not_get_it(
    extra: Extra, operations: Operations, volume: Volume, ino: int, error: Exception, outdated: bool
) -> None:
    operations.outdated, operations.error = outdated, error
    async with trio.open_nursery() as nursery:
        extra.nursery = nursery
        request = take(extra, POSIX, ino)
    assert request.replies == [errno.EIO]
    assert not is_locked(volume, ino)


async def test_a_mistake_while_somebody_waits_is_an_answer(
    extra: Extra, volume: Volume, ino: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert volume.locks.take(ino, POSIX, 8, exclusive=True, start=0, end=END, pid=2)
    async with trio.open_nursery() as nursery:
        extra.nursery = nursery
        request: Any = Request(ino, 7, fcntl.F_WRLCK, waits=True)
        extra.set_lock(request)
        assert request.replies == []
        monkeypatch.setattr(volume.locks, "take", lambda *_, **__: 1 // 0)
    assert request.replies == [errno.EIO]
