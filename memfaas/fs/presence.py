"""Which chunks of a file there may be: so deleting and cutting a file, and finding its holes, take as long as it has
data, however far apart that lies.

A chunk is in the store only if its bit is set; a bit without a chunk does no harm. The bits of the first chunks lie in
the inode. Those of all others lie in a tree of nodes: a leaf has a bit for each chunk, and a node above has one for
each node below it. The first node of each level has none, and counts as there: so a tree may become higher at any
time, and a file of less than 256 MiB has but one leaf. Bits are set from the top, before the data is stored.

Another mount that has seen a bit set may store the chunk at any time. So bits are taken back only by a mount that is
alone, in a transaction with the list of mounts; otherwise they stay until the file is deleted.

Of a node whose memory is lost, all bits count as set: then it takes longer to find what there is, but all is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from memfaas.errors import CapacityError, LeaseLost
from memfaas.fs.cells import Cells, Change
from memfaas.fs.records import Inode, bits_key

LOW = 64
"""So many chunks have their bits in the inode."""
_WIDTH_BITS = 12
_WIDTH = 1 << _WIDTH_BITS
_LOST = -1
"""The bits of a node whose memory is lost: all are set."""
_SEARCHED = 1
"""Up to this level all nodes below one that is lost are searched."""
_MARK = b"B"
"""First byte of a node: no value of a cell may begin as a claim does."""


def low_bits(start: int, end: int) -> int:
    """Of the chunks of a range that have their bits in the inode."""
    return _bits(min(start, LOW), min(end, LOW))


def levels(chunks: int) -> int:
    """How many levels lead to all of so many chunks."""
    return 0 if chunks <= LOW else (max(chunks - 1, 1).bit_length() - 1) // _WIDTH_BITS + 1


def _bits(start: int, end: int) -> int:
    return (1 << end) - (1 << start) if end > start else 0


def _ones(bits: int) -> Iterator[int]:
    """Which bits are set."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _unpacked(value: bytes | None) -> int:
    return 0 if value is None else int.from_bytes(memoryview(value)[1:], "little")


def _packed(bits: int) -> bytes | None:
    return _MARK + bits.to_bytes((bits.bit_length() + 7) // 8, "little") if bits else None


class Presence:
    def __init__(self, cells: Cells, alone: Callable[[], Change | None]) -> None:
        """alone: the list of mounts, as it has to stay, when it has none but this one."""
        self._cells = cells
        self._alone = alone

    # --- setting bits -----------------------------------------------------------------------------------

    def mark(self, ino: int, indices: Iterable[int]) -> None:
        """Chunks, in order, beyond those of the inode are going to be stored. It says how many levels there are."""
        for leaf, some in groupby(indices, lambda index: index >> _WIDTH_BITS):
            wanted = 0
            for index in some:
                wanted |= 1 << (index & (_WIDTH - 1))
            bits = self._node(ino, 0, leaf)
            if wanted & ~bits or bits == _LOST:
                for level, node, bit in reversed(list(self._above(leaf))):
                    if not self._node(ino, level, node) >> bit & 1:
                        self._set(bits_key(ino, level, node), 1 << bit)
                if bits != _LOST:
                    self._set(bits_key(ino, 0, leaf), wanted)

    @staticmethod
    def _above(leaf: int) -> Iterator[tuple[int, int, int]]:
        """The bits that lead to a leaf: level, number of the node, and which."""
        level = 1
        while leaf:
            yield level, leaf >> _WIDTH_BITS, leaf & (_WIDTH - 1)
            leaf >>= _WIDTH_BITS
            level += 1

    def _node(self, ino: int, level: int, node: int) -> int:
        """Its bits."""
        try:
            return _unpacked(self._cells.read(bits_key(ino, level, node)))
        except LeaseLost:
            if level > _SEARCHED:
                raise
            return _LOST

    def _set(self, key: bytes, bits: int) -> None:
        self._cells.update(key, lambda old: _packed(_unpacked(old) | bits))

    # --- finding chunks ---------------------------------------------------------------------------------

    def present(self, ino: int, inode: Inode, start: int = 0, end: int = 1 << 63) -> Iterator[int]:
        """The chunks, or those of a range, that may be there, in order."""
        for base, bits in self._found(ino, inode, start, end):
            for bit in _ones(bits):
                yield base + bit

    def count(self, ino: int, inode: Inode, start: int, end: int) -> int:
        """How many chunks of a range may be there."""
        return sum(bits.bit_count() for _, bits in self._found(ino, inode, start, end))

    def missing(self, ino: int, inode: Inode, indices: Iterable[int]) -> Iterator[int]:
        """Which of some chunks, in order, are not there."""
        for leaf, some in groupby(indices, lambda index: index >> _WIDTH_BITS):
            bits = self._node(ino, 0, leaf) if inode.levels else 0
            if leaf == 0:
                bits = bits & ~_bits(0, LOW) | inode.low
            for index in some:
                if not bits >> (index & (_WIDTH - 1)) & 1:
                    yield index

    def _found(self, ino: int, inode: Inode, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The bits of a range that are set: from which chunk on, and which."""
        low = inode.low & low_bits(start, end)
        if low:
            yield 0, low
        if end > LOW and inode.levels:
            yield from self._below(ino, inode.levels - 1, 0, max(start, LOW), end)

    def _below(self, ino: int, level: int, node: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        shift = level * _WIDTH_BITS
        base = node << (shift + _WIDTH_BITS)
        bits = self._node(ino, level, node)
        if level and node == 0:
            bits |= 1
        bits &= _bits(max(start - base, 0) >> shift, min(((end - 1 - base) >> shift) + 1, _WIDTH))
        if level == 0:
            yield base, bits
            return
        for bit in _ones(bits):
            yield from self._below(ino, level - 1, node * _WIDTH + bit, start, end)

    # --- taking bits back -------------------------------------------------------------------------------

    @property
    def is_alone(self) -> bool:
        return self._alone() is not None

    def clear(self, ino: int, indices: Iterable[int]) -> None:
        """Chunks, in order, beyond those of the inode were removed: if this mount is alone, their bits go, too."""
        for leaf, some in groupby(indices, lambda index: index >> _WIDTH_BITS):
            gone = 0
            for index in some:
                gone |= 1 << (index & (_WIDTH - 1))
            try:
                cell = self._cells.load(bits_key(ino, 0, leaf))
            except LeaseLost:
                continue
            if cell.value is not None and not self.commit(Change(cell, _packed(_unpacked(cell.value) & ~gone))):
                return

    def commit(self, change: Change) -> bool:
        """A change that takes bits back. Not done, and that does no harm: somebody else is there, or no room."""
        alone = self._alone()
        try:
            return alone is not None and self._cells.commit([alone, change])
        except CapacityError:
            return False

    def discard(self, ino: int, inode: Inode) -> None:
        """Takes all nodes of a file away, from below: who is killed meanwhile leaves what is still to be found."""
        if inode.levels:
            self._discard(ino, inode.levels - 1, 0)

    def _discard(self, ino: int, level: int, node: int) -> None:
        if level:
            for bit in _ones((self._node(ino, level, node) | (node == 0)) & _bits(0, _WIDTH)):
                self._discard(ino, level - 1, node * _WIDTH + bit)
        try:
            self._cells.update(bits_key(ino, level, node), lambda _: None)
        except LeaseLost:
            pass  # it is gone already
