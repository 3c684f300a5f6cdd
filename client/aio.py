"""Sessions for programs on trio: the same verbs, awaited.

A small operation on shared memory takes a microsecond, so it runs right here, and is followed by a
checkpoint. Everything else (tcp, large values, repairs, the broker) runs in a worker thread.

An operation that has begun is not cut off by a cancellation: it comes to its end, within the
session's timeout, and then Cancelled is raised. So a buffer is never written behind your back, and
a put that was cancelled has either failed or taken effect whole.

The session's own control connection has a thread and a loop of its own: leases stay renewed also
while your event loop is busy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import trio

from memfaas import auth, messages
from memfaas._native import USER, ShmLink, as_key
from memfaas.client.keeper import WouldBlock, no_waiting
from memfaas.client.session import Session, connect
from memfaas.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memfaas._native import Value
    from memfaas.addresses import Address
    from memfaas.client.details import StoreDetails
    from memfaas.client.region import Region
    from memfaas.client.store import Store
    from memfaas.fabric import Choice

INLINE_BYTES = 64 << 10
"""Values up to this size are copied in the event loop's thread; it takes some microseconds."""

P = ParamSpec("P")
T = TypeVar("T")


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return await trio.to_thread.run_sync(partial(function, *args, **kwargs))


async def _inline(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a short operation here, or, when it turns out not to be short, in a thread."""
    try:
        with no_waiting() as postponed:
            result = function(*args, **kwargs)
    except WouldBlock:
        return await _in_thread(function, *args, **kwargs)
    await _finish(postponed)
    return result


async def _finish(postponed: list[Callable[[], None]]) -> None:
    for work in postponed:
        await _in_thread(work)
    await trio.lowlevel.checkpoint()


def _size(value: Any) -> int:
    """Bytes of a value; of what is none, more than may be copied inline."""
    try:
        size = value.nbytes if hasattr(value, "nbytes") else memoryview(value).nbytes
        return int(size)
    except TypeError:
        return INLINE_BYTES + 1


@asynccontextmanager
async def open_session(
    address: str | Address | None = None,
    *,
    fabric: Choice | None = None,
    device: str | None = None,
    tenant: str | None = None,
    secret_file: str | Path | None = None,
    timeout: str | float | None = None,  # noqa: ASYNC109  # of each operation, later
) -> AsyncIterator[AsyncSession]:
    """`memfaas.connect` for trio: `async with memfaas.open_session(address) as session:`."""
    session = await _in_thread(
        connect, address, fabric=fabric, device=device, tenant=tenant, secret_file=secret_file, timeout=timeout
    )
    try:
        yield AsyncSession(session)
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(session.close)


class AsyncSession:
    """See `memfaas.client.session.Session`; made by `open_session`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __repr__(self) -> str:
        return f"<Async {repr(self._session)[1:]}"

    async def store(
        self,
        name: str,
        size: str | int | None = None,
        persistent: bool = False,
        compression: messages.Compression = "none",
        on_reclaim: messages.OnReclaim = "migrate",
    ) -> AsyncStore:
        return AsyncStore(await _in_thread(self._session.store, name, size, persistent, compression, on_reclaim))

    async def lease(self, size: str | int) -> AsyncRegion:
        return AsyncRegion(await _in_thread(self._session.lease, size))

    async def stores(self) -> list[messages.StoreInfo]:
        return await _in_thread(self._session.stores)

    async def delete_store(self, name: str) -> None:
        await _in_thread(self._session.delete_store, name)

    async def status(self) -> messages.StatusReport:
        return await _in_thread(self._session.status)

    async def usage(self) -> messages.UsageReport:
        return await _in_thread(self._session.usage)

    async def reclaim(
        self, donor: str, size: str | int, deadline: str | float = "500ms", holder: str = auth.OPERATOR
    ) -> messages.Reclaimed:
        return await _in_thread(self._session.reclaim, donor, size, deadline, holder)

    async def lend(self, donor: str, holder: str = auth.OPERATOR) -> int:
        return await _in_thread(self._session.lend, donor, holder)


class AsyncStore:
    """See `memfaas.client.store.Store`; made by `AsyncSession.store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._scratch = bytearray(INLINE_BYTES)

    def __repr__(self) -> str:
        return f"<Async {repr(self._store)[1:]}"

    @property
    def name(self) -> str:
        return self._store.name

    def _is_near(self, key: str | bytes) -> bool:
        return isinstance(self._store._get_link(self._store._shard_of(as_key(key), USER)), ShmLink)

    async def get(self, key: str | bytes) -> bytes:
        if not self._is_near(key):
            return await _in_thread(self._store.get, key)
        try:
            with no_waiting() as postponed:  # and without a checkpoint: the scratch buffer is all tasks'
                length = self._store.get_into(key, self._scratch)
                value = bytes(memoryview(self._scratch)[:length])
        except (WouldBlock, UsageError):  # a value larger than the scratch buffer, which nothing was written to
            return await _in_thread(self._store.get, key)
        await _finish(postponed)
        return value

    async def get_into(self, key: str | bytes, buffer: Value) -> int:
        run = _inline if self._is_near(key) and _size(buffer) <= INLINE_BYTES else _in_thread
        return await run(self._store.get_into, key, buffer)

    async def get_array(self, key: str | bytes) -> NDArray[Any]:
        return await _in_thread(self._store.get_array, key)

    async def put(self, key: str | bytes, value: Value) -> None:
        run = _inline if self._is_near(key) and _size(value) <= INLINE_BYTES else _in_thread
        await run(self._store.put, key, value)

    async def delete(self, key: str | bytes) -> bool:
        run = _inline if self._is_near(key) else _in_thread
        return await run(self._store.delete, key)

    async def contains(self, key: str | bytes) -> bool:
        run = _inline if self._is_near(key) else _in_thread
        return await run(self._store.__contains__, key)

    async def get_many(self, keys: Iterable[str | bytes]) -> list[bytes | None]:
        return await _in_thread(self._store.get_many, keys)

    async def put_many(
        self,
        items: Mapping[str, Value]
        | Mapping[bytes, Value]
        | Mapping[str | bytes, Value]
        | Iterable[tuple[str | bytes, Value]],
    ) -> None:
        await _in_thread(self._store.put_many, items)

    async def keys(self, prefix: str | bytes = b"") -> list[bytes]:
        return await _in_thread(self._store.keys, prefix)

    async def count(self) -> int:
        """How many keys there are."""
        return await _in_thread(self._store.__len__)

    async def clear(self) -> None:
        await _in_thread(self._store.clear)

    async def info(self) -> StoreDetails:
        return await _in_thread(self._store.info)

    async def close(self) -> None:
        await _in_thread(self._store.close)


class AsyncRegion:
    """See `memfaas.client.region.Region`; made by `AsyncSession.lease`."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def __repr__(self) -> str:
        return f"<Async {repr(self._region)[1:]}"

    @property
    def size(self) -> int:
        return self._region.size

    def _is_near(self) -> bool:
        return isinstance(self._region._get_link(), ShmLink)

    async def read(self, offset: int, length: int) -> bytes:
        run = _inline if self._is_near() and length <= INLINE_BYTES else _in_thread
        return await run(self._region.read, offset, length)

    async def read_into(self, offset: int, buffer: Value) -> int:
        run = _inline if self._is_near() and _size(buffer) <= INLINE_BYTES else _in_thread
        return await run(self._region.read_into, offset, buffer)

    async def write(self, offset: int, data: Value) -> int:
        run = _inline if self._is_near() and _size(data) <= INLINE_BYTES else _in_thread
        return await run(self._region.write, offset, data)

    async def compare_swap(self, offset: int, expected: int, new: int) -> int:
        run = _inline if self._is_near() else _in_thread
        return await run(self._region.compare_swap, offset, expected, new)

    async def fetch_add(self, offset: int, amount: int) -> int:
        run = _inline if self._is_near() else _in_thread
        return await run(self._region.fetch_add, offset, amount)

    async def release(self) -> None:
        await _in_thread(self._region.release)
