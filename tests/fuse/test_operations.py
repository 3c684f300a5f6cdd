"""What the kernel and the log are told of errors."""

from __future__ import annotations

import errno

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
