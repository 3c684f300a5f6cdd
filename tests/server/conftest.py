"""A folder for donors, and a broker that does not wait for what was before it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from memfaas.server import broker, granting
from tests.server.support import Served, serve_broker


@pytest.fixture
def folder(own_world: Path) -> Iterator[Path]:
    """A short one: sockets go below it."""
    folder = own_world / "donor"
    folder.mkdir(mode=0o700)
    yield folder
    (folder / "secret").unlink(missing_ok=True)
    left = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    shutil.rmtree(folder)  # also for the tests that follow
    assert left == []


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which nobody comes back, so that waiting for them is not worth its time."""
    monkeypatch.setattr(broker, "SETTLE_S", 0.05)
    monkeypatch.setattr(granting, "RETURN_S", 0.1)


@pytest.fixture
async def served(short_waits: None, nursery: trio.Nursery) -> Served:
    return await serve_broker(nursery)
