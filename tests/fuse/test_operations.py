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
from tests.fuse.test_data import Watched


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
