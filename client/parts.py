"""Values too large for one block: parts, spread over all shards, and a manifest under the user's key.

Parts are written first; writing the manifest is the moment at which the value is there. Each put
has an id of its own, so the parts of two values never mix, and replaced or abandoned parts are
only wasted memory, which the next put that needs it sweeps up: parts without a manifest whose put
has given no sign of life for a while. The sign of life is the time in the id, and later a part of
its own. The clocks of the clients of one store must agree to within a minute.
"""

from __future__ import annotations

import logging
import secrets
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgpack

from memfaas._native import FLAG_LZ4, FLAG_MANIFEST, PART, USER
from memfaas.client.compress import expand
from memfaas.client.keeper import check_may_wait
from memfaas.errors import DeadlineExceeded, LeaseLost, MemfaasError, StoreFull, ValueCorrupt

if TYPE_CHECKING:
    from memfaas._native import StoreCore
    from memfaas.client.compress import Compressor

SIGN_EVERY_S = 20.0
SILENCE_LIMIT_S = 60.0
"""A put that finds its last sign of life older than this gives up."""
ORPHAN_AGE_S = 120.0
"""Parts without a manifest whose last sign of life is older than this will never get one."""

_META = 0xFFFFFFFF
"""Index of the part that holds a meta too long for the block."""
_SIGN = 0xFFFFFFFE
"""Index of the part that holds the time of the last sign of life."""
_PART_KEY = struct.Struct(">16sIH")
_MILLISECONDS = struct.Struct(">Q")

log = logging.getLogger(__name__)


class PartMissing(Exception):
    """The value was replaced or deleted under the reader, or its memory is gone."""


class Manifest(NamedTuple):
    length: int
    """Bytes of the value."""
    part_size: int
    id: bytes
    """When the put began, and a random number."""
    meta_length: int
    """Bytes of the meta, when it is a part as well; 0 when it is in the manifest's block."""
    signed: bool = False
    """The put was long, and left a part with its last sign of life."""

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(tuple(self))
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Manifest:
        """Raises ValueCorrupt."""
        try:
            manifest = cls(*msgpack.unpackb(data))
            sizes = (manifest.length, manifest.part_size, manifest.meta_length)
            if not all(type(n) is int and n >= 0 for n in sizes) or not manifest.part_size or len(manifest.id) != 16:
                raise ValueError
        except Exception as error:  # written by another process
            raise ValueCorrupt("a manifest makes no sense") from error
        return manifest

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Index, start and end of each part of the value."""
        for index, start in enumerate(range(0, self.length, self.part_size)):
            yield index, start, min(start + self.part_size, self.length)


def _now() -> bytes:
    return _MILLISECONDS.pack(time.time_ns() // 1_000_000)


def _age(stamp: bytes) -> float:
    """Seconds since then, by the clocks of the two nodes."""
    return time.time() - float(_MILLISECONDS.unpack(stamp[:8])[0]) / 1000


class Parts:
    """Writes, reads and removes the parts of one store's large values."""

    def __init__(self, core: StoreCore, shards: int, compressor: Compressor | None) -> None:
        self._core = core
        self._shards = shards
        self._compressor = compressor
        self._sweeping = threading.Lock()

    def _keys(self, identity: bytes, index: int) -> Iterator[bytes]:
        """The keys under which a part may lie, each in another shard, the first in turn.

        A salt makes a key fall into the shard that we want. So parts are spread evenly, and a
        shard that is full does not keep a value out of a store that has room.
        """
        first = (int.from_bytes(identity[8:]) + index) % self._shards
        salts: dict[int, bytes] = {}
        salt = 0
        for turn in range(self._shards):
            wanted = (first + turn) % self._shards
            while wanted not in salts:
                key = _PART_KEY.pack(identity, index, salt)
                salts.setdefault(self._core._shard_of(key, PART), key)
                salt += 1
            yield salts[wanted]

    # --- writing ------------------------------------------------------------------------------------

    def write(self, key: bytes, value: memoryview, meta: bytes, part_size: int) -> Manifest:
        """Stores a value's parts, and the meta too if there is one. When that fails, none stays.

        Raises StoreFull, DeadlineExceeded, LeaseLost and other errors of the links.
        """
        pieces = (value[start : start + part_size] for start in range(0, len(value), part_size))
        return self.write_stream(key, pieces, meta, part_size)

    def write_stream(self, key: bytes, pieces: Iterable[memoryview], meta: bytes, part_size: int) -> Manifest:
        """The same for a value that comes in pieces, all of `part_size` but the last."""
        manifest = Manifest(0, part_size, _now() + secrets.token_bytes(8), len(meta))
        signed = time.monotonic()
        swept = False
        try:
            for index, piece in enumerate(pieces):
                now = time.monotonic()
                if now > signed + SILENCE_LIMIT_S:
                    raise DeadlineExceeded(
                        f"key {_shown(key)}: a part of the value took more than {SILENCE_LIMIT_S:g} s"
                    )
                if now > signed + SIGN_EVERY_S:
                    self._write_part(key, manifest.id, _SIGN, memoryview(_now()))
                    manifest = manifest._replace(signed=True)
                    signed = now
                manifest = manifest._replace(length=manifest.length + len(piece))
                try:
                    self._write_part(key, manifest.id, index, piece)
                except StoreFull:
                    if swept or not self.make_room(sparing=manifest.id):
                        raise
                    swept = True
                    self._write_part(key, manifest.id, index, piece)
            if meta:
                self._write_part(key, manifest.id, _META, memoryview(meta))
            if time.monotonic() > signed + SILENCE_LIMIT_S:
                raise DeadlineExceeded(f"key {_shown(key)}: a part of the value took more than {SILENCE_LIMIT_S:g} s")
        except BaseException:
            self.remove(manifest)
            raise
        return manifest

    def _write_part(self, key: bytes, identity: bytes, index: int, part: memoryview) -> None:
        payload, flags = self._compressor.shrink(key, part) if self._compressor else (part, 0)
        full: StoreFull | None = None
        for part_key in self._keys(identity, index):
            try:
                self._core._save(part_key, PART, payload, b"", flags)
                return
            except StoreFull as error:
                full = error
        raise StoreFull(
            f"key {_shown(key)}: no shard of the store has room for a part of {len(part)} bytes; "
            "delete keys, or make a larger store"
        ) from full

    # --- reading ------------------------------------------------------------------------------------

    def read_into(self, manifest: Manifest, into: memoryview) -> None:
        """Fills `into`, which has the value's length. Raises PartMissing, ValueCorrupt."""
        for index, start, end in manifest.pieces():
            self._read_part(manifest.id, index, into[start:end])

    def read_pieces(self, manifest: Manifest, buffer: memoryview) -> Iterator[memoryview]:
        """The value part by part, each in the same buffer. Raises PartMissing, ValueCorrupt."""
        for index, start, end in manifest.pieces():
            self._read_part(manifest.id, index, buffer[: end - start])
            yield buffer[: end - start]

    def read_meta(self, manifest: Manifest) -> bytes:
        meta = bytearray(manifest.meta_length)
        self._read_part(manifest.id, _META, memoryview(meta))
        return bytes(meta)

    def _read_part(self, identity: bytes, index: int, into: memoryview) -> None:
        for part_key in self._keys(identity, index):
            found = self._core._load_into(part_key, PART, into)
            if found is not None:
                break
        else:
            raise PartMissing
        length, _, flags = found
        if flags & FLAG_LZ4:
            part = expand(into[:length])
            length = len(part)
            if length == len(into):
                into[:] = part
        if length != len(into):
            raise ValueCorrupt(f"part {index} of a value has {length} bytes, not {len(into)}")

    # --- removing -----------------------------------------------------------------------------------

    def remove(self, manifest: Manifest) -> None:
        """Gives the parts' memory back. What can't be removed now is left to the sweep.

        A shard that is lost does not keep the parts in the others, which no sweep could tell from needed ones.
        """
        indices = [index for index, _, _ in manifest.pieces()]
        extra = [_META] * bool(manifest.meta_length) + [_SIGN] * manifest.signed
        lost: set[int] = set()
        try:
            for index in indices + extra:
                self._remove_part(manifest.id, index, lost)
        except MemfaasError as error:
            log.info("parts of a replaced or abandoned value stay for now: %s", error)

    def _remove_part(self, identity: bytes, index: int, lost: set[int]) -> None:
        """`lost`: shards not to look in again; those that are found lost are added."""
        for part_key in self._keys(identity, index):
            shard = self._core._shard_of(part_key, PART)
            if shard in lost:
                continue
            try:
                if self._core._remove(part_key, PART)[0]:
                    return
            except LeaseLost:
                lost.add(shard)

    def make_room(self, sparing: bytes = b"") -> bool:
        """Sweeps. Whether memory came free."""
        check_may_wait()
        with self._sweeping:
            try:
                return self.sweep(sparing) > 0
            except MemfaasError:
                return False  # a shard is out of reach, so nobody knows which parts are needed

    def sweep(self, sparing: bytes = b"") -> int:
        """Removes the parts that no manifest names and none will. Returns how many.

        `sparing`: identity of a put that is known to live, whatever the clocks say.

        All parts are listed before any manifest, so a part whose manifest came meanwhile is spared.
        """
        orphans: dict[bytes, list[bytes]] = {}
        for shard in range(self._shards):
            for part_key, _, _ in scan(self._core, shard, PART):
                if len(part_key) == _PART_KEY.size and _age(part_key) > ORPHAN_AGE_S:
                    orphans.setdefault(part_key[:16], []).append(part_key)
        orphans.pop(sparing, None)
        if not orphans:
            return 0
        for shard in range(self._shards):
            for key, flags, _ in scan(self._core, shard, USER):
                if flags & FLAG_MANIFEST:
                    found = self._core._load(key, USER)
                    if found is not None and found[2] & FLAG_MANIFEST:
                        orphans.pop(Manifest.unpack(found[0]).id, None)
        removed = 0
        for part_keys in orphans.values():
            if not any(self._is_alive(part_key) for part_key in part_keys):
                removed += sum(self._core._remove(part_key, PART)[0] for part_key in part_keys)
        if removed:
            log.info("swept up %d parts that puts which failed had left", removed)
        return removed

    def _is_alive(self, part_key: bytes) -> bool:
        """Whether this is a sign of life, and a fresh one."""
        if _PART_KEY.unpack(part_key)[1] != _SIGN:
            return False
        found = self._core._load(part_key, PART)
        return found is not None and len(found[0]) == _MILLISECONDS.size and _age(found[0]) <= ORPHAN_AGE_S


def scan(core: StoreCore, shard: int, space: int) -> Iterator[tuple[bytes, int, int]]:
    """Key, flags and stored length of all that is in a shard; a key may come more than once."""
    cursor = 0
    while True:
        cursor, batch = core._scan(shard, cursor, space)
        yield from batch
        if cursor == 0:
            return


def _shown(key: bytes) -> str:
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(key)} long)"
