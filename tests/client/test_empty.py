"""The stand-in for a shard without memory."""

from __future__ import annotations

import os

import pytest

from memfaas._native import MAX_KEY, PART, USER, StoreCore, part_size
from memfaas.client.parts import scan
from memfaas.errors import StoreFull
from memfaas.fabric import empty
from memfaas.units import GIB


@pytest.fixture
def core() -> StoreCore:
    core = StoreCore([bytes(16)], part_size(64 * GIB), True)
    core._set_link(0, empty.full_link())
    return core


@pytest.mark.parametrize("space", [USER, PART])
@pytest.mark.parametrize("length", [0, 1, 1000, 64 << 10, 300_000, 2 << 20, 16 << 20])
@pytest.mark.parametrize("key_length", [1, MAX_KEY])
def test_nothing_goes_in(core: StoreCore, space: int, length: int, key_length: int) -> None:
    with pytest.raises(StoreFull):
        core._save(b"k" * key_length, space, bytes(length), b"", 0)


def test_no_store_puts_larger_values_in_one_piece(core: StoreCore) -> None:
    assert core.part_size == 16 << 20


def test_nothing_is_in_it(core: StoreCore) -> None:
    assert core._load(b"k", USER) is None
    assert core._remove(b"k", USER) == (False, None)
    assert [*scan(core, 0, USER), *scan(core, 0, PART)] == []
    link = core._get_link(0)
    assert link is not None
    assert link.stats()["keys"] == 0


def test_a_child_has_one_of_its_own() -> None:
    ours = empty.full_link()
    assert empty.full_link() is ours
    pid = os.fork()
    if pid == 0:
        core = StoreCore([bytes(16)], 1 << 20, True)
        core._set_link(0, empty.full_link())
        os._exit(0 if empty.full_link() is not ours and core._load(b"k", USER) is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
