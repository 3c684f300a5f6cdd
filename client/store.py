"""A store: the key-value verbs. The common ones are native; what is rare is here."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

from memfaas import messages
from memfaas._native import (
    BROKEN,
    FLAG_ARRAY,
    FLAG_LZ4,
    FLAG_MANIFEST,
    FROZEN,
    MAX_META,
    NEED_CONNECTION,
    REVOKED,
    STALE,
    USER,
    LinkDown,
    StoreCore,
    as_key,
    part_size,
)
from memfaas.client import codec
from memfaas.client.compress import Compressor, expand, expand_writable
from memfaas.client.details import ShardDetails, StoreDetails
from memfaas.client.keeper import Keeper, check_may_wait, now_or_later
from memfaas.client.parts import Manifest, PartMissing, Parts, scan
from memfaas.errors import (
    ClosedError,
    DeadlineExceeded,
    KeyAbsent,
    MemfaasError,
    StoreFull,
    UsageError,
    ValueLost,
    ValueTooLarge,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from memfaas._native import Value
    from memfaas.client.session import Session


_MENDABLE = {NEED_CONNECTION, BROKEN, REVOKED, FROZEN, STALE}


class _Entry(NamedTuple):
    """What lies under a key, or, `whole`, what its parts gave."""

    value: bytes | memoryview
    meta: bytes
    flags: int
    whole: bool = False


class Store(StoreCore):
    """A named set of shards, used as a dictionary of bytes. Made by `Session.store`.

    Keys are `str` (stored as UTF-8) or `bytes`, up to 64 KiB. Values are any contiguous buffer or
    NumPy array, from nothing to more than one donor holds. May be used by many threads at once;
    per key all operations of all processes are linearizable.

    Every operation ends within the session's timeout for each attempt of its parts, with a result or
    with one exception: KeyAbsent, StoreFull, ValueTooLarge, LeaseLost (ValueLost), ValueCorrupt,
    DeadlineExceeded, FabricUnavailable, BrokerUnavailable, AccessError, ClosedError, UsageError.

    `get`, `get_into`, `put`, `delete`, `in`, `get_many` and `put_many` are inherited from the native
    core.
    """

    def __init__(self, session: Session, spec: messages.StoreSpec, places: list[messages.Place]) -> None:
        super().__init__([place.lease for place in places], part_size(spec.shard_size), spec.compression == "none")
        self.spec = spec
        self._session = session
        self._closed = False
        self._compressor = Compressor() if spec.compression == "lz4" else None
        self._parts = Parts(self, len(places), self._compressor)
        self.keepers = [self._keeper(shard, place) for shard, place in enumerate(places)]

    def _keeper(self, shard: int, place: messages.Place) -> Keeper:
        return Keeper(
            f"shard {shard} of store {self.spec.name!r}",
            place,
            self._session,
            current=lambda: self._get_link(shard),
            install=lambda link: self._set_link(shard, link),
            lost=ValueLost,
            cache=self.spec.on_reclaim == "drop",
        )

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.spec.size} bytes in {self.spec.shards} shards"
        return f"<Store {self.spec.name!r}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a store cannot be pickled; open it by its name in the other process, with memfaas.connect")

    # --- arrays -------------------------------------------------------------------------------------

    def get_array(self, key: str | bytes) -> NDArray[Any]:
        """A fresh, writable array with the dtype and shape that were stored.

        A value that was stored as plain bytes comes back as a one-dimensional array of uint8.
        """
        import numpy as np

        name = as_key(key)
        found = self._resolve(name, self._entry(name), codec.fresh_memory)
        if found.whole:
            flat = np.asarray(found.value)
        elif found.flags & FLAG_LZ4:
            flat = np.frombuffer(expand_writable(found.value), np.uint8)
        else:
            flat = codec.thaw(bytes(found.value))
        return codec.shape_array(flat, found.meta) if found.flags & FLAG_ARRAY else flat

    # --- files --------------------------------------------------------------------------------------

    def put_from(self, key: str | bytes, file: BinaryIO) -> int:
        """Stores what can be read from a binary file or pipe, to its end. Returns its bytes.

        Needs memory for one part (16 MiB at most), however large the value is. A part that takes more
        than a minute to arrive is DeadlineExceeded.
        """
        name = as_key(key)
        buffer = memoryview(bytearray(self.part_size))
        first = _read_full(file, buffer)
        if first < len(buffer):
            self.put(name, bytes(buffer[:first]))
            return first
        length = 0

        def pieces() -> Iterator[memoryview]:
            nonlocal length
            got = first
            while got:
                length += got
                yield buffer[:got]
                got = _read_full(file, buffer)

        manifest = self._parts.write_stream(name, pieces(), b"", self.part_size)
        replaced = self._save_manifest(name, manifest, b"", 0)
        if replaced is not None:
            self._forget(replaced)
        return length

    def get_to(self, key: str | bytes, file: BinaryIO) -> int:
        """Writes a value to a binary file or pipe, part by part. Returns its bytes.

        When a large value is replaced meanwhile, parts of it may be written already: ValueLost.
        """
        name = as_key(key)
        entry = self._entry(name)
        if not entry.flags & FLAG_MANIFEST:
            return _write_full(file, expand(entry.value) if entry.flags & FLAG_LZ4 else entry.value)
        manifest = Manifest.unpack(bytes(entry.value))
        buffer = codec.fresh_memory(min(manifest.length, manifest.part_size))
        try:
            return sum(_write_full(file, piece) for piece in self._parts.read_pieces(manifest, buffer))
        except PartMissing:
            raise ValueLost(f"the value of {name[:100]!r} was replaced or deleted while it was read") from None

    # --- listing ------------------------------------------------------------------------------------

    def keys(self, prefix: str | bytes = b"") -> list[bytes]:
        """All keys that begin so, each once, in no order.

        Keys that are put or deleted meanwhile may be listed or not. ValueLost when a shard is lost.
        """
        start = as_key(prefix)
        return list(
            dict.fromkeys(
                key
                for shard in range(self.spec.shards)
                for key, _, _ in scan(self, shard, USER)
                if key.startswith(start)
            )
        )

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.keys())

    def __len__(self) -> int:
        """How many keys there are. Asks every shard."""
        return sum(self._stats(shard)["keys"] for shard in range(self.spec.shards))

    def __bool__(self) -> bool:
        return True  # else `if store:` would ask every shard, and be false for an empty store

    def clear(self) -> None:
        """Deletes every key that is there when it begins, and what failed puts left behind."""
        for key in self.keys():
            self.delete(key)
        self._parts.sweep()

    def info(self) -> StoreDetails:
        """Sizes, keys, and how each shard is reached. Asks every shard, and says of one that is lost why.

        Asks the broker too, when the store is a cache (on_reclaim="drop"), how many keys were dropped.
        """
        shards = [self._shard_details(shard) for shard in range(self.spec.shards)]
        return StoreDetails(
            name=self.spec.name,
            tenant=self.spec.tenant,
            size=self.spec.size,
            used=sum(shard.used for shard in shards),
            keys=sum(shard.keys for shard in shards),
            persistent=self.spec.persistent,
            dropped=self._session.dropped(self.spec) if self.spec.on_reclaim == "drop" else 0,
            shards=shards,
            compression=self._compressor.stats if self._compressor else None,
        )

    def _shard_details(self, shard: int) -> ShardDetails:
        keeper = self.keepers[shard]
        stats: dict[str, int] = {}
        trouble = None
        try:
            stats = self._stats(shard)
        except ClosedError:
            raise
        except MemfaasError as error:
            trouble = str(error)
        if keeper.vacant is not None:
            stats, trouble = {}, keeper.vacant
        link = self._get_link(shard)
        reached = link is not None and trouble is None
        return ShardDetails(
            donor=keeper.place.donor,
            fabric=link.fabric if link is not None and reached else None,
            device=keeper.device if reached else None,
            fallback=keeper.fallback,
            trouble=trouble,
            epoch=keeper.place.epoch,
            size=self.spec.shard_size,
            used=stats.get("used", 0),
            keys=stats.get("keys", 0),
        )

    def close(self) -> None:
        """This session no longer uses the store; unless it is persistent, the last one to say so frees it.

        Links are closed as soon as no operation runs on them. Closing twice does nothing.
        """
        if not self._closed:
            self.shut()
            self._session.close_store(self)

    def shut(self) -> None:
        """The session is closed, and the store with it."""
        self._closed = True
        for shard in range(self.spec.shards):
            self._set_link(shard, None)

    def fabrics(self) -> dict[str, int]:
        """Shards by how they are reached now."""
        links = [self._get_link(shard) for shard in range(self.spec.shards) if self.keepers[shard].vacant is None]
        return dict(Counter(link.fabric for link in links if link is not None))

    # --- for file systems (memfaas.fs) -----------------------------------------------------------------

    def _room(self) -> tuple[int, int]:
        """How many bytes there are, and how many of them are free. Asks all shards."""
        info = self.info()
        return info.size, max(info.size - info.used, 0)

    def _drops(self) -> bool:
        """Whether what is in it may go when its memory is needed."""
        return self.spec.on_reclaim == "drop"

    # --- the rare paths of the native core ------------------------------------------------------------

    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        if self._closed:
            raise ClosedError(f"store {self.spec.name!r} is closed")
        self.keepers[shard].mend(reason, attempt)

    def _unpack(self, key: bytes, value: bytes, meta: bytes, flags: int) -> bytes:
        whole = b""

        def receive(length: int) -> memoryview:
            nonlocal whole
            whole, view = codec.fresh_bytes(length)
            return view

        found = self._resolve(key, _Entry(value, meta, flags), receive)
        if found.whole:
            return whole if len(whole) > 1 else bytes(found.value)
        return expand(found.value) if found.flags & FLAG_LZ4 else bytes(found.value)

    def _get_into_rare(self, key: bytes, buffer: Value) -> int:
        view = codec.view_writable(buffer)

        def receive(length: int) -> memoryview:
            if length > len(view):
                raise UsageError(f"the buffer has {len(view)} bytes, but the value has {length}")
            return view[:length]

        found = self._resolve(key, self._entry(key), receive)
        if found.whole:
            return len(found.value)
        value = expand(found.value) if found.flags & FLAG_LZ4 else found.value
        receive(len(value))[:] = value
        return len(value)

    def _put_rare(self, key: bytes, value: Value) -> None:
        payload, meta, flags = codec.flatten(value)
        if len(payload) > self.spec.size:
            raise ValueTooLarge(f"{len(payload)} bytes are more than store {self.spec.name!r} has ({self.spec.size})")
        try:
            self._store(key, payload, meta, flags)
        except StoreFull:
            self._check_memory(key)
            if not self._parts.make_room():
                raise
            self._store(key, payload, meta, flags)

    def _check_memory(self, key: bytes) -> None:
        """Raises StoreFull when the key's shard was dropped, and no donor has room for it now."""
        shard = self._shard_of(key, USER)
        vacant = self.keepers[shard].vacant
        if vacant is not None:
            raise StoreFull(f"key {key[:100]!r}: shard {shard} of store {self.spec.name!r} was dropped, and {vacant}")

    def _store(self, key: bytes, payload: memoryview, meta: bytes, flags: int) -> None:
        if len(payload) <= self.part_size and len(meta) <= MAX_META:
            packed, packing = self._compressor.shrink(key, payload) if self._compressor else (payload, 0)
            replaced = self._save(key, USER, packed, meta, flags | packing)
        else:
            replaced = self._store_parts(key, payload, meta, flags)
        if replaced is not None:
            self._forget(replaced)

    def _store_parts(self, key: bytes, payload: memoryview, meta: bytes, flags: int) -> bytes | None:
        long_meta = meta if len(meta) > MAX_META else b""
        manifest = self._parts.write(key, payload, long_meta, self.part_size)
        return self._save_manifest(key, manifest, b"" if long_meta else meta, flags)

    def _save_manifest(self, key: bytes, manifest: Manifest, meta: bytes, flags: int) -> bytes | None:
        try:
            return self._save(key, USER, manifest.pack(), meta, flags | FLAG_MANIFEST)
        except DeadlineExceeded:
            raise  # the manifest may have been stored after all: then the parts are needed
        except BaseException as error:
            self._parts.remove(manifest)
            if isinstance(error, StoreFull):
                self._check_memory(key)
            raise

    def _forget(self, manifest: bytes) -> None:
        now_or_later(lambda: self._parts.remove(Manifest.unpack(manifest)))

    # --- pieces of the above ----------------------------------------------------------------------

    def _entry(self, key: bytes) -> _Entry:
        found = self._load(key, USER)
        if found is None:
            raise KeyAbsent(f"store {self.spec.name!r} has no key {key[:100]!r}")
        return _Entry(*found)

    def _resolve(self, key: bytes, entry: _Entry, receive: Callable[[int], memoryview]) -> _Entry:
        """Follows a manifest to its parts. `receive` gives the memory for a value of some length.

        A part that is missing means that the value was just replaced, so the key is read again;
        when it still has the manifest whose part is missing, the part is lost.
        """
        missed = b""
        while entry.flags & FLAG_MANIFEST:
            check_may_wait()
            manifest = Manifest.unpack(bytes(entry.value))
            try:
                view = receive(manifest.length)
                self._parts.read_into(manifest, view)
                meta = self._parts.read_meta(manifest) if manifest.meta_length else entry.meta
                return _Entry(view, meta, entry.flags & ~FLAG_MANIFEST, whole=True)
            except PartMissing:
                if manifest.id == missed:
                    if self.spec.on_reclaim == "drop":
                        raise KeyAbsent(f"a part of {key[:100]!r} in store {self.spec.name!r} was dropped") from None
                    raise ValueLost(
                        f"a part of {key[:100]!r} in store {self.spec.name!r} is gone; put the value again"
                    ) from None
                missed = manifest.id
            entry = self._entry(key)
        return entry

    def _stats(self, shard: int) -> dict[str, int]:
        for attempt in itertools.count(1):
            link = self._get_link(shard)
            reason = NEED_CONNECTION
            try:
                if link is not None:
                    return link.stats()
            except LinkDown as down:
                reason = down.args[0]
            if reason not in _MENDABLE:
                raise DeadlineExceeded(f"shard {shard} of store {self.spec.name!r} did not answer in time")
            self._repair(shard, reason, attempt)
        raise AssertionError


def _read_full(file: BinaryIO, buffer: memoryview) -> int:
    """Fills the buffer as far as the file goes; a pipe gives little at a time."""
    got = 0
    while got < len(buffer) and (piece := file.read(len(buffer) - got)):
        buffer[got : got + len(piece)] = piece
        got += len(piece)
    return got


def _write_full(file: BinaryIO, data: Buffer) -> int:
    view = memoryview(data)
    written = 0
    while written < len(view):
        written += file.write(view[written:]) or 0
    return written
