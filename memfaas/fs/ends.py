"""Where files end, and what lies beyond; holes; and the end of a file as a whole.

A file becomes shorter in three steps: its inode gets the new size, and so says that there is a *tail*, data beyond the
end (`top` is more than the size); the tail is taken away; the inode says that there is none. Who is killed on the
way leaves a tail, and nobody makes the file longer before that is gone: whoever wants to takes it away himself.

So several may do that at once, and one that is slow must not take away what was written after another had finished.
It removes a chunk only if that is still what it saw while there was a tail: whose data it was is known then.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator

from memfaas.errors import CapacityError
from memfaas.fs.cells import Cells, Change
from memfaas.fs.data import Data
from memfaas.fs.errors import fail
from memfaas.fs.presence import LOW, Presence, low_bits
from memfaas.fs.records import Inode, drop_privileges, inode_key

_AT_ONCE = 64
"""Chunks that are looked at before the inode is asked whether they are still a tail."""

log = logging.getLogger(__name__)


class _Tail(Exception):
    """There is data beyond the end: that has to go first."""


def check_tail(inode: Inode, end: int) -> None:
    """For what Ends.change does: before it makes a file longer, up to `end`."""
    if end > inode.size and inode.top > inode.size:
        raise _Tail


class Ends:
    def __init__(self, cells: Cells, data: Data, presence: Presence) -> None:
        self._cells = cells
        self._data = data
        self._presence = presence

    def inode(self, ino: int) -> Inode | None:
        """As it is in the store."""
        value = self._cells.read(inode_key(ino))
        return None if value is None else Inode.unpack(value)

    def change(self, ino: int, change: Callable[[Inode], None]) -> Inode:
        """Changes an inode in place, and its version, perhaps after several tries. ESTALE."""
        inode: Inode | None = None

        def apply(old: bytes | None) -> bytes:
            nonlocal inode
            if old is None:
                raise fail(errno.ESTALE)
            inode = Inode.unpack(old)
            change(inode)
            inode.version += 1
            return inode.pack()

        while True:
            try:
                self._cells.update(inode_key(ino), apply)
            except _Tail:
                self.clean_tail(ino)
            else:
                assert inode is not None
                return inode

    # --- making files shorter and longer ------------------------------------------------------------------

    def truncate(self, ino: int, size: int, now: int) -> None:
        """ESTALE, ENOSPC (nothing was changed)."""

        def apply(inode: Inode) -> None:
            check_tail(inode, size)
            if size < inode.top:
                inode.cuts += 1
            inode.size = size
            inode.mtime = inode.ctime = now
            drop_privileges(inode)

        self.change(ino, apply)
        self._clean_now_or_later(ino)

    def shrink(self, ino: int, size: int, wanted: int) -> bool:
        """Makes a file shorter only if it has this size: else somebody else made it longer meanwhile."""
        done = False

        def apply(inode: Inode) -> None:
            nonlocal done
            done = inode.size == size
            if done:
                inode.size = wanted
                inode.cuts += wanted < inode.top

        self.change(ino, apply)
        if done:
            self._clean_now_or_later(ino)
        return done

    def came_late(self, ino: int, end: int) -> None:
        """Data up to `end` was stored while somebody made the file shorter: perhaps it is a tail now."""

        def apply(inode: Inode) -> None:
            if end > inode.size:
                inode.top = max(inode.top, end)
                inode.cuts += 1

        self.change(ino, apply)
        self._clean_now_or_later(ino)

    def _clean_now_or_later(self, ino: int) -> None:
        try:
            self.clean_tail(ino)
        except CapacityError as error:  # a chunk that is to become shorter needs room
            log.info("what lies beyond the end of inode %d stays until the file grows: %s", ino, error)

    def clean_tail(self, ino: int) -> None:
        while (inode := self.inode(ino)) is not None and inode.top > inode.size:
            if self._remove_tail(ino, inode):
                self._no_tail(ino, inode)

    def _remove_tail(self, ino: int, inode: Inode) -> bool:
        """False: it is not this tail any more."""
        chunk = self._data.chunk
        kept = -(-inode.size // chunk)
        removed: list[int] = []
        for some in _by(_AT_ONCE, self._presence.present(ino, inode, kept)):
            if not self._remove_chunks(ino, inode, some):
                return False
            removed += [index for index in some if index >= LOW]
        if inode.size % chunk and not self._shorten_last(ino, inode):
            return False
        self._presence.clear(ino, removed)
        return True

    def _is_tail(self, ino: int, inode: Inode) -> bool:
        now = self.inode(ino)
        return now is not None and now.cuts == inode.cuts and now.top > now.size

    def _remove_chunks(self, ino: int, inode: Inode, indices: list[int]) -> bool:
        while indices:
            found = [(index, chunk[1]) for index in indices if (chunk := self._data.tag(ino, index)) is not None]
            if not self._is_tail(ino, inode):
                return False
            indices = [index for index, tag in found if not self._data.remove_if(ino, index, tag)]
        return True

    def _shorten_last(self, ino: int, inode: Inode) -> bool:
        index, end = divmod(inode.size, self._data.chunk)
        while (found := self._data.tag(ino, index)) is not None and len(found[0]) > end:
            if not self._is_tail(ino, inode):
                return False
            if self._data.shorten_if(ino, index, found[0][:end], found[1]):
                break
        return True

    def _no_tail(self, ino: int, tail: Inode) -> None:
        # Who comes after this and makes the file longer changes the inode, so it needs no transaction here.
        alone = self._presence.is_alone
        low = low_bits(0, -(-tail.size // self._data.chunk))

        def apply(old: bytes | None) -> bytes | None:
            if old is None:
                return None
            inode = Inode.unpack(old)
            if inode.cuts != tail.cuts or inode.size != tail.size:
                return old
            inode.top = min(inode.top, inode.size)
            if alone:
                inode.low &= low
            return inode.pack()

        self._cells.update(inode_key(ino), apply)

    # --- holes --------------------------------------------------------------------------------------------

    def punch(self, ino: int, offset: int, end: int) -> None:
        """Makes a hole, which reads as zeros. ESTALE, ENOSPC."""
        inode = self.inode(ino)
        if inode is None:
            raise fail(errno.ESTALE)
        chunk = self._data.chunk
        removed: list[int] = []
        for index in self._presence.present(ino, inode, offset // chunk, -(-end // chunk)):
            low, high = max(offset - index * chunk, 0), min(end - index * chunk, chunk)
            if high - low == chunk:
                self._data.remove(ino, index)
                removed.append(index)
            else:
                self._data.zero(ino, index, low, high)
        self._punched(ino, removed)

        def touch(inode: Inode) -> None:
            inode.mtime = inode.ctime = time.time_ns()

        self.change(ino, touch)

    def _punched(self, ino: int, removed: list[int]) -> None:
        low = sum(1 << index for index in removed if index < LOW)
        if low:
            cell = self._cells.load(inode_key(ino))
            if cell.value is not None:
                inode = Inode.unpack(cell.value)
                inode.low &= ~low
                self._presence.commit(Change(cell, inode.pack()))
        self._presence.clear(ino, (index for index in removed if index >= LOW))

    def remove_all(self, ino: int, inode: Inode) -> None:
        """The data of a file that nobody can have open any more."""
        for index in self._presence.present(ino, inode):
            self._data.remove(ino, index)
        self._presence.discard(ino, inode)


def _by(count: int, indices: Iterator[int]) -> Iterator[list[int]]:
    some: list[int] = []
    for index in indices:
        some.append(index)
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some
