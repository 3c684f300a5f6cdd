"""Stores with on_reclaim="drop": what a dropped shard is to its users, without and with memory again."""

from __future__ import annotations

import contextlib
import io
import os
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from memfaas import auth, fabric, messages
from memfaas.client.aio import AsyncStore
from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.errors import BrokerUnavailable, CapacityError, KeyAbsent, LeaseLost, StoreFull, ValueLost
from memfaas.units import MIB

NOISE = random.Random(3).randbytes(3 * MIB)
DROPPED = 1
"""The shard."""


@pytest.fixture(params=["none", "lz4"])
def cache(make_local: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """One whose shard is dropped, with no room for it anywhere."""
    local = make_local(shards=3, compression=request.param, on_reclaim="drop")
    local.session.refusal = CapacityError("no donor has room")
    return local


def key_in(store: Any, shard: int, length: int = 8) -> bytes:
    return next(key for n in range(1000) if store._shard_of(key := b"%0*d" % (length, n), 0) == shard)


def test_what_was_dropped_is_absent_and_nothing_goes_in(cache: Any) -> None:
    store = cache.store
    gone, kept = key_in(store, DROPPED), key_in(store, 0)
    store.put_many({gone: b"1", kept: b"2"})
    cache.lose(DROPPED)
    for read in (store.get, store.get_array, lambda key: store.get_into(key, bytearray(9))):
        with pytest.raises(KeyAbsent):
            read(gone)
    assert gone not in store
    assert store.get_many([gone, kept]) == [None, b"2"]
    assert not store.delete(gone)
    assert store.keys() == [kept]
    assert len(store) == 1
    writes: list[Callable[[], object]] = [
        lambda: store.put(gone, b"3"),
        lambda: store.put(gone, b""),
        lambda: store.put(gone, np.arange(9)),
        lambda: store.put(gone, NOISE),
        lambda: store.put_many({gone: b"3"}),
        lambda: store.put_from(gone, io.BytesIO(NOISE)),
    ]
    for write in writes:
        with pytest.raises(StoreFull, match="shard 1 of store 'local' was dropped, and no donor has room"):
            write()
    store.put(kept, b"4")
    assert store.get(kept) == b"4"
    store.clear()
    assert len(store) == 0
    assert [cache.memories[shard].stats()["parts"] for shard in (0, 2)] == [0, 0]


async def test_the_same_awaited(cache: Any) -> None:
    store, key = AsyncStore(cache.store), key_in(cache.store, DROPPED)
    await store.put(key, b"1")
    cache.lose(DROPPED)
    with pytest.raises(KeyAbsent):
        await store.get(key)
    with pytest.raises(StoreFull):
        await store.put(key, b"2")
    assert not await store.contains(key)
    assert await store.count() == 0


def test_a_large_value_that_lost_a_part_is_absent(cache: Any) -> None:
    store, key = cache.store, key_in(cache.store, 0)
    store.put(key, NOISE + NOISE)
    cache.lose(DROPPED)
    with pytest.raises(KeyAbsent, match="dropped"):
        store.get(key)
    assert store.get_many([key]) == [None]
    store.put(key, NOISE)  # there is room for it in the others
    assert store.get(key) == NOISE


def test_the_details_say_what_was_dropped(cache: Any) -> None:
    cache.store.put(key_in(cache.store, DROPPED), NOISE[:1000])
    cache.lose(DROPPED)
    cache.session.dropped_keys = 1
    info = cache.store.info()
    assert (info.dropped, info.keys, info.used) == (1, 0, 0)
    shard = info.shards[DROPPED]
    assert (shard.fabric, shard.trouble, shard.used) == (None, "no donor has room", 0)
    assert cache.store.fabrics() == {"shm": 2}


def test_the_broker_is_asked_once_in_a_while_and_not_each_time(cache: Any) -> None:
    cache.lose(DROPPED)
    key = key_in(cache.store, DROPPED)
    for rounds in (1, 2):
        for _ in range(10):
            assert key not in cache.store
        assert cache.session.located == rounds
        (again,) = cache.session.timers
        cache.session.timers.clear()
        again()


def test_a_broker_that_is_away_does_not_make_a_dropped_shard_empty(cache: Any) -> None:
    cache.session.refusal = BrokerUnavailable("away")
    cache.session.timeout = 0.1
    cache.lose(DROPPED)
    with pytest.raises(BrokerUnavailable):
        cache.store.get(key_in(cache.store, DROPPED))


def test_a_shard_that_was_lost_and_not_dropped_is_lost(cache: Any) -> None:
    cache.session.refusal = LeaseLost("its donor is gone")
    cache.lose(DROPPED)
    with pytest.raises(ValueLost, match="shard 1 of store 'local' is lost: its donor is gone"):
        cache.store.get(key_in(cache.store, DROPPED))


@pytest.mark.parametrize("told", [False, True])
def test_it_heals_when_there_is_room_again(
    cache: Any, make_local: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    store, key = cache.store, key_in(cache.store, DROPPED)
    cache.lose(DROPPED)
    assert key not in store

    elsewhere = make_local(shards=1).store._get_link(0)
    monkeypatch.setattr(fabric, "open_link", lambda *_, **__: fabric.Opened(elsewhere))
    old = store.keepers[DROPPED].place
    ticket = auth.Ticket(tenant="t", lease=old.lease, donor="d", epoch=2, expires=time.time() + 300, uid=None)
    place: messages.Place = msgspec.structs.replace(old, donor="d", epoch=2, ticket=ticket.encode())
    if told:
        store.keepers[DROPPED].moved(place)
    else:
        monkeypatch.setattr(cache.session, "locate", lambda lease, timeout_s: place)
        cache.session.timers[0]()
    store.put(key, b"again")
    assert store.get(key) == b"again"
    shard = store.info().shards[DROPPED]
    assert (shard.donor, shard.trouble, shard.keys) == ("d", None, 1)


@pytest.mark.slow
def test_real_donors_drop_a_shard_and_take_it_in_again() -> None:
    with (
        LocalCluster(donors=2, memory="64MiB") as cluster,
        connect(cluster.address) as session,
        connect(cluster.address, tenant="operator") as operator,
    ):
        store = session.store("cache", size="64MiB", on_reclaim="drop")
        keys = [b"%d" % n for n in range(200)]
        store.put_many(dict.fromkeys(keys, NOISE[:1000]))
        there = {shard.donor: shard.keys for shard in store.info().shards}
        done = operator.reclaim("donor0", "64MiB", deadline="30s")
        assert done.in_time
        assert {"dropped"} <= {step.how for step in done.steps} <= {"unlent", "punched", "dropped"}
        assert sum(value is not None for value in store.get_many(keys)) == len(store) == there["donor1"]
        with pytest.raises(StoreFull):
            store.put_many(dict.fromkeys(keys, b"again"))
        assert store.info().dropped == there["donor0"]

        operator.lend("donor0")
        deadline = time.monotonic() + 30
        while len(store) < len(keys):
            assert time.monotonic() < deadline
            for key in keys:
                with contextlib.suppress(StoreFull):
                    store.put(key, b"again")
            time.sleep(0.1)
        assert set(store.get_many(keys)) == {b"again"}
        assert {shard.donor for shard in store.info().shards} == {"donor0", "donor1"}


def test_a_child_looks_again_by_itself(cache: Any) -> None:
    key = key_in(cache.store, DROPPED)
    cache.lose(DROPPED)
    assert key not in cache.store
    pid = os.fork()
    if pid == 0:
        cache.store.keepers[DROPPED].after_fork()
        absent = key not in cache.store
        os._exit(0 if absent and cache.session.located == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
