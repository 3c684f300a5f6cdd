"""Directories: a trie of cells for each, by the hash of the names.

A *leaf* is b"L" and its entries, each `/name NUL inode-in-hex type`. Names hold neither `/` nor NUL, so an entry is
found, put in, taken out and listed by one operation on bytes. A leaf that grows above a limit becomes a *branch*,
b"B", with 16 leaves below it, in one transaction. A branch becomes a leaf again only when its directory is taken
away, so everybody may remember it, and looks again from the root when there is nothing below it: in a directory of any
size a name is looked up with one get, and changed with one conditional put. Mounts that change one large directory
seldom meet in one leaf, and when they do, one of them does its part again.
"""

from __future__ import annotations

import errno
import stat
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from memfaas.fs.cells import Cell, Cells, Change
from memfaas.fs.errors import fail
from memfaas.fs.records import NAME_MAX, number

EMPTY = b"L"
_BRANCH = b"B"
_LIMIT = 6 << 10
"""Bytes of a leaf: it is copied with each change, and a transaction holds it twice."""
_DEEPEST = 8
"""The hash has so many digits."""
_LOOKS = 1000
"""How often a node is looked for that another mount puts elsewhere meanwhile."""
_REMEMBERED = 1 << 16
_NIBBLES = [bytes([digit]) for digit in range(16)]
_TAIL = 17


class Entry(NamedTuple):
    name: bytes
    ino: int
    type: int
    """As `stat.S_IFMT` of its mode. It never changes."""


def check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise fail(errno.ENAMETOOLONG, name)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise fail(errno.EINVAL, name)


def root_key(ino: int) -> bytes:
    return b"d" + number(ino)


class Leaf(NamedTuple):
    """Where a name is or would be."""

    cell: Cell
    entries: bytes
    depth: int

    def find(self, name: bytes) -> Entry | None:
        at = self.entries.find(b"/" + name + b"\0")
        if at < 0:
            return None
        at += len(name) + 2
        return Entry(name, int(self.entries[at : at + 16], 16), int(self.entries[at + 16 : at + 17], 16) << 12)

    def added(self, name: bytes, ino: int, mode: int) -> Leaf:
        """With one more entry, whose name must not be there."""
        return self._replace(entries=b"%b/%b\0%016x%x" % (self.entries, name, ino, stat.S_IFMT(mode) >> 12))

    def removed(self, name: bytes) -> Leaf:
        """Without an entry that must be there."""
        entry = b"/" + name + b"\0"
        at = self.entries.index(entry)
        return self._replace(entries=self.entries[:at] + self.entries[at + len(entry) + _TAIL :])

    def change(self) -> Change:
        return Change(self.cell, self.entries)

    @property
    def is_full(self) -> bool:
        return len(self.entries) > _LIMIT and self.depth < _DEEPEST


def _entries(leaf: bytes) -> Iterator[Entry]:
    for text in leaf.split(b"/")[1:]:
        yield Entry(text[: -_TAIL - 1], int(text[-_TAIL:-1], 16), int(text[-1:], 16) << 12)


class Directories:
    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._branches: set[bytes] = set()

    def _path(self, ino: int, name: bytes) -> tuple[bytes, int, int]:
        """The deepest node that may be the name's leaf, as far as is remembered; its depth; the digits left."""
        key = root_key(ino)
        left = zlib.crc32(name)
        depth = 0
        while key in self._branches:
            key += _NIBBLES[left & 15]
            left >>= 4
            depth += 1
        return key, depth, left

    def _note_branch(self, key: bytes) -> None:
        if len(self._branches) >= _REMEMBERED:
            self._branches.clear()
        self._branches.add(key)

    def _gone(self, ino: int, name: bytes, key: bytes) -> None:
        """There is no such node. ENOENT when it is the root, and so the directory is gone."""
        root = root_key(ino)
        if key == root:
            raise fail(errno.ENOENT, name)
        for end in range(len(root), len(key)):
            self._branches.discard(key[:end])

    def find(self, ino: int, name: bytes) -> Entry | None:
        """ENOENT when the directory is gone. EIO when a node of it is."""
        for _ in range(_LOOKS):
            key, depth, _ = self._path(ino, name)
            value = self._cells.read(key)
            if value is None:
                self._gone(ino, name, key)
                continue
            if value != _BRANCH:
                return Leaf(Cell(key, value, b""), value, depth).find(name)
            self._note_branch(key)
        raise fail(errno.EIO, name)

    def leaf(self, ino: int, name: bytes) -> Leaf:
        """To be changed. ENOENT when the directory is gone. EIO when a node of it is."""
        for _ in range(_LOOKS):
            key, depth, _ = self._path(ino, name)
            cell = self._cells.load(key)
            if cell.value is None:
                self._gone(ino, name, key)
                continue
            if cell.value != _BRANCH:
                return Leaf(cell, cell.value, depth)
            self._note_branch(key)
        raise fail(errno.EIO, name)

    def roomy_leaf(self, ino: int, name: bytes) -> Leaf:
        """The same with room for one more entry."""
        while True:
            leaf = self.leaf(ino, name)
            if not leaf.is_full:
                return leaf
            self._split(leaf)

    def _split(self, leaf: Leaf) -> None:
        parts: list[list[bytes]] = [[] for _ in _NIBBLES]
        for text in leaf.entries.split(b"/")[1:]:
            digit = (zlib.crc32(text[: -_TAIL - 1]) >> (4 * leaf.depth)) & 15
            parts[digit].append(b"/" + text)
        changes = [Change(leaf.cell, _BRANCH)]
        for nibble, texts in zip(_NIBBLES, parts, strict=True):
            changes.append(Change(Cell(leaf.cell.key + nibble, None, b""), EMPTY + b"".join(texts)))
        if self._cells.commit(changes):
            self._note_branch(leaf.cell.key)

    def _nodes(self, ino: int) -> Iterator[tuple[bytes, bytes]]:
        """All leaves, read without waiting."""
        level = [root_key(ino)]
        while level:
            below: list[bytes] = []
            for key, value in zip(level, self._cells.read_many(level), strict=True):
                if value == _BRANCH:
                    self._note_branch(key)
                    below.extend(key + nibble for nibble in _NIBBLES)
                elif value is not None:
                    yield key, value
            level = below

    def entries(self, ino: int) -> list[Entry]:
        """All entries. One that comes or goes meanwhile is there or not; all others are, once."""
        return [entry for _, leaf in self._nodes(ino) for entry in _entries(leaf)]

    def is_empty(self, ino: int) -> bool:
        return all(value == EMPTY for _, value in self._nodes(ino))

    def removal(self, ino: int) -> Change:
        """The change that takes an empty directory away. ENOTEMPTY; ENOENT when it is gone; EBUSY when others change
        it again and again."""
        if not self.is_empty(ino):
            raise fail(errno.ENOTEMPTY)
        while True:
            self._fold(root_key(ino))
            cell = self._cells.load(root_key(ino))
            if cell.value is None:
                raise fail(errno.ENOENT)
            if cell.value == EMPTY:
                return Change(cell, None)
            if cell.value != _BRANCH:
                raise fail(errno.ENOTEMPTY)

    def _fold(self, key: bytes) -> None:
        """Makes an empty branch a leaf again. ENOTEMPTY.

        One step at a time: whoever changes the directory meanwhile is only met in a few cells, and not in all of a
        directory that was large once.
        """
        below = [key + nibble for nibble in _NIBBLES]
        for _ in range(_LOOKS):
            branch = self._cells.load(key)
            if branch.value != _BRANCH:
                return
            for one in below:
                self._fold(one)
            leaves = [self._cells.load(one) for one in below]
            if any(leaf.value not in (EMPTY, _BRANCH, None) for leaf in leaves):
                raise fail(errno.ENOTEMPTY)
            if all(leaf.value == EMPTY for leaf in leaves) and self._cells.commit(
                [Change(branch, EMPTY), *(Change(leaf, None) for leaf in leaves)]
            ):
                self._branches.discard(key)
        raise fail(errno.EBUSY)

    def create(self, ino: int) -> None:
        """The node of a new directory, which nobody knows yet."""
        if not self._cells.swap(Cell(root_key(ino), None, b""), EMPTY):
            raise fail(errno.EIO)

    def forget(self, ino: int) -> None:
        """Takes away the node of a directory that nobody got to know."""
        self._cells.swap(self._cells.load(root_key(ino)), None)
