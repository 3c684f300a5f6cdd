"""Disks of which tests decide how full they are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system on a disk of so many bytes, mounted on a folder."""
    image = folder.with_name(f"{folder.name}.image")
    with image.open("wb") as file:
        file.truncate(size)
    try:
        _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
        _run("mount", "-o", "loop", str(image), str(folder))
        try:
            yield
        finally:
            _run("umount", "--lazy", str(folder))
    finally:
        image.unlink()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk needs root, and a loop device: {done.stderr.strip()}")


def free(folder: Path) -> int:
    """Bytes."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


@contextmanager
def filled_but_for(folder: Path, left: int) -> Iterator[None]:
    """The rest of the disk is somebody else's meanwhile."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        while (room := free(folder)) > left:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, min(room - left, 64 << 20))
            except OSError:  # the file system needs some for itself
                break
    try:
        yield
    finally:
        ballast.unlink()
