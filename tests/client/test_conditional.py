"""Changes on the condition that nobody else has changed the value."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from memfaas._native import USER
from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.client.store import Store
from memfaas.errors import UsageError
from memfaas.units import MIB

_names = itertools.count()
A, B, C = (bytes([n]) * 8 for n in (1, 2, 3))


@pytest.fixture(params=["shm", "tcp"])
def store(cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[Store]:
    with connect(cluster.address, fabric=request.param) as session:
        yield session.store(f"conditional{next(_names)}", size=32 * MIB)


@pytest.mark.parametrize("size", [0, 100, 64 << 10, 300 << 10, 1 << 20])
def test_a_value_is_changed_by_who_knows_its_tag(store: Store, size: int) -> None:
    one, two = bytes([1]) * size, bytes([2]) * size
    assert store._save_if(b"k", USER, one, A, 0, b"")
    assert not store._save_if(b"k", USER, two, B, 0, b"")
    assert not store._save_if(b"k", USER, two, C, 0, B)
    assert store._load(b"k", USER) == (one, A, 0)
    assert store._save_if(b"k", USER, two, B, 0, A)
    assert store._load(b"k", USER) == (two, B, 0)
    assert not store._remove_if(b"k", USER, A)
    assert store._remove_if(b"k", USER, B)
    assert not store._remove_if(b"k", USER, B)
    assert store._load(b"k", USER) is None
    assert store._save_if(b"k", USER, one, C, 0, b"")


def test_what_is_refused_takes_no_memory(store: Store) -> None:
    value = bytes(1 << 20)
    assert store._save_if(b"k", USER, value, A, 0, b"")
    for _ in range(100):  # more than there is room for
        assert not store._save_if(b"k", USER, value, C, 0, B)
    assert store.get("k") == value


def test_a_value_without_a_tag_differs_from_every_tag(store: Store) -> None:
    store.put("k", b"plain")
    assert not store._save_if(b"k", USER, b"x", B, 0, A)
    assert not store._save_if(b"k", USER, b"x", B, 0, b"")
    assert not store._remove_if(b"k", USER, A)
    assert store.get("k") == b"plain"


@pytest.mark.parametrize("tag", [b"", b"short", bytes(8), b"much too long"])
def test_a_tag_that_is_none_is_refused(store: Store, tag: bytes) -> None:
    with pytest.raises(UsageError, match="a tag is 8 bytes"):
        store._save_if(b"k", USER, b"x", tag, 0, b"")
    with pytest.raises(UsageError, match="a tag is 8 bytes"):
        store._remove_if(b"k", USER, tag)


def test_of_many_who_count_none_is_lost(store: Store) -> None:
    tags = itertools.count(1)
    counted: list[int] = []

    def count() -> None:
        for _ in range(200):
            while True:
                found = store._load(b"n", USER)
                value, tag = (b"0", b"") if found is None else found[:2]
                new = str(int(value) + 1).encode()
                if store._save_if(b"n", USER, new, next(tags).to_bytes(8, "little"), 0, tag):
                    counted.append(int(new))
                    break

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == list(range(1, 801))
    assert store.get("n") == b"800"
