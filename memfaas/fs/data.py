"""The data of files: chunks, each a value of its own. One that is absent is a hole, and one that is short ends in
zeros.

What lies in a chunk beyond the end of its file is never shown: whoever makes a file shorter takes it away, and
whoever makes it longer has its new size in the inode before the data.
"""

from __future__ import annotations

from collections.abc import Iterator

from memfaas.errors import LeaseLost
from memfaas.fs.cells import Cell, Cells, KeyValue
from memfaas.fs.records import chunk_key

_SPACE = 0
_PIECE = 128
"""What a piece of what was written costs beside its bytes, about."""


class Dirty:
    """What was written of a chunk, and is not yet in the store: pieces in order, with gaps in between."""

    __slots__ = ("bytes", "pieces")

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = []
        self.bytes = 0

    def write(self, start: int, piece: memoryview | bytes) -> None:
        if self.pieces:
            last, data = self.pieces[-1]
            end = last + len(data)
            if start == end:  # as most programs write
                data += piece
                self.bytes += len(piece)
                return
            if start < end:
                self._write_over(start, piece)
                return
        self.pieces.append((start, bytearray(piece)))
        self.bytes += len(piece)

    def _write_over(self, start: int, piece: memoryview | bytes) -> None:
        end = start + len(piece)
        before = [one for one in self.pieces if one[0] + len(one[1]) < start]
        after = [one for one in self.pieces if one[0] > end]
        met = self.pieces[len(before) : len(self.pieces) - len(after)]
        joined = bytearray(piece)
        if met:
            first, data = met[0]
            if first < start:
                joined[:0] = memoryview(data)[: start - first]
                start = first
            last, data = met[-1]
            if last + len(data) > end:
                joined += memoryview(data)[end - last :]
        self.pieces = [*before, (start, joined), *after]
        self.bytes = sum(len(data) for _, data in self.pieces)

    def cut(self, end: int) -> None:
        """What was written from there on is gone."""
        self.pieces = [(start, data[: end - start]) for start, data in self.pieces if start < end]
        self.bytes = sum(len(data) for _, data in self.pieces)

    def lay_over(self, into: memoryview, start: int) -> None:
        """What was written of the part of the chunk that begins at `start`, over what is in `into`."""
        end = start + len(into)
        for first, data in self.pieces:
            low, high = max(first, start), min(first + len(data), end)
            if low < high:
                into[low - start : high - start] = memoryview(data)[low - first : high - first]

    @property
    def start(self) -> int:
        return self.pieces[0][0]

    @property
    def end(self) -> int:
        last, data = self.pieces[-1]
        return last + len(data)

    @property
    def cost(self) -> int:
        """Bytes of memory, about."""
        return self.bytes + _PIECE * len(self.pieces)

    def whole(self, size: int) -> bytearray | None:
        """The chunk, if all of it was written."""
        return self.pieces[0][1] if self.bytes == size else None


class Data:
    def __init__(self, store: KeyValue, cells: Cells, chunk: int) -> None:
        self._store = store
        self._cells = cells
        self.chunk = chunk
        self.is_remote = False
        """Chunks are better asked for together."""

    def look_where_it_is(self) -> None:
        """Memory of this node is mapped, unless the session was told otherwise; its leases may move."""
        self.is_remote = any(fabric != "shm" for fabric in self._store.fabrics())

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The chunks of a range: index, and from where to where in it."""
        size = self.chunk
        for index in range(start // size, -(-end // size)):
            base = index * size
            yield index, max(start - base, 0), min(end - base, size)

    def read(self, ino: int, offset: int, into: memoryview) -> None:
        """Fills `into`, which is all zero. The caller sees to the end of the file."""
        pieces = list(self.pieces(offset, offset + len(into)))
        found: list[bytes | None] = []
        if self.is_remote and len(pieces) > 1:
            found = self._store.get_many([chunk_key(ino, index) for index, _, _ in pieces])
        at = 0
        for number, (index, low, high) in enumerate(pieces):
            part = into[at : at + high - low]
            at += high - low
            if not found:
                self.read_chunk(ino, index, low, part)
            elif (value := found[number]) is not None:
                piece = memoryview(value)[low:high]
                part[: len(piece)] = piece

    def read_chunk(self, ino: int, index: int, low: int, into: memoryview) -> None:
        if len(into) == self.chunk:
            self._store._load_into(chunk_key(ino, index), _SPACE, into)
            return
        found = self._store._load(chunk_key(ino, index), _SPACE)
        if found is not None:
            piece = memoryview(found[0])[low : low + len(into)]
            into[: len(piece)] = piece

    def read_small(self, ino: int, index: int, low: int, high: int) -> bytes:
        """A part of one chunk, as it is stored: perhaps shorter."""
        found = self._store._load(chunk_key(ino, index), _SPACE)
        return b"" if found is None else found[0][low:high]

    def put(self, ino: int, index: int, data: memoryview | bytes | bytearray) -> None:
        """A whole chunk, in place of whatever is there."""
        self._store._save(chunk_key(ino, index), _SPACE, data, self._cells.fresh_tag(), 0)

    def merge(self, ino: int, index: int, dirty: Dirty) -> None:
        """The ranges that were written, into what is there. Others that do so at once lose nothing."""
        whole = dirty.whole(self.chunk)
        if whole is not None:
            self.put(ino, index, whole)
            return
        key = chunk_key(ino, index)
        while dirty.pieces:
            found = self._store._load(key, _SPACE)
            cell = Cell(key, None, b"") if found is None else Cell(key, found[0], found[1])
            value = bytearray(cell.value or b"")
            for start, data in dirty.pieces:
                if len(value) < start:
                    value.extend(bytes(start - len(value)))
                value[start : start + len(data)] = data
            if self._store._save_if(key, _SPACE, value, self._cells.fresh_tag(), 0, cell.tag):
                return

    def tag(self, ino: int, index: int) -> tuple[bytes, bytes] | None:
        """What is in a chunk, and its tag; None when there is nothing, or its memory is lost."""
        try:
            found = self._store._load(chunk_key(ino, index), _SPACE)
        except LeaseLost:
            return None
        return None if found is None else found[:2]

    def remove_if(self, ino: int, index: int, tag: bytes) -> bool:
        """Takes a chunk away, unless it is another one than that of the tag."""
        return self._store._remove_if(chunk_key(ino, index), _SPACE, tag)

    def shorten_if(self, ino: int, index: int, value: bytes, tag: bytes) -> bool:
        return self._store._save_if(chunk_key(ino, index), _SPACE, value, self._cells.fresh_tag(), 0, tag)

    def remove(self, ino: int, index: int) -> None:
        try:
            self._store._remove(chunk_key(ino, index), _SPACE)
        except LeaseLost:
            pass  # it is gone already

    def zero(self, ino: int, index: int, low: int, high: int) -> None:
        """Makes a part of a chunk zeros, if there is any data in it."""
        found = self.tag(ino, index)
        if found is not None and len(found[0]) > low:
            zeros = Dirty()
            zeros.write(low, bytes(min(high, len(found[0])) - low))
            self.merge(ino, index, zeros)

    def free_bytes(self) -> int:
        """How much room the store has. Asks all shards."""
        return self._store._room()[1]
