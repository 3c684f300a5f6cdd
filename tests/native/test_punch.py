"""Free spans go back to the kernel while the shard serves, and can be had again."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from memfaas._native import Memory, ShmLink, TcpLink, format_memory, geometry
from memfaas.errors import KeyAbsent, StoreFull
from memfaas.testing import fsck
from memfaas.testing.lease import Arrival, BareLease, BareStore, fill_and_empty, move
from tests.disks import filled_but_for, small_disk

SIZE = 24 << 20
SPAN = 256 << 10
HUGE_PAGE = 2 << 20
PATIENCE_S = 20.0


def backed(lease: BareLease) -> int:
    """Bytes of pages that the data has in the kernel."""
    return os.fstat(lease.data_fd).st_blocks * 512


def holes(lease: BareLease) -> list[tuple[int, int]]:
    """(offset, length) of what has no pages."""
    end = os.fstat(lease.data_fd).st_size
    found = []
    at = 0
    while (start := os.lseek(lease.data_fd, at, os.SEEK_HOLE)) < end:
        try:
            at = os.lseek(lease.data_fd, start, os.SEEK_DATA)
        except OSError:  # nothing but a hole to the end
            at = end
        found.append((start, at - start))
    return found


@pytest.fixture
def lease() -> Iterator[BareLease]:
    with BareLease("shard", SIZE) as lease:
        with suppress(PermissionError):  # not allowed to lock so much
            lease.memory.populate(lease.memory.data_bytes)
        lease.memory.populate(lease.memory.data_bytes)
        assert holes(lease) == []
        yield lease


@pytest.fixture
def store(lease: BareLease) -> BareStore:
    return lease.store(lease.shm_link())


def fill(store: BareStore, sizes: list[int]) -> dict[bytes, bytes]:
    """Values of these sizes in turn, until no more fit."""
    values: dict[bytes, bytes] = {}
    while True:
        key = b"key-%d" % len(values)
        value = random.Random(len(values)).randbytes(sizes[len(values) % len(sizes)])
        try:
            store.put(key, value)
        except StoreFull:
            return values
        values[key] = value


def assert_stored(store: BareStore, values: dict[bytes, bytes]) -> None:
    assert store.get_many(list(values)) == list(values.values())


def test_room_goes_back_to_the_kernel_and_all_values_stay(lease: BareLease, store: BareStore) -> None:
    values = fill(store, [100, 5000, 70_000, 600_000, 300_000])
    for key in list(values)[::2]:
        store.delete(key)
        del values[key]
    used = lease.memory.stats()["used"]
    free = lease.memory.stats()["free_spans"]
    full = backed(lease)
    freed = lease.memory.punch(lease.data_fd, SIZE, PATIENCE_S)
    assert freed >= SIZE // 4
    assert freed % SPAN == 0
    assert freed >= free * SPAN
    assert backed(lease) == full - freed
    assert lease.memory.stats()["free_spans"] == 0
    assert lease.memory.stats()["used"] == used
    assert_stored(store, values)
    assert_stored(lease.store(lease.tcp_link()), values)
    assert len(store.scan(0)) == len(values)
    assert backed(lease) == full - freed
    assert lease.memory.punch(lease.data_fd, SIZE, 0.0) == 0


def test_a_shard_that_was_cut_is_full_sooner_until_it_has_its_room_again(lease: BareLease, store: BareStore) -> None:
    all_ = fill(store, [SPAN])
    for key in all_:
        store.delete(key)
    half = lease.memory.punch(lease.data_fd, SIZE // 2, PATIENCE_S)
    assert half == SIZE // 2
    fewer = fill(store, [SPAN])
    assert len(all_) // 2 - 2 <= len(fewer) <= len(all_) // 2 + 1
    with pytest.raises(StoreFull):
        store.put(b"one more", bytes(SPAN))
    assert_stored(store, fewer)
    assert backed(lease) <= lease.memory.data_bytes - half
    lease.memory.unpunch()
    more = fill(store, [SPAN])
    assert len(more) == len(all_)
    assert_stored(store, more)
    for key in more:
        store.delete(key)
    fill_and_empty(store)
    assert fsck.faults(lease.data_fd, lease.control_fd) == {}


def test_what_a_full_disk_has_no_blocks_for_stays_cut_out(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 64 << 20):
        data_bytes, control_bytes = geometry("shard", SIZE)
        data = os.open(disk, os.O_TMPFILE | os.O_RDWR)
        control = os.memfd_create("control")
        try:
            os.posix_fallocate(data, 0, data_bytes)
            os.ftruncate(control, control_bytes)
            format_memory(data, control, kind="shard", size=SIZE, lease=b"L" * 16, store=b"S" * 16, shard=0, epoch=1)
            memory = Memory(data, control)
            store = BareStore(memory.part_size)
            store._set_link(0, ShmLink(data, control, memory.attach(os.getpid(), 1), PATIENCE_S))
            punched = memory.punch(data, 12 << 20, 0.0)
            with filled_but_for(disk, 10 << 20):
                with pytest.raises(OSError, match="No space left"):
                    memory.unpunch(data)
                assert 0 < memory.punched() < punched
                values = fill(store, [100_000])  # every page of it that may be written to has its block
                assert_stored(store, values)
            memory.unpunch(data)
            assert memory.punched() == 0
            store.put(b"one more", bytes(1 << 20))
            assert_stored(store, values)
        finally:
            os.close(data)
            os.close(control)


def test_what_is_asked_for_is_what_is_cut(lease: BareLease) -> None:
    memory = lease.memory
    assert memory.punch(lease.data_fd, 0, PATIENCE_S) == 0
    for pages in (1, 3, 2):
        before = backed(lease)
        assert memory.punch(lease.data_fd, pages * HUGE_PAGE, PATIENCE_S) == pages * HUGE_PAGE
        assert backed(lease) == before - pages * HUGE_PAGE
    before = backed(lease)
    freed = memory.punch(lease.data_fd, 1, PATIENCE_S)
    assert 0 < freed <= HUGE_PAGE  # never less than was asked for, while there is some
    assert backed(lease) == before - freed


def test_whole_large_pages_are_taken_first(lease: BareLease, store: BareStore) -> None:
    values = fill(store, [SPAN])
    data = os.pread(lease.data_fd, lease.memory.data_bytes, 0)
    places = {key: data.index(value) for key, value in values.items()}
    pages = sorted({at // HUGE_PAGE for at in places.values()})
    whole = [page for page in pages if sum(at // HUGE_PAGE == page for at in places.values()) == HUGE_PAGE // SPAN]
    first, *others = whole  # others lie nearer to the end, where it begins to look
    singles = [min(key for key, at in places.items() if at // HUGE_PAGE == page) for page in others]
    for key, at in places.items():
        if at // HUGE_PAGE == first or key in singles:
            store.delete(key)
            del values[key]
    assert lease.memory.punch(lease.data_fd, HUGE_PAGE, PATIENCE_S) == HUGE_PAGE
    assert holes(lease) == [(first * HUGE_PAGE, HUGE_PAGE)]
    assert lease.memory.punch(lease.data_fd, SIZE, PATIENCE_S) == len(singles) * SPAN
    assert sum(length for _, length in holes(lease)) == HUGE_PAGE + len(singles) * SPAN
    assert_stored(store, values)


def test_what_was_freed_just_now_is_waited_for(lease: BareLease, store: BareStore) -> None:
    values = fill(store, [1000])
    for key in values:
        store.delete(key)
    assert lease.memory.punch(lease.data_fd, SIZE, PATIENCE_S) == SIZE


def test_a_region_has_nothing_to_give() -> None:
    with BareLease("region", SIZE) as lease:
        assert lease.memory.punch(lease.data_fd, SIZE, 0.0) == 0


def test_a_cut_shard_has_all_its_room_where_it_moves_to(lease: BareLease, store: BareStore) -> None:
    values = fill(store, [SPAN, 3000])
    for key in list(values)[5:]:
        store.delete(key)
        del values[key]
    lease.memory.punch(lease.data_fd, SIZE, PATIENCE_S)
    before = backed(lease)
    with move(lease.memory, Arrival("shard", SIZE)) as there:
        assert backed(lease) == before  # what is read comes back
        store_there = there.store(there.shm_link())
        assert_stored(store_there, values)
        for key in values:
            store_there.delete(key)
        fill_and_empty(store_there)
        assert there.memory.punch(there.data_fd, SIZE, PATIENCE_S) == SIZE
        there.memory.unpunch()
        assert fsck.faults(there.data_fd, there.control_fd) == {}


def test_what_is_cut_stays_so_when_the_function_is_started_again(lease: BareLease, store: BareStore) -> None:
    freed = lease.memory.punch(lease.data_fd, SIZE // 2, PATIENCE_S)
    lease.memory.reap(0)
    assert lease.memory.put_right(PATIENCE_S)
    assert lease.memory.stats()["free_spans"] == (SIZE - freed) // SPAN
    lease.memory.unpunch()
    assert lease.memory.stats()["free_spans"] == SIZE // SPAN
    fill_and_empty(store)


def test_what_is_punched_has_no_pages_when_another_function_populates_the_rest(lease: BareLease) -> None:
    lease.memory.punch(lease.data_fd, SPAN, PATIENCE_S)  # less than a page of 2 MiB, too
    lease.memory.punch(lease.data_fd, SIZE // 2, PATIENCE_S)
    punched, before = holes(lease), backed(lease)
    assert lease.memory.punched() == sum(length for _, length in punched)
    memory = Memory(lease.data_fd, lease.control_fd)
    while True:
        with suppress(PermissionError):  # once
            if memory.populate(5 * SPAN + 4096) == memory.data_bytes:
                break
    assert holes(lease) == punched
    assert backed(lease) == before
    memory.unpunch()
    assert (memory.punched(), lease.memory.punched()) == (0, 0)
    memory.close()


class Owner(threading.Thread):
    """Has keys of its own, and knows what they have."""

    def __init__(self, store: BareStore, number: int, stop: threading.Event) -> None:
        super().__init__()
        self.store = store
        self._stop_now = stop
        self._choose = random.Random(number)
        self._keys = [b"%d of %d" % (i, number) for i in range(20)]
        self.values: dict[bytes, bytes] = {}
        self.puts = self.refused = 0
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_now.is_set():
                self._one(self._choose.choice(self._keys))
        except BaseException as error:
            self.failed = error

    def _one(self, key: bytes) -> None:
        choice = self._choose.random()
        if choice < 0.4:
            value = self._choose.randbytes(self._choose.choice((10, 100, 4000, 60_000, 300_000, 900_000)))
            try:
                self.store.put(key, value)
            except StoreFull:
                self.refused += 1
            else:
                self.puts += 1
                self.values[key] = value
        elif choice < 0.6:
            assert self.store.delete(key) == (self.values.pop(key, None) is not None)
        else:
            try:
                assert self.store.get(key) == self.values.get(key)
            except KeyAbsent:
                assert key not in self.values


@pytest.mark.slow
def test_a_busy_shard_serves_while_it_is_cut(lease: BareLease) -> None:
    stop = threading.Event()
    choose = random.Random(4)
    links: list[ShmLink | TcpLink] = [lease.shm_link(), lease.tcp_link(), lease.shm_link(), lease.tcp_link()]
    owners = [Owner(lease.store(link), number, stop) for number, link in enumerate(links)]
    for owner in owners:
        owner.start()
    cuts = 0
    until = time.monotonic() + 3
    while time.monotonic() < until:
        cuts += lease.memory.punch(lease.data_fd, choose.randrange(1, SIZE), choose.choice((0.0, 0.01))) > 0
        time.sleep(choose.uniform(0.0, 0.02))
        if choose.random() < 0.7:
            lease.memory.unpunch()
    stop.set()
    for owner in owners:
        owner.join()
    assert [owner.failed for owner in owners] == [None] * len(owners)
    assert cuts > 10
    assert all(owner.puts > 10 for owner in owners)
    lease.memory.unpunch()
    lease.hang_up()
    assert fsck.faults(lease.data_fd, lease.control_fd) == {}
    store = lease.store(lease.shm_link())
    for owner in owners:
        assert_stored(store, owner.values)
        for key in owner.values:
            store.delete(key)
    assert lease.memory.stats()["used"] == 0
    fill_and_empty(store)
