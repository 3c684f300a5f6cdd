"""`memfaas mount` and `umount` as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfaas.cli.mount import from_fstab
from memfaas.client.local import LocalCluster
from tests.fuse.conftest import eventually

MEMFAAS = (sys.executable, "-m", "memfaas.cli")


@pytest.fixture
def folder(fuse_device: None, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    if os.path.ismount(folder):
        subprocess.run(["fusermount3", "-u", "-z", folder], check=True)


def run(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([*MEMFAAS, *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_mount_in_the_background_stays_until_it_is_unmounted(folder: Path, tmp_path: Path) -> None:
    run("mount", "--local", folder, "--size", "32MiB", "--log", tmp_path / "log")
    assert os.path.ismount(folder)
    (folder / "f").write_text("1")
    assert (folder / "f").read_text() == "1"
    pid = int(os.getxattr(folder, "memfaas.pid"))
    run("umount", folder)
    assert not os.path.ismount(folder)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.slow
def test_what_was_written_is_there_after_the_next_mount(folder: Path, cluster: LocalCluster) -> None:
    broker = ("--broker", cluster.address)
    try:
        run("mount", "lasting", folder, "--size", "32MiB", *broker)
        (folder / "f").write_text("1")
        run("umount", folder)
        run("mount", "lasting", folder, *broker)
        assert (folder / "f").read_text() == "1"
        run("umount", folder)
    finally:
        run("rm", "--store", "lasting", "--all", *broker)


def test_it_says_why_it_does_not_mount(folder: Path, tmp_path: Path, cluster: LocalCluster) -> None:
    broker = ("--broker", cluster.address)
    assert "no store 'none'; say with --size" in run("mount", "none", folder, *broker, status=5)
    assert "is no folder" in run("mount", "none", tmp_path / "none", *broker, status=2)
    assert "say which STORE" in run("mount", folder, status=2)
    assert "cannot unmount" in run("umount", folder, status=2)
    assert not os.path.ismount(folder)


def test_what_mount_8_says_is_understood() -> None:
    options = "rw,noatime,ro,size=1GiB,allow_other,broker=n1:7411,secret_file=/s,dev,suid"
    assert from_fstab(["s", "/mnt", "-o", options]) == [
        *("s", "/mnt", "--read-only", "--size", "1GiB", "--allow-other"),
        *("--broker", "n1:7411", "--secret-file", "/s"),
    ]


@pytest.mark.slow
def test_what_mount_8_calls_mounts_it(folder: Path, cluster: LocalCluster) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = f"size=32MiB,broker={cluster.address}"
    command = ["/sbin/mount.fuse3", "by-fstab", str(folder), "-t", "fuse.memfaas", "-o", options]
    try:
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
        (folder / "f").write_text("1")
        run("umount", folder)
    finally:
        run("rm", "--store", "by-fstab", "--all", "--broker", cluster.address)
