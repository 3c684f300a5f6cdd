"""Donors that come and go under a mount."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfaas.auth import OPERATOR
from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.units import MIB
from tests.e2e.moves import of_donor
from tests.fuse.conftest import Mounter, eventually

CHUNK = 64 << 10


@pytest.fixture
def own_cluster(fuse_device: None) -> Iterator[LocalCluster]:
    with LocalCluster(donors=2, memory=160 * MIB) as cluster:
        yield cluster


@pytest.fixture
def mount_here(own_cluster: LocalCluster, tmp_path: Path) -> Iterator[Mounter]:
    mounter = Mounter(own_cluster.address, tmp_path)
    yield mounter
    mounter.end()


@pytest.mark.slow
def test_what_is_lost_is_eio_and_one_line_in_the_log(own_cluster: LocalCluster, mount_here: Mounter) -> None:
    mounted = mount_here("s", "--size", "64MiB", "--cache", "1h")
    data = os.urandom(64 * CHUNK)
    (mounted / "d").mkdir()
    (mounted / "d" / "f").write_bytes(data)
    descriptor = os.open(mounted / "d" / "f", os.O_RDONLY | os.O_DIRECT)
    assert os.fstat(descriptor).st_size == len(data)  # the kernel has it, whoever loses the inode
    own_cluster.restart_donor(0)
    lost = []
    for offset in range(0, len(data), CHUNK):
        try:
            assert os.pread(descriptor, CHUNK, offset) == data[offset : offset + CHUNK]
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            lost.append(offset)
    os.close(descriptor)
    assert 0 < len(lost) < 64, "the chunks are on two donors"
    said = re.findall(r"file 'd/f' \(inode \d+\): bytes (\d+) to (\d+) are lost", mounted.log.read_text())
    assert [(int(low), int(high)) for low, high in said] == [(at, at + CHUNK) for at in lost]


@pytest.mark.slow
def test_files_are_read_and_written_while_a_donor_gives_its_memory_back(
    own_cluster: LocalCluster, mount_here: Mounter
) -> None:
    mounted = mount_here("s", "--size", "64MiB")
    ended = threading.Event()
    errors: list[BaseException] = []
    rounds = 0

    def work() -> None:
        nonlocal rounds
        try:
            while not ended.is_set():
                data = os.urandom(1_000_000)
                path = mounted / f"f{rounds % 5}"
                path.write_bytes(data)
                assert path.read_bytes() == data
                path.rename(mounted / f"g{rounds % 5}")
                rounds += 1
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    with connect(own_cluster.address, tenant=OPERATOR) as session:
        done = session.reclaim("donor0", "160MiB", deadline="20s", holder="test")
    ended.set()
    worker.join()
    assert errors == []
    assert rounds > 0
    assert {step.how for step in done.steps} >= {"migrated"}
    assert done.in_time


class _Verifying(threading.Thread):
    """fio, again and again, until it is told to end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._command = [
            *("fio", f"--directory={folder}", "--size=5m", "--direct=1"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=50", "--verify_state_save=0"),
            *("--name=small", "--rw=randrw", "--bs=4k"),
            *("--name=large", "--rw=randwrite", "--bsrange=16k-256k", "--blockalign=4k"),
        ]
        self.ended = threading.Event()
        self.rounds = 0
        self.failed = ""

    def run(self) -> None:
        while not self.ended.is_set() and not self.failed:
            done = subprocess.run(self._command, capture_output=True, text=True)
            if done.returncode:
                self.failed = done.stdout + done.stderr
            self.rounds += 1


@pytest.mark.slow
def test_fio_finds_what_it_wrote_while_donors_are_reclaimed_and_killed(
    own_cluster: LocalCluster, mount_here: Mounter
) -> None:
    mounted = mount_here("s", "--size", "64MiB")
    verifying = _Verifying(mounted.folder)
    verifying.start()

    def goes_on() -> None:
        before = verifying.rounds
        assert eventually(lambda: verifying.rounds > before + 1 or bool(verifying.failed))
        assert verifying.failed == ""

    try:
        with connect(own_cluster.address, tenant=OPERATOR) as session:
            goes_on()
            done = session.reclaim("donor0", "160MiB", deadline="20s", holder="test")
            assert done.in_time
            assert {step.how for step in done.steps} >= {"migrated"}
            goes_on()
            session.lend("donor0", holder="test")
            own_cluster.kill_donor(1)
            goes_on()
            own_cluster.restart_donor(1)
            goes_on()
            for function in of_donor(own_cluster, "donor1"):  # its agent starts another one on the same memory
                os.kill(function.pid, signal.SIGKILL)
            goes_on()
    finally:
        verifying.ended.set()
        verifying.join()
    assert verifying.failed == ""
    assert " are lost" not in mounted.log.read_text()
