"""Open files of one mount: what was written and is not yet in the store, and where a file ends.

There is one OpenFile for each inode, however many handles lead to it. Whole chunks go to the store at once; what is
less waits in memory, so that many small writes become one. `flush` brings it to the store: the new size first, then
the data, so that a crash in between leaves zeros at the end and never what lay there before.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from memfaas.errors import CapacityError, LeaseLost, MemfaasError
from memfaas.fs.cells import Cells
from memfaas.fs.data import Data, Dirty
from memfaas.fs.errors import fail
from memfaas.fs.records import FILE_MAX, Inode, drop_privileges, inode_key

_DIRTY_MAX = 64 << 20
"""Bytes that wait, of all files."""
_WAIT_S = 1.0
"""How long a chunk waits for more at most, if somebody calls `flush_old`."""

log = logging.getLogger(__name__)


class OpenFile:
    __slots__ = ("changed", "checked", "dirty", "end", "handles", "ino", "inode", "mtime", "name")

    def __init__(self, ino: int, inode: Inode, name: bytes) -> None:
        self.ino = ino
        self.inode = inode
        self.checked = time.monotonic()
        self.name = name
        """For messages: by which name it was opened."""
        self.handles = 0
        self.dirty: dict[int, Dirty] = {}
        self.end = 0
        """Up to where it was written; 0 when nothing waits."""
        self.mtime: int | None = None
        """When it was written last, if that is not in the store."""
        self.changed = 0.0
        """Since when something waits."""

    @property
    def size(self) -> int:
        return max(self.inode.size, self.end)


class _Tail(Exception):
    """Whoever made the file shorter was killed before the data beyond its end was gone: that comes first."""


def _check_tail(inode: Inode, end: int) -> None:
    if end > inode.size and inode.top > inode.size:
        raise _Tail


class Files:
    def __init__(self, cells: Cells, data: Data, cache_s: float) -> None:
        self._cells = cells
        self._data = data
        self._cache_s = cache_s
        self._files: dict[int, OpenFile] = {}
        self._waiting = 0
        """Bytes."""

    # --- what is open -----------------------------------------------------------------------------------

    def is_open(self, ino: int) -> bool:
        return ino in self._files

    def open(self, ino: int, name: bytes = b"") -> OpenFile:
        """ESTALE when nothing is there any more, or no name leads to it and it is not open here. EISDIR, EINVAL."""
        value = self._cells.read(inode_key(ino))
        inode = None if value is None else Inode.unpack(value)
        file = self._files.get(ino)
        if inode is None or (inode.nlink == 0 and file is None):
            raise fail(errno.ESTALE, name)
        if not inode.is_file:
            raise fail(errno.EISDIR if inode.is_dir else errno.EINVAL, name)
        return self.opened(ino, inode, name)

    def opened(self, ino: int, inode: Inode, name: bytes) -> OpenFile:
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = OpenFile(ino, inode, name)
        else:
            self.saw(ino, inode)
        file.handles += 1
        return file

    def close(self, file: OpenFile) -> None:
        """One handle less. Whatever waits is written, or lost if that is not possible: call `flush` before."""
        file.handles -= 1
        if file.handles == 0:
            try:
                self.flush(file)
            finally:
                self._drop(file)
                del self._files[file.ino]

    def _drop(self, file: OpenFile) -> None:
        for index in list(file.dirty):
            self._forget(file, index)
        file.end, file.mtime = 0, None

    def saw(self, ino: int, inode: Inode) -> None:
        """Somebody read an inode: the newest that is known of it."""
        file = self._files.get(ino)
        if file is not None:
            file.inode = inode
            file.checked = time.monotonic()

    def overlay(self, ino: int, inode: Inode) -> Inode:
        """As the inode will be when what waits is written."""
        file = self._files.get(ino)
        if file is not None:
            self.saw(ino, inode)
            if file.mtime is not None:
                inode = replace(inode)
                inode.size = max(inode.size, file.end)
                inode.mtime = inode.ctime = max(inode.mtime, file.mtime)
        return inode

    def _check(self, file: OpenFile) -> None:
        if time.monotonic() >= file.checked + self._cache_s:
            value = self._cells.read(inode_key(file.ino))
            if value is None:
                raise fail(errno.ESTALE, file.name)
            self.saw(file.ino, Inode.unpack(value))

    # --- reading ----------------------------------------------------------------------------------------

    def read(self, file: OpenFile, offset: int, length: int) -> bytes | bytearray:
        """Fewer bytes only at the end of the file. EIO: their memory is lost."""
        self._check(file)
        length = min(length, file.size - offset)
        if length <= 0:
            return b""
        try:
            return self._read(file, offset, length)
        except LeaseLost as error:
            log.error(
                "file %r (inode %d): bytes %d to %d are lost: %s",
                file.name.decode(errors="replace"),
                file.ino,
                offset,
                offset + length,
                error,
            )
            raise fail(errno.EIO, file.name) from error

    def _read(self, file: OpenFile, offset: int, length: int) -> bytes | bytearray:
        chunk = self._data.chunk
        index, low = divmod(offset, chunk)
        if low + length <= chunk and length < chunk and not file.dirty:
            found = self._data.read_small(file.ino, index, low, low + length)
            return found if len(found) == length else found + bytes(length - len(found))
        whole = bytearray(length)
        view = memoryview(whole)
        if not file.dirty:
            self._data.read(file.ino, offset, view)
            return whole
        at = 0
        for index, low, high in self._data.pieces(offset, offset + length):
            piece = view[at : at + high - low]
            dirty = file.dirty.get(index)
            if dirty is None or dirty.bytes < chunk:
                self._data.read_chunk(file.ino, index, low, piece)
            if dirty is not None:
                dirty.lay_over(piece, low)
            at += high - low
        return whole

    # --- writing ----------------------------------------------------------------------------------------

    def write(self, file: OpenFile, offset: int, data: bytes) -> int:
        end = offset + len(data)
        if end > FILE_MAX:
            raise fail(errno.EFBIG, file.name)
        if not data:
            return 0
        if file.mtime is None:
            file.changed = time.monotonic()
        file.mtime = time.time_ns()
        file.end = max(file.end, end)
        view = memoryview(data)
        at = 0
        chunk = self._data.chunk
        announced = False
        for index, low, high in self._data.pieces(offset, end):
            piece = view[at : at + high - low]
            at += high - low
            if high - low == chunk:
                if not announced and end > min(file.inode.size, file.inode.top):
                    self._announce(file)
                announced = True
                self._put(file, index, piece)
                continue
            dirty = file.dirty.get(index)
            if dirty is None:
                dirty = file.dirty[index] = Dirty()
            before = dirty.cost
            dirty.write(low, piece)
            self._waiting += dirty.cost - before
            whole = dirty.whole(chunk)
            if whole is not None:
                if not announced:
                    self._announce(file)
                    announced = True
                self._put(file, index, whole)
        if self._waiting >= _DIRTY_MAX:
            self._make_room(file)
        return len(data)

    def _put(self, file: OpenFile, index: int, data: memoryview | bytearray) -> None:
        self._data.put(file.ino, index, data)
        self._forget(file, index)

    def _forget(self, file: OpenFile, index: int) -> None:
        """A chunk is in the store, or not wanted any more."""
        dirty = file.dirty.pop(index, None)
        if dirty is not None:
            self._waiting -= dirty.cost

    def append(self, file: OpenFile, data: bytes) -> int:
        """At the end of the file, wherever other mounts have brought that by now. Returns where it was written."""
        self.flush(file)
        now = time.time_ns()
        start = 0

        def extend(inode: Inode) -> None:
            nonlocal start
            start = inode.size
            _check_tail(inode, FILE_MAX)
            if start + len(data) > FILE_MAX:
                raise fail(errno.EFBIG, file.name)
            inode.size = start + len(data)
            inode.top = max(inode.top, inode.size)
            inode.mtime = inode.ctime = now

        self._change(file, extend)
        self.write(file, start, data)
        try:
            self.flush(file)
        except CapacityError:
            pass  # it has its place, and waits: who syncs or closes the file hears of it
        return start

    def _change(self, file: OpenFile, change: Callable[[Inode], None]) -> None:
        def apply(old: bytes | None) -> bytes:
            if old is None:
                raise fail(errno.ESTALE, file.name)
            inode = Inode.unpack(old)
            change(inode)
            self.saw(file.ino, inode)
            return inode.pack()

        while True:
            try:
                self._cells.update(inode_key(file.ino), apply)
                return
            except _Tail:
                self._clean_tail(file.ino)

    def _announce(self, file: OpenFile) -> None:
        """Brings size and times to the store, before data that may lie beyond the size that is there."""

        def apply(inode: Inode) -> None:
            _check_tail(inode, file.end)
            inode.size = max(inode.size, file.end)
            inode.top = max(inode.top, file.end)
            if file.mtime is not None:
                inode.mtime = inode.ctime = max(inode.mtime, file.mtime)
            drop_privileges(inode)

        self._change(file, apply)

    def flush(self, file: OpenFile) -> None:
        """All that was written is in the store. What can't be written waits on: ENOSPC, EIO."""
        if file.mtime is None:
            return
        self._announce(file)
        cuts = file.inode.cuts
        for index, dirty in sorted(file.dirty.items()):
            self._data.merge(file.ino, index, dirty)
            self._forget(file, index)
        file.end, file.mtime = 0, None
        value = self._cells.read(inode_key(file.ino))
        if value is None:
            return
        inode = Inode.unpack(value)
        if inode.cuts != cuts:  # somebody made it shorter while we wrote
            self._data.cut(file.ino, inode.size, max(inode.top, file.inode.top))
        self.saw(file.ino, inode)

    def flush_inode(self, ino: int) -> None:
        file = self._files.get(ino)
        if file is not None:
            self.flush(file)

    def renewed(self, ino: int) -> OpenFile | None:
        """An open file, with its inode as it is now."""
        file = self._files.get(ino)
        value = None if file is None else self._cells.read(inode_key(ino))
        if value is not None:
            self.saw(ino, Inode.unpack(value))
        return file

    def _make_room(self, file: OpenFile) -> None:
        for one in [file, *self._files.values()]:
            self.flush(one)
            if self._waiting < _DIRTY_MAX:
                return

    def flush_old(self) -> None:
        """Writes what has waited long enough. What can't be written is tried again, and said to who closes the file."""
        before = time.monotonic() - _WAIT_S
        for file in list(self._files.values()):
            if file.mtime is not None and file.changed <= before:
                try:
                    self.flush(file)
                except (OSError, MemfaasError) as error:
                    log.warning("file %r: %s", file.name.decode(errors="replace"), error)
                    file.changed = time.monotonic()

    def flush_all(self) -> None:
        for file in list(self._files.values()):
            self.flush(file)

    # --- size and holes -----------------------------------------------------------------------------------

    def set_mtime(self, ino: int, mtime: int) -> None:
        """Somebody sets the time: what waits must not set another one later."""
        file = self._files.get(ino)
        if file is not None:
            self.flush(file)

    def truncate(self, ino: int, size: int, now: int) -> None:
        if size > FILE_MAX:
            raise fail(errno.EFBIG)
        file = self._files.get(ino)
        if file is not None:
            for index in [index for index in file.dirty if index * self._data.chunk >= size]:
                self._forget(file, index)
            last = file.dirty.get(size // self._data.chunk)
            if last is not None:
                self._waiting -= last.cost
                last.cut(size % self._data.chunk)
                self._waiting += last.cost
            file.end = min(file.end, size)
            self.flush(file)
        self._clean_tail(ino)
        before = 0

        def apply(old: bytes | None) -> bytes:
            nonlocal before
            if old is None:
                raise fail(errno.ESTALE)
            inode = Inode.unpack(old)
            before = inode.top
            if size < inode.top:
                inode.cuts += 1
            inode.size = size
            inode.mtime = inode.ctime = now
            drop_privileges(inode)
            self.saw(ino, inode)
            return inode.pack()

        self._cells.update(inode_key(ino), apply)
        if size < before:
            self._data.cut(ino, size, before)
            self._lower_top(ino, size)

    def _clean_tail(self, ino: int) -> None:
        """Before a file grows: takes away what may lie beyond its end, since who made it shorter was killed
        meanwhile."""
        value = self._cells.read(inode_key(ino))
        if value is not None:
            inode = Inode.unpack(value)
            if inode.top > inode.size:
                self._data.cut(ino, inode.size, inode.top)
                self._lower_top(ino, inode.size)

    def _lower_top(self, ino: int, size: int) -> None:
        """Nothing lies beyond `size`, unless the file grew again meanwhile."""

        def apply(old: bytes | None) -> bytes | None:
            if old is None:
                return None
            inode = Inode.unpack(old)
            if inode.size <= size:
                inode.top = min(inode.top, size)
            self.saw(ino, inode)
            return inode.pack()

        self._cells.update(inode_key(ino), apply)

    def punch(self, file: OpenFile, offset: int, length: int) -> None:
        """Makes a hole, which reads as zeros."""
        self.flush(file)
        self.renewed(file.ino)
        end = min(offset + length, file.inode.top)
        if offset < end:
            self._data.clear(file.ino, offset, end)
        self._touch(file)

    def reserve(self, file: OpenFile, offset: int, length: int, *, keep_size: bool) -> None:
        """Sees to it that there is room for the range. ENOSPC."""
        self.flush(file)
        end = offset + length
        if end > FILE_MAX:
            raise fail(errno.EFBIG, file.name)

        def apply(inode: Inode) -> None:
            inode.top = max(inode.top, -(-end // self._data.chunk) * self._data.chunk)
            if not keep_size:
                inode.size = max(inode.size, end)
            inode.ctime = time.time_ns()

        self._change(file, apply)
        self._data.reserve(file.ino, offset, end)

    def _touch(self, file: OpenFile) -> None:
        now = time.time_ns()

        def apply(inode: Inode) -> None:
            inode.mtime = inode.ctime = now

        self._change(file, apply)
