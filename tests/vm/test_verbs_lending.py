"""Large values over verbs go between the device and the program's own memory, which is lent for one operation."""

from __future__ import annotations

import logging
import mmap
import random
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memfaas._native import LinkDown
from memfaas.testing.lease import BareLease

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]

NOISE = np.frombuffer(random.Random(7).randbytes(16 << 20), dtype=np.uint8)
SIZES = (256 << 10, (256 << 10) + 1, (1 << 20) - 4097, (4 << 20) + 17, (9 << 20) + 4096)
"""Some need several loans, one behind the other."""


def registered() -> int:
    """How many memories the devices of this node know."""
    told = subprocess.run(["rdma", "resource", "show", "mr"], capture_output=True, text=True, check=True).stdout
    return len(told.splitlines())


def test_large_buffers_come_back_whole_and_are_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    with BareLease("shard", 150 << 20, timeout_s=20) as lease, BareLease("region", 20 << 20, timeout_s=20) as raw:
        link, other = lease.verbs_link(), lease.store(lease.tcp_link())
        store, region = lease.store(link), raw.region(raw.verbs_link())
        store.put(b"k", bytes(1 << 20))
        region.write(0, bytes(1 << 20))
        before = registered()
        for number, size in enumerate(SIZES):
            value, room = NOISE[number * 7 : number * 7 + size], np.zeros(size + 5, np.uint8)
            store.put(b"k", bytearray(value))
            assert other.get(b"k") == value.tobytes()
            other.put(b"k", value[::-1].tobytes())
            assert store.get_into(b"k", room[3 : 3 + size]) == size
            assert (room[3 : 3 + size] == value[::-1]).all()
            assert store.get(b"k") == value[::-1].tobytes()
            region.write(number, value)
            assert region.read_into(number, room[1 : 1 + size]) == size
            assert (room[1 : 1 + size] == value).all()
            assert not room[:1].any()
            assert not room[3 + size :].any()
        assert registered() == before
    assert caplog.records == []  # nothing was copied


def test_memory_that_the_device_does_not_take_is_copied_which_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shared mapping of a file that is read only is such memory."""
    (tmp_path / "value").write_bytes(NOISE[: 1 << 20].tobytes())
    with (
        BareLease("shard", 64 << 20, timeout_s=20) as lease,
        (tmp_path / "value").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        link = lease.verbs_link()
        store = lease.store(link)
        for _ in range(2):
            store.put(b"k", memoryview(mapped))
            assert store.get(b"k") == mapped[:]
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "copied" in told[0].getMessage()


def test_a_buffer_that_changes_during_a_put_gives_a_value_that_can_be_read() -> None:
    """As over the other fabrics, some of its bytes may be old and some new."""
    with BareLease("shard", 64 << 20, timeout_s=20) as lease:
        store, buffer, over = lease.store(lease.verbs_link()), np.zeros(1 << 17, np.uint64), threading.Event()

        def change() -> None:
            while not over.is_set():
                buffer[::512] += 1  # never what it was before
                time.sleep(0.001)

        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(5):
                store.put(b"k", buffer)
                assert len(store.get(b"k")) == buffer.nbytes
        finally:
            over.set()
            changer.join()


def test_nothing_is_written_into_a_buffer_whose_operation_is_over() -> None:
    with BareLease("region", 64 << 20, timeout_s=20) as lease:
        lease.region(lease.tcp_link()).write(0, NOISE[: 8 << 20])
        for wait_s in (0.01, 0.05):
            region, room = lease.region(lease.verbs_link()), np.zeros(8 << 20, np.uint8)
            region.read_into(0, room[: 1 << 20])
            cut = threading.Timer(wait_s, lease.server.close_verbs, ["the lease is moving"])
            cut.start()
            with pytest.raises(LinkDown):
                region.read_into(0, room)
            room[:] = 7
            cut.join()
            time.sleep(0.3)
            assert (room == 7).all()
            lease.server.open_verbs()
