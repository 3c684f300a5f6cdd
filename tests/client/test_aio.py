"""The async store: the same verbs, without ever blocking the event loop for long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import trio

from memfaas.client.aio import INLINE_BYTES, AsyncStore
from memfaas.errors import KeyAbsent, LeaseLost, UsageError
from memfaas.units import MIB


@pytest.fixture
def local(make_local: Callable[..., Any]) -> Any:
    return make_local()


@pytest.fixture
def threads_of(local: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """In which threads the store's rare paths ran."""
    names: set[str] = set()
    for method in ("_put_rare", "_resolve", "keys"):
        original = getattr(type(local.store), method)

        def spy(self: Any, *arguments: Any, _original: Any = original) -> Any:
            result = _original(self, *arguments)
            names.add("loop" if threading.current_thread() is threading.main_thread() else "worker")
            return result

        monkeypatch.setattr(type(local.store), method, spy)
    return names


async def test_the_verbs(local: Any) -> None:
    store = AsyncStore(local.store)
    await store.put("a", b"1")
    await store.put(b"b", bytearray(b"2"))
    await store.put_many([("c", b"3"), ("d", np.arange(3))])
    assert await store.get("a") == b"1"
    assert await store.contains("b")
    assert not await store.contains("z")
    assert await store.get_many(["a", "z"]) == [b"1", None]
    assert (await store.get_array("d")).tolist() == [0, 1, 2]
    buffer = bytearray(10)
    assert await store.get_into("c", buffer) == 1
    assert buffer[:1] == b"3"
    assert await store.delete("a")
    assert not await store.delete("a")
    with pytest.raises(KeyAbsent):
        await store.get("a")
    assert sorted(await store.keys()) == [b"b", b"c", b"d"]
    assert await store.count() == 3
    assert (await store.info()).keys == 3
    assert store.name == "local"
    await store.clear()
    assert await store.count() == 0
    await store.close()


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES, INLINE_BYTES + 1, MIB])
async def test_values_of_any_size(local: Any, size: int) -> None:
    store, value = AsyncStore(local.store), bytes(size)
    await store.put("k", value)
    assert await store.get("k") == value
    buffer = bytearray(size)
    assert await store.get_into("k", buffer) == size


async def test_small_operations_run_in_the_loop(local: Any, threads_of: set[str]) -> None:
    store = AsyncStore(local.store)
    await store.put("k", memoryview(b"x" * 100))
    assert threads_of == {"loop"}


async def test_large_values_do_not_run_in_the_loop(local: Any, threads_of: set[str]) -> None:
    store = AsyncStore(local.store)
    await store.put("k", bytes(2 * MIB))
    assert await store.get("k") == bytes(2 * MIB)
    await store.keys()
    assert threads_of == {"worker"}


async def test_replacing_a_large_value_by_a_small_one_frees_its_parts(local: Any) -> None:
    store = AsyncStore(local.store)
    await store.put("k", bytes(2 * MIB))
    assert local.parts() > 0
    await store.put("k", b"small")
    assert local.parts() == 0
    await store.put("k", bytes(2 * MIB))
    await store.delete("k")
    assert local.parts() == 0


async def test_a_repair_does_not_run_in_the_loop(local: Any) -> None:
    store = AsyncStore(local.store)
    await store.put("k", b"x")
    loop = threading.current_thread()
    mended_in = []
    original = local.session.locate

    def locate(*arguments: Any) -> Any:
        mended_in.append(threading.current_thread())
        return original(*arguments)

    local.session.locate = locate
    for shard in range(2):
        local.lose(shard)
    with pytest.raises(LeaseLost):
        await store.get("k")
    assert mended_in
    assert loop not in mended_in


async def test_every_verb_is_a_checkpoint(local: Any) -> None:
    store = AsyncStore(local.store)
    await store.put("k", b"x")
    for call in (
        lambda: store.get("k"),
        lambda: store.put("k", b"x"),
        lambda: store.contains("k"),
        lambda: store.get_into("k", bytearray(1)),
    ):
        with trio.CancelScope() as scope:
            scope.cancel()
            await call()
        assert scope.cancelled_caught


async def test_a_value_that_is_none_is_refused(local: Any) -> None:
    store = AsyncStore(local.store)
    with pytest.raises(UsageError):
        await store.put("k", 17)  # type: ignore[arg-type]


async def test_tasks_that_read_at_once_each_get_their_own_value(local: Any) -> None:
    store = AsyncStore(local.store)
    values = {f"k{i}": b"%d" % i * 100 for i in range(8)}
    await store.put_many(values)

    async def read(key: str) -> None:
        for _ in range(50):
            assert await store.get(key) == values[key]

    async with trio.open_nursery() as nursery:
        for key in values:
            nursery.start_soon(read, key)
