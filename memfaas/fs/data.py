"""The data of files: chunks, each a value of its own. One that is absent is a hole, and one that is short ends in
zeros.

What lies in a chunk beyond the end of its file is never shown: whoever makes a file shorter takes it away, and
whoever makes it longer has its new size in the inode before the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memfaas.fs.cells import Cell, Cells, KeyValue
from memfaas.fs.records import chunk_key

_SPACE = 0


class Dirty:
    """A chunk of which some was written, and is not yet in the store."""

    __slots__ = ("data", "ranges")

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.ranges: list[tuple[int, int]] = []
        """What was written: in order, with gaps in between."""

    def write(self, start: int, piece: memoryview | bytes) -> None:
        end = start + len(piece)
        self.data[start:end] = piece
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], end)
            return
        merged: list[tuple[int, int]] = []
        for low, high in self.ranges:
            if high < start or low > end:
                merged.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        merged.append((start, end))
        self.ranges = sorted(merged)

    def cut(self, end: int) -> None:
        """What was written from there on is gone."""
        self.ranges = [(low, min(high, end)) for low, high in self.ranges if low < end]

    def lay_over(self, into: memoryview, start: int) -> None:
        """What was written of the part of the chunk that begins at `start`, over what is in `into`."""
        end = start + len(into)
        for low, high in self.ranges:
            low, high = max(low, start), min(high, end)
            if low < high:
                into[low - start : high - start] = memoryview(self.data)[low:high]

    @property
    def is_whole(self) -> bool:
        return self.ranges == [(0, len(self.data))]


class Data:
    def __init__(self, store: KeyValue, cells: Cells, chunk: int) -> None:
        self._store = store
        self._cells = cells
        self.chunk = chunk

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The chunks of a range: index, and from where to where in it."""
        size = self.chunk
        for index in range(start // size, -(-end // size)):
            base = index * size
            yield index, max(start - base, 0), min(end - base, size)

    def read(self, ino: int, offset: int, into: memoryview) -> None:
        """Fills `into`, which is all zero. The caller sees to the end of the file."""
        at = 0
        for index, low, high in self.pieces(offset, offset + len(into)):
            self.read_chunk(ino, index, low, into[at : at + high - low])
            at += high - low

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
        if dirty.is_whole:
            self.put(ino, index, dirty.data)
            return
        key = chunk_key(ino, index)
        while dirty.ranges:
            found = self._store._load(key, _SPACE)
            cell = Cell(key, None, b"") if found is None else Cell(key, found[0], found[1])
            value = bytearray(cell.value or b"")
            for low, high in dirty.ranges:
                if len(value) < high:
                    value.extend(bytes(high - len(value)))
                value[low:high] = memoryview(dirty.data)[low:high]
            if self._store._save_if(key, _SPACE, value, self._cells.fresh_tag(), 0, cell.tag):
                return

    def _shorten(self, ino: int, index: int, end: int) -> None:
        key = chunk_key(ino, index)
        while True:
            found = self._store._load(key, _SPACE)
            if found is None or len(found[0]) <= end:
                return
            if self._store._save_if(key, _SPACE, found[0][:end], self._cells.fresh_tag(), 0, found[1]):
                return

    def remove(self, ino: int, indices: Iterable[int]) -> None:
        for index in indices:
            self._store._remove(chunk_key(ino, index), _SPACE)

    def cut(self, ino: int, size: int, top: int) -> None:
        """Takes away what is in chunks beyond `size`, up to `top`."""
        chunk = self.chunk
        if size % chunk:
            self._shorten(ino, size // chunk, size % chunk)
        self.remove(ino, range(-(-size // chunk), -(-top // chunk)))

    def clear(self, ino: int, start: int, end: int) -> None:
        """Makes a hole."""
        for index, low, high in self.pieces(start, end):
            if high - low == self.chunk:
                self.remove(ino, (index,))
            else:
                zeros = Dirty(self.chunk)
                zeros.write(low, bytes(high - low))
                if self._store._load(chunk_key(ino, index), _SPACE) is not None:
                    self.merge(ino, index, zeros)

    def reserve(self, ino: int, start: int, end: int) -> None:
        """Stores zeros where there is nothing, so that there is room for what will be written."""
        zeros = bytes(self.chunk)
        for index, _, _ in self.pieces(start, end):
            key = chunk_key(ino, index)
            while True:
                found = self._store._load(key, _SPACE)
                if found is not None and len(found[0]) == self.chunk:
                    break
                value = zeros if found is None else found[0] + zeros[len(found[0]) :]
                tag = b"" if found is None else found[1]
                if self._store._save_if(key, _SPACE, value, self._cells.fresh_tag(), 0, tag):
                    break
