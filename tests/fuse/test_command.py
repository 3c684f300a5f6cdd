"""`memfaas mount` and `umount` as programs, and what mount(8) calls."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from memfaas import mounts
from memfaas.cli import fstab, main
from memfaas.cli import mount as command
from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.errors import UsageError
from tests.fuse.conftest import Mounter, eventually

MEMFAAS = (sys.executable, "-m", "memfaas.cli")


@pytest.fixture
def folder(fuse_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    while os.path.ismount(folder) or mounts.is_mounted(folder):
        subprocess.run(["fusermount3", "-u", "-z", folder], check=True)


def run(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([*MEMFAAS, *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr


@contextmanager
def temporary_store(cluster: LocalCluster, name: str) -> Iterator[tuple[str, str]]:
    """The option that says where."""
    try:
        yield "--broker", cluster.address
    finally:
        with connect(cluster.address) as session:
            session.delete_store(name)


def pid_at(folder: Path) -> int:
    pid = mounts.pid_of(folder)
    assert pid is not None
    return pid


@pytest.mark.slow
def test_a_mount_in_the_background_stays_until_it_is_unmounted(folder: Path, tmp_path: Path) -> None:
    run("mount", "--local", folder, "--size", "32MiB", "--log", tmp_path / "log")
    assert os.path.ismount(folder)
    (folder / "f").write_text("1")
    assert (folder / "f").read_text() == "1"
    pid = pid_at(folder)
    run("umount", folder)
    assert not os.path.ismount(folder)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.slow
def test_a_mount_in_the_background_keeps_nothing_of_where_it_was_started(folder: Path, cluster: LocalCluster) -> None:
    with temporary_store(cluster, "alone") as broker:
        run("mount", "alone", folder, "--size", "32MiB", *broker)
        process = Path(f"/proc/{pid_at(folder)}")
        log = folder.parent / "state" / "memfaas" / f"mount-{str(folder)[1:].replace('/', '-')}.log"
        assert [os.readlink(process / "fd" / str(number)) for number in range(3)] == ["/dev/null", str(log), str(log)]
        assert os.readlink(process / "cwd") == "/"
        assert os.getsid(int(process.name)) == int(process.name)
        run("umount", folder)


@pytest.mark.slow
def test_what_a_mount_in_the_background_says_is_in_its_log(folder: Path, cluster: LocalCluster) -> None:
    with temporary_store(cluster, "talks") as broker:
        assert "mounted 'talks'" in run("-v", "mount", "talks", folder, "--size", "32MiB", *broker)
        pid = pid_at(folder)
        os.kill(pid, signal.SIGTERM)
        assert eventually(lambda: not Path(f"/proc/{pid}").exists())
        (log,) = (folder.parent / "state" / "memfaas").iterdir()
        assert not os.path.ismount(folder)
        assert f"unmounting {folder}" in log.read_text()


@pytest.mark.slow
def test_what_was_written_is_there_after_the_next_mount(folder: Path, cluster: LocalCluster) -> None:
    with temporary_store(cluster, "lasting") as broker:
        run("mount", "lasting", folder, "--size", "32MiB", *broker)
        (folder / "f").write_text("1")
        run("umount", folder)
        run("mount", "lasting", folder, *broker)
        assert (folder / "f").read_text() == "1"
        run("umount", folder)


def test_it_says_why_it_does_not_mount(folder: Path, tmp_path: Path, cluster: LocalCluster) -> None:
    broker = ("--broker", cluster.address)
    assert "no store 'none'; say with --size" in run("mount", "none", folder, *broker, status=5)
    assert "is no folder" in run("mount", "none", tmp_path / "none", *broker, status=2)
    assert "say which STORE" in run("mount", folder, status=2)
    assert "unknown flag 'sloppy'" in run("mount", "none", folder, "-o", "noexec,sloppy", status=2)
    assert "No such file" in run("mount", "none", folder, *broker, "--log", tmp_path / "none" / "log", status=1)
    assert not os.path.ismount(folder)


@pytest.mark.slow
def test_a_mount_that_does_not_answer_is_none(folder: Path) -> None:
    """What it is mounted for has to find files, not only a mount point."""
    code = (
        "import memfaas.fs.volume as v, memfaas.cli\n"
        "def fails(*_): raise OSError(5, 'Input/output error')\n"
        "v.Volume.inode = fails\n"
        f"memfaas.cli.main(['mount', '--local', {str(folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "Input/output error" in done.stderr) == (1, True)
    assert not os.path.ismount(folder)


def test_what_is_no_mount_of_ours_is_not_unmounted(folder: Path) -> None:
    assert "is no mount of memfaas" in run("umount", folder, status=2)
    assert "is no mount of memfaas" in run("umount", "/proc", status=2)
    assert os.path.ismount("/proc")


@pytest.mark.slow
def test_a_mount_that_is_busy_is_not_unmounted(mount: Mounter, cluster: LocalCluster) -> None:
    with temporary_store(cluster, "busy"):
        mounted = mount("busy", "--size", "32MiB")
        with (mounted / "f").open("w") as file:
            assert "busy" in run("umount", mounted.folder, status=2)
            file.write("1")
        assert (mounted / "f").read_text() == "1"
        assert "is a mount of memfaas already" in run("mount", "--local", mounted.folder, status=2)
        with (mounted / "f").open() as file:
            run("umount", "--lazy", mounted.folder)
            assert not mounts.is_mounted(mounted.folder)
            assert file.read() == "1"
        assert mounted.process.wait(60) == 0


@pytest.mark.slow
def test_unmounting_says_when_the_process_does_not_end(
    mount: Mounter, cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with temporary_store(cluster, "stopped"):
        mounted = mount("stopped", "--size", "32MiB")
        pid = mounted.process.pid
        stops = tmp_path / "bin" / "fusermount3"
        stops.parent.mkdir()
        stops.write_text(f'#!/bin/sh\nkill -STOP {pid}\nexec {shutil.which("fusermount3")} "$@"\n')
        stops.chmod(0o755)
        monkeypatch.setenv("PATH", f"{stops.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(command, "_END_S", 0.2)
        try:
            result = CliRunner().invoke(main, ["umount", str(mounted.folder)])
        finally:
            os.kill(pid, signal.SIGCONT)
        assert result.exit_code == 33
        assert f"process {pid} has not ended" in result.output
        assert mounted.process.wait(60) == 0


@pytest.mark.slow
def test_a_mount_that_hangs_is_unmounted_lazily(mount: Mounter, cluster: LocalCluster, tmp_path: Path) -> None:
    with temporary_store(cluster, "hangs"):
        mounted = mount("hangs", "--size", "32MiB", "--cache", "0s")
        mounted.process.send_signal(signal.SIGSTOP)
        try:
            subprocess.run([*MEMFAAS, "umount", "--lazy", mounted.folder], check=True, timeout=30)
            assert os.listdir(mounted.folder) == []
        finally:
            mounted.process.send_signal(signal.SIGCONT)
        assert mounted.process.wait(60) == 0


def test_ctrl_c_ends_a_mount_that_is_not_ready(folder: Path, cluster: LocalCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"memfaas://127.0.0.1:{silent.getsockname()[1]}?{cluster.address.partition('?')[2]}"
        command = [*MEMFAAS, "mount", "none", str(folder), "--broker", address, "--timeout", "60s"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            link, _ = silent.accept()  # and says nothing
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b""  # which the other process would keep open
            link.close()


@pytest.mark.slow
def test_a_mount_whose_process_was_killed_is_unmounted_and_mounted_again(folder: Path, cluster: LocalCluster) -> None:
    with temporary_store(cluster, "again") as broker:
        run("mount", "again", folder, "--size", "32MiB", *broker)
        (folder / "f").write_text("1")

        def kill() -> None:
            os.kill(pid_at(folder), signal.SIGKILL)
            assert eventually(lambda: mounts.is_dead(folder))

        kill()
        run("umount", folder)
        assert not mounts.is_mounted(folder)
        run("mount", "again", folder, *broker)
        kill()
        assert "has no process any more" in run("mount", "again", folder, *broker)
        assert (folder / "f").read_text() == "1"
        run("umount", folder)
        assert os.listdir(folder) == []


# --- mount(8) ----------------------------------------------------------------------------------------------


def test_what_fstab_says_is_understood() -> None:
    options = (
        "rw,noatime,ro,size=1GiB,allow_other,broker=n1:7411,secret_file=/s,dev,nofail,x-systemd.requires=n,_netdev"
    )
    assert fstab.arguments_of(f"{options},config=/c") == (
        ["--config", "/c"],
        [
            *("--read-only", "--size", "1GiB", "--allow-other", "--broker", "n1:7411", "--secret-file", "/s"),
            *("-o", "noatime,dev"),
        ],
    )


@pytest.mark.parametrize("option", ["szie=1GiB", "size", "ro=1", "remount", "foreground"])
def test_an_option_of_fstab_that_is_unknown_is_refused_by_name(option: str) -> None:
    with pytest.raises(UsageError, match=f"unknown mount option '{option}'"):
        fstab.arguments_of(f"rw,{option}")
    assert fstab.arguments_of(f"rw,{option}", sloppy=True) == ([], [])


@pytest.fixture
def helper() -> Iterator[None]:
    """In /sbin, as the manual says."""
    if os.geteuid():
        pytest.skip("it takes root to install the helper of mount(8)")
    place = Path("/sbin/mount.fuse.memfaas")
    before = os.readlink(place) if place.is_symlink() else None
    if before is not None:
        place.unlink()
    place.symlink_to(Path(sys.executable).with_name("mount.fuse.memfaas"))
    yield
    place.unlink()
    if before is not None:
        place.symlink_to(before)


@pytest.mark.slow
def test_mount_8_mounts_and_unmounts_it(folder: Path, cluster: LocalCluster, helper: None, tmp_path: Path) -> None:
    def mount8(options: str, status: int = 0) -> str:
        # A store may have the name of a command.
        done = subprocess.run(
            ["mount", "-t", "fuse.memfaas", "status", folder, "-o", options], capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return done.stderr

    with temporary_store(cluster, "status"):
        assert "no store 'status'" in mount8(f"broker={cluster.address}", status=32)
        mount8(f"size=32MiB,broker={cluster.address},noexec,nofail")
        (folder / "f").write_text("1")
        shown = subprocess.run(["findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", folder], capture_output=True, text=True)
        source, kind, options = shown.stdout.split()
        assert (source, kind) == ("status", "fuse.memfaas")
        assert {"rw", "noexec"} <= set(options.split(","))
        subprocess.run(["umount", folder], check=True)
        assert "unknown mount option 'szie=1'" in mount8(f"szie=1,broker={cluster.address}", status=1)
        table = tmp_path / "fstab"
        table.write_text(f"status {folder} fuse.memfaas ro,noauto,_netdev,broker={cluster.address} 0 0\n")
        subprocess.run(["mount", "-T", table, folder], check=True)
        assert (folder / "f").read_text() == "1"
        with pytest.raises(OSError, match="Read-only"):
            (folder / "f").write_text("2")
        run("umount", folder)
