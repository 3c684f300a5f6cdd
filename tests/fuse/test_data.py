"""The data of files: cuts, holes, a full store, lost memory; also when mounts are killed, or do it at once."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from memfaas.client.store import Store
from memfaas.errors import CapacityError, StoreFull, ValueLost
from memfaas.fs import FileSystem, files
from memfaas.fs.check import check
from memfaas.fs.files import OpenFile
from memfaas.fs.records import ROOT, chunk_key, number_of
from memfaas.fs.volume import Volume
from tests.fuse.test_cells import Killed, Mortal
from tests.fuse.test_volume import fails, make

CHUNK = 64 << 10


class Watched:
    """A store that tells `before` of each call, which may do something, or raise."""

    def __init__(self, store: Store, before: Callable[[str, bytes], None]) -> None:
        self._store = store
        self._before = before

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if args and isinstance(args[0], bytes):
                self._before(name, args[0])
            return getattr(self._store, name)(*args)

        return call


def opened(volume: Volume, ino: int) -> OpenFile:
    return volume.files.open(ino, b"f")


def read(volume: Volume, ino: int) -> bytes:
    file = opened(volume, ino)
    try:
        return bytes(volume.files.read(file, 0, 100 * CHUNK))
    finally:
        volume.files.close(file)


def write(volume: Volume, ino: int, offset: int, data: bytes) -> None:
    file = opened(volume, ino)
    assert volume.files.write(file, offset, data) == len(data)
    volume.files.close(file)


def chunks(store: Store) -> list[int]:
    return sorted(number_of(key[9:]) for key in store if key[:1] == b"c")


# --- cuts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, CHUNK])
def test_a_slow_cut_takes_nothing_away_that_was_written_after_it(store: Store, size: int) -> None:
    """The other one writes when the file is shorter already, and its old data is about to be removed."""
    other = Volume(store)
    ino = make(other, b"f")
    write(other, ino, 0, b"old" * CHUNK)
    written: list[bytes] = []

    def before(name: str, key: bytes) -> None:
        if name in ("_remove", "_remove_if", "_save_if") and key[:1] == b"c" and not written:
            written.append(key)
            write(other, ino, 0, b"new" * CHUNK)

    Volume(Watched(store, before)).files.truncate(ino, size, 0)
    assert written
    assert read(Volume(store), ino) == b"new" * CHUNK
    assert check(store).wrong == []


def test_who_finds_that_it_wrote_too_late_takes_only_its_own_away(store: Store) -> None:
    other = Volume(store)
    ino = make(other, b"f")
    did: list[str] = []

    def before(name: str, key: bytes) -> None:
        if key == chunk_key(ino, 1):
            if name == "_save_if" and not did:
                did.append("cut")
                other.files.truncate(ino, 0, 0)
            elif name in ("_remove", "_remove_if") and len(did) == 1:
                did.append("write")
                write(other, ino, 0, b"new" * CHUNK)

    volume = Volume(Watched(store, before))
    file = opened(volume, ino)
    volume.files.write(file, CHUNK, b"late")
    volume.files.flush(file)
    assert did == ["cut", "write"]
    assert read(other, ino) == b"new" * CHUNK


def test_a_cut_works_when_there_is_no_room_for_what_is_left_of_a_chunk(store: Store) -> None:
    full = Full(store)
    volume = Volume(full)
    ino = make(volume, b"f")
    write(volume, ino, 0, b"x" * CHUNK)
    full.room = 0
    volume.files.truncate(ino, 10, 0)
    assert read(volume, ino) == b"x" * 10
    with pytest.raises(StoreFull):
        volume.files.truncate(ino, 20, 0)
    assert volume.inode(ino).size == 10
    full.room = 1
    volume.files.truncate(ino, 20, 0)
    assert read(volume, ino) == b"x" * 10 + bytes(10)


# --- a full store ---------------------------------------------------------------------------------------------


class Full(Watched):
    """Has room for `room` chunks, or changes of chunks."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, self._count)
        self.room = 1 << 30

    def _count(self, name: str, key: bytes) -> None:
        if name in ("_save", "_save_if") and key[:1] == b"c":
            if self.room == 0:
                raise StoreFull("no room")
            self.room -= 1


@pytest.fixture
def full(store: Store) -> Full:
    return Full(store)


@pytest.mark.parametrize("length", [10, CHUNK, 3 * CHUNK])
def test_an_append_that_is_tried_again_is_there_once(full: Full, length: int) -> None:
    volume = Volume(full)
    ino = make(volume, b"f")
    file = opened(volume, ino)
    volume.files.append(file, b"begin")
    full.room = 0
    for _ in range(3):
        with pytest.raises(CapacityError):
            volume.files.append(file, b"x" * length)
        assert volume.inode(ino).size == 5
    full.room = 10
    assert volume.files.append(file, b"x" * length) == (5, length)
    assert volume.files.append(file, b"end") == (5 + length, 3)
    assert volume.files.read(file, 0, 4 * CHUNK) == b"begin" + b"x" * length + b"end"


def test_an_append_for_which_the_room_ends_is_there_in_part(full: Full, store: Store) -> None:
    volume = Volume(full)
    ino = make(volume, b"f")
    file = opened(volume, ino)
    full.room = 2
    assert volume.files.append(file, b"x" * (4 * CHUNK)) == (0, 2 * CHUNK)
    assert volume.inode(ino).size == 2 * CHUNK
    assert read(Volume(store), ino) == b"x" * (2 * CHUNK)


@dataclass
class Refused:
    """An append of ours that found no room, and another mount that has appended meanwhile."""

    full: Full
    store: Store

    def __post_init__(self) -> None:
        self._volume, self.other = Volume(self.full), Volume(self.store)
        self.ino = make(self._volume, b"f")
        self._file, self.theirs = opened(self._volume, self.ino), opened(self.other, self.ino)

        def before(name: str, key: bytes) -> None:
            if name == "_save_if" and key[:1] == b"c":
                self.other.files.append(self.theirs, b"theirs")
                raise StoreFull("no room")

        self.full._before = before
        with pytest.raises(CapacityError):
            self._volume.files.append(self._file, b"ours")

    def try_again(self) -> bytes:
        """What is in the file then."""
        self.full._before = self.full._count
        self._volume.files.append(self._file, b"ours")
        return read(Volume(self.store), self.ino)


def test_an_append_that_is_tried_again_keeps_its_place_before_that_of_another_mount(full: Full, store: Store) -> None:
    assert Refused(full, store).try_again() == b"ourstheirs"


def test_an_append_that_is_tried_again_writes_over_nothing_when_the_file_was_cut(full: Full, store: Store) -> None:
    refused = Refused(full, store)
    refused.other.files.truncate(refused.ino, 0, 0)
    refused.other.files.append(refused.theirs, b"theirs")
    assert refused.try_again() == b"theirsours"


def test_a_write_for_which_there_is_no_room_leaves_the_size(full: Full, store: Store) -> None:
    volume = Volume(full)
    ino = make(volume, b"f")
    file = opened(volume, ino)
    full.room = 2
    assert volume.files.write(file, 0, b"x" * (4 * CHUNK)) == 2 * CHUNK, "a part of it"
    assert Volume(store).inode(ino).size == volume.inode(ino).size == 2 * CHUNK
    with pytest.raises(CapacityError):
        volume.files.write(file, 10 * CHUNK, b"x" * CHUNK)
    assert Volume(store).inode(ino).size == volume.inode(ino).size == 2 * CHUNK
    volume.files.close(file)
    assert read(Volume(store), ino) == b"x" * (2 * CHUNK)


def test_what_was_taken_waits_for_room_until_it_is_given_up(full: Full, store: Store) -> None:
    volume = Volume(full)
    ino = make(volume, b"f")
    file = opened(volume, ino)
    volume.files.write(file, 0, b"start")
    volume.files.flush(file)
    volume.files.write(file, 2 * CHUNK, b"waits")
    full.room = 0
    with pytest.raises(CapacityError):
        volume.files.flush(file)
    assert volume.files.read(file, 2 * CHUNK, 5) == b"waits"
    full.room = 1
    volume.files.flush(file)
    assert read(Volume(store), ino)[2 * CHUNK :] == b"waits"

    full.room = 0
    volume.files.write(file, 5 * CHUNK, b"never")
    with pytest.raises(CapacityError):
        volume.files.flush(file)
    volume.files.give_up(file)
    assert Volume(store).inode(ino).size == volume.inode(ino).size == 2 * CHUNK + 5
    assert volume.files._waiting == 0
    volume.files.flush(file)
    volume.files.close(file)


def test_what_nobody_syncs_is_given_up_after_a_while_and_the_next_one_hears_of_it(
    full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WAIT_S", 0.0)
    volume = Volume(full)
    ino = make(volume, b"f")
    file = opened(volume, ino)
    full.room = 0
    volume.files.write(file, 0, b"never")
    volume.tick()
    volume.tick()
    assert volume.files._waiting > 0
    monkeypatch.setattr(files, "_GIVE_UP_S", -1.0)
    volume.tick()
    assert (volume.files._waiting, volume.inode(ino).size) == (0, 0)
    fails(errno.ENOSPC, volume.files.flush, file)
    volume.files.flush(file)


def test_a_program_sees_a_full_store_when_it_closes_the_file(full: Full, store: Store) -> None:
    with FileSystem(full) as system:
        system.write_bytes("/f", b"before")
        file = system.open("/f", "r+b")
        file.seek(3 * CHUNK)
        file.write(b"no room")
        full.room = 0
        fails(errno.ENOSPC, file.close)
        assert system.stat("/f").size == 6
        full.room = 10
        assert system.read_bytes("/f") == b"before"


# --- memory that is lost --------------------------------------------------------------------------------------


class Lossy(Watched):
    """Of each file, chunk 1 is on memory that is lost."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, self._lose)
        self.after = 1 << 30

    def _lose(self, name: str, key: bytes) -> None:
        if key[:1] == b"c" and number_of(key[9:]) == 1:
            raise ValueLost("its memory is gone")


def test_one_lost_chunk_takes_no_other_data_along(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    volume = Volume(Lossy(store))
    ino = make(volume, b"f")
    file = opened(volume, ino)
    for index in range(4):
        volume.files.write(file, index * CHUNK + 7, b"%d" % index * 10)
    fails(errno.EIO, volume.files.flush, file)
    volume.files.flush(file)  # it was said
    assert chunks(store) == [0, 2, 3]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [re.findall(r"file 'f' \(inode \d+\): bytes (\d+) to (\d+) are lost", line) for line in said] == [
        [(str(CHUNK + 7), str(CHUNK + 17))]
    ]
    fails(errno.EIO, volume.files.read, file, CHUNK, 1)
    fails(errno.EIO, volume.files.write, file, CHUNK, b"1" * CHUNK)
    assert f"file 'f' (inode {ino}): bytes {CHUNK} to {2 * CHUNK} are lost" in caplog.text
    assert volume.files.read(file, 2 * CHUNK + 7, 10) == b"2" * 10


def test_a_file_with_a_lost_chunk_keeps_no_other_file_from_being_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = Volume(Lossy(store))
    inodes = [make(volume, b"%d" % number) for number in range(3)]
    opens = [volume.files.open(ino, b"%d" % ino) for ino in inodes]
    for number, file in enumerate(opens):
        volume.files.write(file, CHUNK * (number != 1) + 10 * CHUNK * (number == 1), b"x")
    monkeypatch.setattr(files, "_DIRTY_MAX", 1)
    volume.files.write(opens[1], 5 * CHUNK, b"y")
    monkeypatch.setattr(files, "_DIRTY_MAX", 1 << 20)
    assert chunks(store) == [10], "room was made"
    fails(errno.EIO, volume.files.flush_all)
    assert chunks(store) == [5, 10]
    for file in opens:
        volume.files.close(file)
    volume.files.write(opened(volume, inodes[0]), CHUNK, b"x")
    with pytest.raises(OSError, match="Errno 5"):
        volume.close()
    assert Volume(store).members.others() == [], "it left all the same"


@pytest.mark.parametrize("level", [0, 1])
def test_a_file_whose_index_is_lost_is_read_written_and_deleted(store: Store, level: int) -> None:
    def before(name: str, key: bytes) -> None:
        if lost and key[:1] == b"b" and key[9] == level:
            raise ValueLost("its memory is gone")

    lost: list[bool] = []
    volume = Volume(Watched(store, before))
    ino = make(volume, b"f")
    write(volume, ino, 100 * CHUNK, b"x")
    write(volume, ino, 5000 * CHUNK, b"x")
    lost.append(True)
    file = opened(volume, ino)
    assert volume.files.read(file, 5000 * CHUNK, 10) == b"x"
    assert volume.files.data_bytes(ino, volume.inode(ino)) >= CHUNK + 1
    for index in (6000, 9000):
        volume.files.write(file, index * CHUNK, b"y" * CHUNK)
    volume.files.punch(file, 200 * CHUNK, 6000 * CHUNK)
    assert chunks(store) == [100, 9000]
    volume.files.truncate(ino, 200 * CHUNK, 0)
    assert chunks(store) == [100]
    volume.files.close(file)
    volume.unlink(ROOT, b"f")
    volume.free()
    assert chunks(store) == []
    fails(errno.ESTALE, volume.inode, ino)


# --- far apart --------------------------------------------------------------------------------------------------

FAR = [0, 63, 64, 4095, 4096, 5000, 1 << 24, (1 << 47) - 1]
"""Chunks, at the seams of the index."""


def scattered(volume: Volume, ino: int) -> None:
    file = opened(volume, ino)
    for index in FAR:
        volume.files.write(file, index * CHUNK + 5, b"data")
    volume.files.close(file)


@pytest.fixture
def few(store: Store) -> Volume:
    """Has a thousand steps, for all it does."""
    mortal: Any = Mortal(store, 1000)
    return Volume(mortal, cache_s=0.0)


def test_what_is_far_apart_is_deleted_at_once(few: Volume, store: Store) -> None:
    before = set(store.keys())
    ino = make(few, b"f")
    scattered(few, ino)
    assert chunks(store) == FAR
    assert check(store).wrong == []
    few.unlink(ROOT, b"f")
    few.free()
    assert set(store.keys()) - before <= {b"n"}


@pytest.mark.parametrize("size", [0, 100 * CHUNK, 4096 * CHUNK + 2, 1 << 60])
def test_what_is_far_apart_is_cut_at_once(few: Volume, store: Store, size: int) -> None:
    ino = make(few, b"f")
    scattered(few, ino)
    few.files.truncate(ino, size, 0)
    left = [index for index in FAR if index * CHUNK < size]
    assert chunks(store) == left
    few.files.truncate(ino, 1 << 62, 0)
    assert few.files.data_bytes(ino, few.inode(ino)) == CHUNK * len(left)
    few.unlink(ROOT, b"f")
    few.free()
    assert not [key for key in store if key[:1] in b"cb"]


def test_holes_are_found_and_made_at_once(few: Volume, store: Store) -> None:
    ino = make(few, b"f")
    scattered(few, ino)
    file = opened(few, ino)
    seek = few.files.seek
    starts, at = [], 0
    while at < few.inode(ino).size:
        starts.append(seek(file, at, os.SEEK_DATA))
        at = seek(file, starts[-1], os.SEEK_HOLE)
    fails(errno.ENXIO, seek, file, at, os.SEEK_DATA)
    assert [start // CHUNK for start in starts] == [0, 63, 4095, 5000, 1 << 24, (1 << 47) - 1]
    assert at == few.inode(ino).size
    few.files.write(file, 200 * CHUNK, b"waits")
    assert seek(file, 65 * CHUNK, os.SEEK_DATA) == 200 * CHUNK
    assert seek(file, 10, os.SEEK_DATA) == 10
    fails(errno.ENXIO, seek, file, 1 << 63, os.SEEK_HOLE)
    few.files.punch(file, 10 * CHUNK, 1 << 61)
    assert chunks(store) == [0, (1 << 47) - 1]
    assert seek(file, CHUNK, os.SEEK_DATA) == FAR[-1] * CHUNK
    assert few.files.data_bytes(ino, few.inode(ino)) == CHUNK + 9


def test_a_program_finds_holes(files: FileSystem) -> None:
    with files.open("/f", "wb") as file:
        file.seek(3 * CHUNK)
        file.write(b"data")
    with files.open("/f") as file:
        assert file.seek(0, os.SEEK_DATA) == 3 * CHUNK
        assert file.read() == b"data"
        assert file.seek(0, os.SEEK_HOLE) == 0


@pytest.mark.parametrize("others", [0, 1])
def test_whoever_is_killed_leaves_no_data_that_nobody_knows(store: Store, others: int) -> None:
    """Killed before each of its steps: while it writes far apart, punches, cuts, and deletes."""

    def work(volume: Volume) -> None:
        ino, _ = volume.lookup(ROOT, b"f")
        file = opened(volume, ino)
        for index in FAR[2:]:
            volume.files.write(file, index * CHUNK, b"x")
        volume.files.flush(file)
        volume.files.punch(file, 63 * CHUNK, 5000 * CHUNK)
        volume.files.truncate(ino, CHUNK, 0)
        volume.files.write(file, 70 * CHUNK, b"x" * CHUNK)
        volume.files.close(file)
        volume.unlink(ROOT, b"f")
        volume.free()

    for killed_at in itertools.count():
        store.clear()
        bystanders = [Volume(store) for _ in range(others)]
        mortal: Any = Mortal(store, 1_000_000)
        victim = Volume(mortal)
        ino = make(victim, b"f")
        mortal._left = killed_at
        try:
            work(victim)
        except Killed:
            pass
        else:
            break
        assert check(store).wrong == [], f"killed at step {killed_at}"
        survivor = bystanders[0] if bystanders else Volume(store)
        value = survivor.cells.read(b"i" + ino.to_bytes(8, "big"))
        if value is not None:
            survivor._free([ino])
            left = [key for key in store if key[:1] in b"cb"]
            assert left == [], f"killed at step {killed_at}"
    assert killed_at > 50


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("index", [3, 70])
def test_who_comes_while_a_hole_is_made_does_not_lose_his_data(store: Store, index: int, step: int) -> None:
    """The bits of a chunk go only if nobody may rely on them."""
    came: list[Volume] = []
    steps: list[bytes] = []

    def before(name: str, key: bytes) -> None:
        if punching and not came and name == "_save_if" and key[:1] in (b"M", b"t"):
            steps.append(key)
            if len(steps) > step:
                came.append(Volume(store))
                write(came[0], ino, index * CHUNK, b"n" * CHUNK)

    punching: list[bool] = []
    volume = Volume(Watched(store, before))
    ino = make(volume, b"f")
    write(volume, ino, index * CHUNK, b"o" * CHUNK)
    write(volume, ino, 100 * CHUNK, b"end")
    punching.append(True)
    file = opened(volume, ino)
    volume.files.punch(file, 0, 90 * CHUNK)
    assert came
    assert check(store).wrong == []
    assert volume.files.read(file, index * CHUNK, CHUNK) == b"n" * CHUNK
    assert volume.files.seek(file, 0, os.SEEK_DATA) == index * CHUNK


# --- fallocate --------------------------------------------------------------------------------------------------


def test_room_is_asked_for_before_a_file_becomes_larger(few: Volume, store: Store) -> None:
    file = opened(few, make(few, b"f"))
    reserve = few.files.reserve
    for length in (1 << 30, 1 << 60):
        fails(errno.ENOSPC, lambda length=length: reserve(file, 0, length, keep_size=False))
    assert few.inode(file.ino).size == 0
    fails(errno.EFBIG, lambda: reserve(file, (1 << 63) - 10, 100, keep_size=False))
    reserve(file, 1 << 60, 1 << 20, keep_size=True)
    assert few.inode(file.ino).size == 0
    reserve(file, 1 << 60, 1 << 20, keep_size=False)
    assert few.inode(file.ino).size == (1 << 60) + (1 << 20)
    reserve(file, 0, 1 << 20, keep_size=False)
    assert few.inode(file.ino).size == (1 << 60) + (1 << 20)
    assert chunks(store) == []
    few.files.write(file, 0, b"x" * (40 << 20))
    reserve(file, 0, 45 << 20, keep_size=False)  # the most of it is there


# --- whole files, by a program ----------------------------------------------------------------------------------------


def test_a_file_for_which_the_room_ends_is_not_said_to_be_written(full: Full) -> None:
    with FileSystem(full) as files:
        files.write_bytes("/f", b"before")
        full.room = 2
        fails(errno.ENOSPC, files.write_bytes, "/f", bytes(4 * files.chunk))
        full.room = 1 << 30


def test_what_a_link_leads_to_is_made(files: FileSystem) -> None:
    files.mkdir("/d")
    files.symlink("e/there", "/d/link")
    with pytest.raises(FileNotFoundError):
        files.write_bytes("/d/link", b"x")
    files.mkdir("/d/e")
    files.write_bytes("/d/link", b"x")
    assert files.read_bytes("/d/e/there") == b"x"
    files.symlink("/round", "/round")
    fails(errno.ELOOP, files.write_bytes, "/round", b"x")
