"""A store's rare paths, on memory of this process: large values, arrays, compression, files, the end."""

from __future__ import annotations

import io
import os
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfaas import _native
from memfaas.client import parts
from memfaas.client.parts import Manifest
from memfaas.errors import (
    ClosedError,
    DeadlineExceeded,
    KeyAbsent,
    LeaseLost,
    MemfaasError,
    StoreFull,
    UsageError,
    ValueCorrupt,
    ValueLost,
    ValueTooLarge,
)
from memfaas.units import MIB

Make = Callable[..., Any]
NOISE = random.Random(2).randbytes(3 * MIB)


@pytest.fixture
def local(make_local: Make) -> Any:
    return make_local(shards=3)


@pytest.fixture
def compressed(make_local: Make) -> Any:
    return make_local(shards=2, compression="lz4")


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 512 * 1024, 512 * 1024 + 1, 3 * MIB])
def test_a_value_of_any_size_comes_back(local: Any, size: int) -> None:
    store, value = local.store, NOISE[:size]
    store.put("k", value)
    assert store.get("k") == value
    buffer = bytearray(size + 10)
    assert store.get_into("k", buffer) == size
    assert buffer[:size] == value
    assert store.get_array("k").tobytes() == value
    assert store.get_many(["k", "absent"]) == [value, None]
    assert store.keys() == [b"k"]


def test_a_value_larger_than_a_shard_is_spread_evenly(local: Any) -> None:
    value = NOISE + NOISE + NOISE[: 2 * MIB]
    local.store.put("large", value)
    assert local.store.get("large") == value
    counts = [memory.stats()["parts"] for memory in local.memories]
    assert sum(counts) == 16
    assert max(counts) - min(counts) <= 1


def test_parts_go_where_there_is_room(local: Any) -> None:
    store = local.store
    fill = 0
    while True:  # one shard alone
        key = next(k for n in range(fill, fill + 1000) if store._shard_of(k := b"fill%d" % n, 0) == 0)
        fill = int(key[4:]) + 1
        try:
            store.put(key, NOISE[: 256 * 1024])
        except StoreFull:
            break
    value = NOISE + NOISE
    store.put("large", value)
    assert store.get("large") == value
    store.delete("large")
    assert local.parts() == 0


@pytest.mark.parametrize("second", [NOISE[: 2 * MIB], b"small"])
def test_replacing_a_large_value_frees_its_parts(local: Any, second: bytes) -> None:
    local.store.put("k", NOISE)
    local.store.put("k", second)
    assert local.store.get("k") == second
    assert local.parts() == (4 if len(second) > 1000 else 0)


def test_deleting_a_large_value_frees_its_parts(local: Any) -> None:
    local.store.put("k", NOISE)
    assert local.store.delete("k")
    assert local.parts() == 0
    with pytest.raises(KeyAbsent):
        local.store.get("k")


def test_a_value_larger_than_the_store_is_refused(local: Any) -> None:
    with pytest.raises(ValueTooLarge):
        local.store.put("k", bytes(12 * MIB + 1))


def test_a_put_that_finds_no_room_leaves_what_was_there(local: Any) -> None:
    local.store.put("k", NOISE)
    used = [memory.stats()["used"] for memory in local.memories]
    with pytest.raises(StoreFull, match="k"):
        local.store.put("k", NOISE * 3 + NOISE[: 2 * MIB])
    assert [memory.stats()["used"] for memory in local.memories] == used
    assert local.store.get("k") == NOISE


def test_abandoned_parts_are_swept_when_room_is_needed(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = local.store
    store.put("kept", NOISE)
    for _ in range(2):  # puts that die before their manifest
        store._parts.write(b"lost", memoryview(NOISE), b"", store.part_size)
    with pytest.raises(StoreFull):
        store.put("k", NOISE + NOISE)
    monkeypatch.setattr(parts, "ORPHAN_AGE_S", -1.0)
    store.put("k", NOISE + NOISE)
    assert store.get("k") == NOISE + NOISE
    assert store.get("kept") == NOISE


def test_a_small_put_sweeps_too(make_local: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make_local(shards=1)
    store = local.store
    for _ in range(8):
        try:
            store._parts.write(b"lost", memoryview(NOISE[: 512 * 1024]), b"", store.part_size)
        except StoreFull:
            break
    with pytest.raises(StoreFull):
        store.put("k", NOISE[: 512 * 1024])
    monkeypatch.setattr(parts, "ORPHAN_AGE_S", -1.0)
    store.put("k", NOISE[: 512 * 1024])
    assert local.parts() == 0


def test_parts_of_a_long_put_that_lives_are_spared(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = local.store
    monkeypatch.setattr(parts, "SIGN_EVERY_S", -1.0)  # a sign of life after each part
    monkeypatch.setattr(parts, "_age", lambda stamp: 1000.0 if len(stamp) > 8 else 1.0)
    manifest = store._parts.write(b"k", memoryview(NOISE), b"", store.part_size)
    assert store._parts.sweep() == 0
    monkeypatch.setattr(parts, "_age", lambda stamp: 1000.0)
    assert manifest.signed
    assert store._parts.sweep() == 7
    assert local.parts() == 0


def test_a_put_that_takes_too_long_gives_up(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SILENCE_LIMIT_S", -1.0)
    with pytest.raises(DeadlineExceeded):
        local.store.put("k", NOISE)
    assert local.parts() == 0
    assert "k" not in local.store


def test_a_value_whose_part_is_gone_is_lost(local: Any) -> None:
    store = local.store
    store.put("k", NOISE)
    key = next(key for shard in range(3) for key, _, _ in parts.scan(store, shard, _native.PART))
    store._remove(key, _native.PART)
    reads: list[Callable[[], Any]] = [
        lambda: store.get("k"),
        lambda: store.get_into("k", bytearray(4 * MIB)),
        lambda: store.get_array("k"),
    ]
    for read in reads:
        with pytest.raises(ValueLost, match="k"):
            read()
    store.put("k", b"again")
    assert store.get("k") == b"again"


@pytest.mark.parametrize("end", ["replaced", "made small", "deleted"])
def test_a_value_that_changes_under_a_reader_is_read_again(local: Any, end: str) -> None:
    store = local.store
    store.put("k", NOISE)
    stale, meta, flags = store._load(b"k", _native.USER)
    second = {"replaced": NOISE[::-1], "made small": b"small", "deleted": None}[end]
    if second is None:
        store.delete("k")
        with pytest.raises(KeyAbsent):
            store._unpack(b"k", stale, meta, flags)
    else:
        store.put("k", second)
        assert store._unpack(b"k", stale, meta, flags) == second


def test_readers_and_writers_of_large_values_never_mix_them(local: Any) -> None:
    store = local.store
    values = [bytes([n]) * (MIB + n) for n in range(3)]
    store.put("k", values[0])
    done = threading.Event()
    errors: list[BaseException] = []

    def write(value: bytes) -> None:
        try:
            while not done.is_set():
                store.put("k", value)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(value,)) for value in values[1:]]
    for writer in writers:
        writer.start()
    try:
        for _ in range(60):
            try:
                assert store.get("k") in values
            except ValueLost:
                pass  # replaced twice while it was read
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert errors == []
    store.delete("k")
    assert local.parts() == 0


# --- arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["local", "compressed"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (300, 1000)])
def test_an_array_comes_back_writable(which: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(which).store
    value = np.arange(np.prod(shape, dtype=int), dtype="f8").reshape(shape)
    store.put("x", value)
    back = store.get_array("x")
    np.testing.assert_array_equal(back, value)
    assert back.dtype == value.dtype
    back[...] = 1
    np.testing.assert_array_equal(store.get_array("x"), value)
    assert store.get("x") == value.tobytes()
    again = np.empty(shape)
    assert store.get_into("x", again) == value.nbytes
    np.testing.assert_array_equal(again, value)


@pytest.mark.parametrize("count", [0, 1, 300_000])
def test_a_dtype_too_long_for_the_block_comes_back(local: Any, count: int) -> None:
    dtype = np.dtype([(f"a rather long name of column {number}", "u1") for number in range(60)])
    value = np.frombuffer(NOISE[: 60 * (count // 10)], dtype)
    local.store.put("x", value)
    back = local.store.get_array("x")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, value)
    assert local.store.get("x") == value.tobytes()
    local.store.delete("x")
    assert local.parts() == 0


def test_plain_bytes_are_an_array_of_bytes(local: Any) -> None:
    local.store.put("x", b"\1\2\3")
    back = local.store.get_array("x")
    assert back.tolist() == [1, 2, 3]
    assert back.dtype == np.uint8
    back[0] = 9
    assert local.store.get("x") == b"\1\2\3"


def test_put_many_takes_values_of_every_kind(local: Any) -> None:
    items: dict[str | bytes, Any] = {"a": b"1", b"b": bytearray(b"2"), "c": np.arange(3), "d": NOISE}
    local.store.put_many(items)
    assert local.store.get_many(["a", "b", "c", "d", "e"]) == [b"1", b"2", np.arange(3).tobytes(), NOISE, None]


# --- compression --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b/1", "b/2"]), st.binary(max_size=100), st.integers(1, 20_000)), max_size=8
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_compressing_store_is_a_dictionary(compressed: Any, steps: list[tuple[str, bytes, int]]) -> None:
    store = compressed.store
    model: dict[bytes, bytes] = {}
    store.clear()
    for key, block, times in steps:
        model[key.encode()] = block * times
        store.put(key, block * times)
    assert {key: store.get(key) for key in store} == model
    buffer = bytearray(2 * MIB + 1)
    for name, value in model.items():
        assert store.get_into(name, buffer) == len(value)
        assert buffer[: len(value)] == value


def test_values_that_gain_take_less_room(compressed: Any) -> None:
    compressed.store.put("small", b"abcd" * 1000)
    compressed.store.put("large", b"abcd" * MIB)
    info = compressed.store.info()
    assert info.used < 500_000
    assert info.compression.compressed > 1
    assert info.compression.bytes_saved > 3 * MIB
    assert compressed.store.get("large") == b"abcd" * MIB


def test_another_session_reads_what_one_compressed(make_local: Make, compressed: Any) -> None:
    compressed.store.put("k", b"abcd" * 1000)
    raw, _, flags = compressed.store._load(b"k", _native.USER)
    plain = make_local().store
    plain._save(b"k", _native.USER, raw, b"", flags)
    assert plain.get("k") == b"abcd" * 1000


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["local", "compressed"])
@pytest.mark.parametrize("size", [0, 10, 512 * 1024, 512 * 1024 + 1, 3 * MIB])
def test_a_file_comes_back(which: str, size: int, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(which).store
    assert store.put_from("k", io.BytesIO(NOISE[:size])) == size
    assert store.get("k") == NOISE[:size]
    out = io.BytesIO()
    assert store.get_to("k", out) == size
    assert out.getvalue() == NOISE[:size]


def test_a_pipe_gives_little_at_a_time(local: Any) -> None:
    receive, send = os.pipe()

    def feed() -> None:
        with os.fdopen(send, "wb", buffering=0) as pipe:
            for start in range(0, MIB, 10_000):
                pipe.write(NOISE[start : min(start + 10_000, MIB)])

    feeder = threading.Thread(target=feed)
    feeder.start()
    with os.fdopen(receive, "rb", buffering=0) as pipe:
        assert local.store.put_from("k", pipe) == MIB
    feeder.join()
    assert local.store.get("k") == NOISE[:MIB]


def test_a_file_that_fails_leaves_nothing(local: Any) -> None:
    class Failing(io.RawIOBase):
        left = MIB

        def read(self, size: int = -1) -> bytes:
            self.left -= size
            if self.left < 0:
                raise OSError("the disk is on fire")
            return bytes(size)

    local.store.put("k", b"before")
    with pytest.raises(OSError, match="fire"):
        local.store.put_from("k", Failing())
    assert local.store.get("k") == b"before"
    assert local.parts() == 0


# --- listing, info, the end -----------------------------------------------------------------------------


def test_keys_are_listed_once_and_by_prefix(local: Any) -> None:
    store = local.store
    names = {b"a/%d" % n for n in range(500)} | {b"b", b"\xff\0", b""}
    store.put_many({name: b"x" for name in names})
    assert len(store) == len(names)
    assert sorted(store.keys()) == sorted(names)
    assert sorted(store) == sorted(names)
    assert len(store.keys("a/")) == 500
    assert store.keys(b"\xff") == [b"\xff\0"]
    assert store.keys("c") == []
    store.clear()
    assert len(store) == 0
    assert bool(store)


def test_a_hostile_manifest_is_corrupt(local: Any) -> None:
    for data in (b"", b"\xc1", b"\x91\x01", Manifest(-1, 5, bytes(16), 0).pack(), Manifest(1, 0, bytes(16), 0).pack()):
        local.store._save(b"k", _native.USER, data, b"", _native.FLAG_MANIFEST)
        with pytest.raises(ValueCorrupt):
            local.store.get("k")


def test_info_tells_of_each_shard(local: Any) -> None:
    local.store.put("k", b"x" * 1000)
    info = local.store.info()
    assert (info.name, info.tenant, info.keys, info.size, info.persistent) == ("local", "t", 1, 12 * MIB, False)
    assert info.used >= 1000
    assert [shard.fabric for shard in info.shards] == ["shm"] * 3
    assert {shard.donor for shard in info.shards} == {"here"}
    assert info.compression is None
    assert local.store.fabrics() == {"shm": 3}


def test_a_lost_shard_is_told_and_the_others_serve(local: Any) -> None:
    store = local.store
    keys = {shard: next(b"%d" % n for n in range(100) if store._shard_of(b"%d" % n, 0) == shard) for shard in range(3)}
    store.put_many(dict.fromkeys(keys.values(), b"x"))
    local.lose(1)
    with pytest.raises(LeaseLost, match="shard 1 of store 'local'"):
        store.get(keys[1])
    assert store.get(keys[0]) == store.get(keys[2]) == b"x"
    info = store.info()
    assert [shard.trouble is None for shard in info.shards] == [True, False, True]
    assert info.shards[1].fabric is None
    with pytest.raises(LeaseLost):
        store.keys()


def test_a_closed_store_says_so(local: Any) -> None:
    store = local.store
    store.put("k", b"x")
    store.close()
    store.close()
    assert local.session.closed_stores == [store]
    assert "closed" in repr(store)
    calls: list[Callable[[], Any]] = [
        lambda: store.get("k"),
        lambda: store.put("k", b""),
        lambda: "k" in store,
        lambda: store.get_many(["k"]),
        store.keys,
        store.info,
        lambda: store.put("k", NOISE),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="local"):
            call()


@pytest.mark.parametrize("key", ["x" * 65537, b"x" * 65537])
def test_a_key_that_is_too_long_is_refused(local: Any, key: str | bytes) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: local.store.put(key, b""),
        lambda: local.store.get(key),
        lambda: local.store.get_array(key),
        lambda: local.store.put_from(key, io.BytesIO()),
    ]
    for call in calls:
        with pytest.raises(ValueTooLarge):
            call()


def test_a_small_buffer_is_refused_and_stays_as_it_is(local: Any, compressed: Any) -> None:
    for store, value in ((local.store, b"x" * 100), (local.store, NOISE), (compressed.store, b"x" * 1000)):
        store.put("k", value)
        buffer = bytearray(len(value) - 1)
        with pytest.raises(UsageError, match="buffer"):
            store.get_into("k", buffer)
        assert not any(buffer)


def test_a_store_cannot_be_pickled_by_mistake(local: Any) -> None:
    with pytest.raises(TypeError, match="connect"):
        pickle.dumps(local.store)


def test_errors_are_all_of_one_family(local: Any) -> None:
    with pytest.raises(MemfaasError):
        local.store.put("k", 17)
    with pytest.raises(KeyError):
        local.store.get_array("absent")
