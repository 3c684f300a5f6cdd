"""What the kernel and the log are told of errors."""

from __future__ import annotations

import errno
import os
import stat
from types import SimpleNamespace

import pyfuse3
import pytest
import trio

from memfaas.client.store import Store
from memfaas.errors import DeadlineExceeded
from memfaas.fs.records import ROOT
from memfaas.fs.volume import Volume
from memfaas.fuse.operations import Operations
from tests.fuse.test_data import CHUNK, Full, Watched, write
from tests.fuse.test_volume import make


def test_memory_that_does_not_answer_is_said_to_the_log(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Its error is an OSError and one of ours."""

    def before(name: str, key: bytes) -> None:
        if silent:
            raise DeadlineExceeded("shard 0 did not answer in time")

    silent: list[bool] = []
    operations = Operations(Volume(Watched(store, before)), lambda: (0, 0), 0.0)
    silent.append(True)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        trio.run(operations.getattr, ROOT, None)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "getattr: shard 0 did not answer in time" in caplog.text


def test_a_write_within_a_file_fails_and_one_at_its_end_is_shorter_when_there_is_no_room(store: Store) -> None:
    """What is written through a mapping lies within the file, and the kernel does not look how much of it was taken."""
    full = Full(store)
    volume = Volume(full)
    operations = Operations(volume, lambda: (100, 0), 0.0)
    ino = make(volume, b"f")
    write(volume, ino, 0, b"old" * CHUNK)
    handle = trio.run(operations.open, ino, os.O_RDWR, None).fh
    full.room = 2
    with pytest.raises(pyfuse3.FUSEError) as caught:
        trio.run(operations.write, handle, 0, b"new" * CHUNK)
    assert caught.value.errno == errno.ENOSPC
    full.room = 2
    assert trio.run(operations.write, handle, 3 * CHUNK, b"new" * CHUNK) == 2 * CHUNK
    trio.run(operations.release, handle)
    assert volume.inode(ino).size == 5 * CHUNK


def test_each_who_has_a_file_open_hears_once_that_its_data_was_given_up(store: Store) -> None:
    full = Full(store)
    operations = Operations(Volume(full), lambda: (100, 0), 0.0)
    ino = make(operations.volume, b"f")
    handles = [trio.run(operations.open, ino, os.O_RDWR, None).fh for _ in range(2)]
    for index, handle in enumerate(handles):
        trio.run(operations.write, handle, index * CHUNK, b"data")
    full.room = 0
    for handle in handles:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            trio.run(operations.fsync, handle, False)
        assert caught.value.errno == errno.ENOSPC
    for handle in [*handles, trio.run(operations.open, ino, os.O_RDWR, None).fh]:
        trio.run(operations.fsync, handle, False)
        trio.run(operations.release, handle)
    assert operations.volume.inode(ino).size == 0


def test_what_another_has_just_made_is_not_opened_unasked(store: Store) -> None:
    """The kernel, which found no such name, has not asked whether it may be opened. It looks again at ESTALE."""
    operations, other = Operations(Volume(store), lambda: (0, 0), 0.0), Volume(store)
    other.make(ROOT, b"f", stat.S_IFREG | 0o600, 1, 1)
    other.make(ROOT, b"d", stat.S_IFDIR | 0o700, 1, 1)
    context = SimpleNamespace(uid=2, gid=2)
    for name, flags, code in (
        (b"f", os.O_RDWR, errno.ESTALE),
        (b"d", os.O_RDWR, errno.ESTALE),
        (b"f", os.O_RDWR | os.O_EXCL, errno.EEXIST),
    ):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            trio.run(operations.create, ROOT, name, 0o600, flags | os.O_CREAT, context)
        assert caught.value.errno == code
