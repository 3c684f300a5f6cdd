"""A cluster, stores on it, and real mounts of them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from memfaas.client.local import LocalCluster
from memfaas.client.session import Session, connect
from memfaas.client.store import Store
from memfaas.fs import FileSystem
from memfaas.fs.volume import Volume
from memfaas.units import MIB

START_S = 60.0
_names = itertools.count()


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """For tests that leave it as they found it."""
    with LocalCluster(donors=2, memory=512 * MIB) as cluster:
        yield cluster


@pytest.fixture
def session(cluster: LocalCluster) -> Iterator[Session]:
    with connect(cluster.address) as session:
        yield session


@pytest.fixture
def store(session: Session) -> Iterator[Store]:
    name = f"fs{next(_names)}"
    yield session.store(name, size=64 * MIB)
    session.delete_store(name)


@pytest.fixture
def volume(store: Store) -> Volume:
    return Volume(store, cache_s=0.0)


@pytest.fixture
def files(store: Store) -> Iterator[FileSystem]:
    with FileSystem(store) as files:
        yield files


@dataclass
class Mount:
    """A mount by a process of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def kill(self) -> None:
        """As by `kill -9`; the dead mount point is taken away."""
        self.process.kill()
        self.process.wait()
        subprocess.run(["fusermount3", "-u", "-z", self.folder], check=True)

    def unmount(self) -> None:
        subprocess.run(["fusermount3", "-u", self.folder], check=True)
        assert self.process.wait(START_S) == 0


@dataclass
class Mounter:
    address: str
    base: Path
    mounts: list[Mount] = field(default_factory=list)

    def __call__(self, store: str, *options: str) -> Mount:
        folder = self.base / f"mnt{len(self.mounts)}"
        folder.mkdir()
        log = folder.with_suffix(".log")
        reader, writer = os.pipe()
        with log.open("wb") as target:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "memfaas.cli", "mount", store, folder),
                    *("--ready-fd", str(writer), "--broker", self.address, *options),
                ],
                pass_fds=(writer,),
                stderr=target,
            )
        os.close(writer)
        with open(reader, "rb") as ready:
            assert ready.readline() == b"ready\n", log.read_text()
        mount = Mount(folder, process, log)
        self.mounts.append(mount)
        return mount

    def end(self) -> None:
        for mount in self.mounts:
            if mount.process.poll() is None:
                mount.process.send_signal(signal.SIGTERM)
        for mount in self.mounts:
            try:
                mount.process.wait(START_S)
            except subprocess.TimeoutExpired:
                mount.process.kill()
            if os.path.ismount(mount.folder):
                subprocess.run(["fusermount3", "-u", "-z", mount.folder], check=True)


@pytest.fixture(scope="session")
def fuse_device() -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this machine has no usable /dev/fuse")


@pytest.fixture
def mount(fuse_device: None, cluster: LocalCluster, tmp_path: Path) -> Iterator[Mounter]:
    mounter = Mounter(cluster.address, tmp_path)
    yield mounter
    mounter.end()


@pytest.fixture
def mounted(mount: Mounter, store: Store) -> Mount:
    return mount(store.name)


@pytest.fixture
def pair(mount: Mounter, store: Store) -> tuple[Mount, Mount]:
    """Two mounts of one file system, on which nothing is kept in the kernel that another may change."""
    return mount(store.name, "--cache", "0s"), mount(store.name, "--cache", "0s")


def eventually(condition: Callable[[], bool], within_s: float = START_S) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
