"""Donors that come and go under a mount."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfaas.auth import OPERATOR
from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.units import MIB
from tests.fuse.conftest import Mounter

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
