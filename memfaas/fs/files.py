"""Open files of one mount: what was written and is not yet in the store.

There is one OpenFile for each inode, however many handles lead to it. Whole chunks go to the store at once; what is
less waits in memory, so that many small writes become one. `flush` brings it to the store: the new size first, then
the data, so that a crash in between leaves zeros at the end and never what lay there before.

What can't be brought to the store: a chunk whose memory is lost is given up, and the next flush says so, once (EIO).
When there is no room (ENOSPC), a write takes nothing; what was taken before waits on, until the caller of `flush` has
no more patience, and calls `give_up`. Then the file is as long as if that had never been written.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from memfaas.errors import CapacityError, LeaseLost, MemfaasError, ValueCorrupt
from memfaas.fs.data import Data, Dirty
from memfaas.fs.ends import Ends, check_tail
from memfaas.fs.errors import fail
from memfaas.fs.presence import LOW, Presence, levels, low_bits
from memfaas.fs.records import FILE_MAX, Inode, drop_privileges

_DIRTY_MAX = 64 << 20
"""Bytes that wait, of all files."""
_WAIT_S = 1.0
"""How long a chunk waits for more at most, if somebody calls `flush_old`."""
_GIVE_UP_S = 30.0
"""How long it waits for room, if nobody syncs or closes the file."""
_TRY_S = 10.0
"""How long to go on with other chunks, after one whose memory does not answer."""
_SAID = 8
"""Ranges that one message names."""

log = logging.getLogger(__name__)


class OpenFile:
    __slots__ = (
        "announced",
        "base",
        "changed",
        "checked",
        "dirty",
        "end",
        "error",
        "failure",
        "failures",
        "handles",
        "ino",
        "inode",
        "kept",
        "mtime",
        "name",
        "place",
        "stored",
        "stuck",
    )

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
        self.stuck: float | None = None
        """Since when that is because it can't be stored."""
        self.kept: int | None = None
        """The inode's version of which the one that keeps a copy of the data has it, if somebody does. What is written
        here moves it along; when another mount has changed the file, too, it stays behind for good."""
        self.error = 0
        """What the next flush has to say about data that is given up: an errno."""
        self.failures, self.failure = 0, 0
        """How often data was given up, and the errno of the last time: for who wants to tell each handle."""
        self.announced: int | None = None
        """The size, if it is one that we gave to the file and not all data up to there is stored."""
        self.base = 0
        """The size that it had before."""
        self.stored = 0
        """Up to where data was stored since."""
        self.place: tuple[int, int, int] | None = None
        """Start and length of an append that found no room, while others have appended more; and how often the file
        had been cut."""

    @property
    def size(self) -> int:
        return max(self.inode.size, self.end)


class Files:
    def __init__(self, data: Data, presence: Presence, ends: Ends, cache_s: float) -> None:
        self._data = data
        self._presence = presence
        self._ends = ends
        self._cache_s = cache_s
        self._files: dict[int, OpenFile] = {}
        self._waiting = 0
        """Bytes."""

    # --- what is open -----------------------------------------------------------------------------------

    def is_open(self, ino: int) -> bool:
        return ino in self._files

    def open(self, ino: int, name: bytes = b"") -> OpenFile:
        """ESTALE when nothing is there any more, or no name leads to it and it is not open here. EISDIR, EINVAL."""
        inode = self._ends.inode(ino)
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
        """One handle less. With the last one, what waits is written, or else given up: ENOSPC, EIO."""
        file.handles -= 1
        if file.handles == 0:
            try:
                self.flush(file)
            finally:
                self.give_up(file)
                del self._files[file.ino]

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
            inode = self._ends.inode(file.ino)
            if inode is None:
                raise fail(errno.ESTALE, file.name)
            self.saw(file.ino, inode)

    # --- reading ----------------------------------------------------------------------------------------

    def read(self, file: OpenFile, offset: int, length: int) -> bytes | bytearray:
        """Fewer bytes only at the end of the file. EIO: their memory is lost."""
        self._check(file)
        length = min(length, file.size - offset)
        if length <= 0:
            return b""
        try:
            return self._read(file, offset, length)
        except (LeaseLost, ValueCorrupt) as error:
            self._say_lost(file, [(offset, offset + length)], error)
            raise fail(errno.EIO, file.name) from error

    @staticmethod
    def _say_lost(file: OpenFile, ranges: list[tuple[int, int]], why: object) -> None:
        said = ", ".join(f"{start} to {end}" for start, end in ranges[:_SAID])
        more = f" and {len(ranges) - _SAID} more ranges" if len(ranges) > _SAID else ""
        name = file.name.decode(errors="replace")
        log.error("file %r (inode %d): bytes %s%s are lost: %s", name, file.ino, said, more, why)

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
        """Takes the data, and says how many bytes: fewer when it fails amid them. When it raises, none was taken."""
        end = offset + len(data)
        if end > FILE_MAX:
            raise fail(errno.EFBIG, file.name)
        if not data:
            return 0
        if self._waiting >= _DIRTY_MAX:
            self._make_room()
        before = file.mtime
        if before is None:
            file.changed = time.monotonic()
        file.mtime = time.time_ns()
        view = memoryview(data)
        at = 0
        ready = False
        for index, low, high in self._data.pieces(offset, end):
            piece = view[at : at + high - low]
            try:
                if high - low < self._data.chunk:
                    self._keep(file, index, low, piece)
                else:
                    if not ready:
                        self._make_ready(file, offset, end)
                        ready = True
                    self._put(file, index, piece)
            except (OSError, MemfaasError) as error:
                if at == 0:
                    file.mtime = before
                self._give_back(file)
                if at:
                    return at
                if isinstance(error, LeaseLost):
                    self._say_lost(file, [(offset, offset + high - low)], error)
                    raise fail(errno.EIO, file.name) from error
                raise
            at += high - low
            file.end = max(file.end, offset + at)
        return at

    def _keep(self, file: OpenFile, index: int, low: int, piece: memoryview) -> None:
        """A part of a chunk waits for more."""
        dirty = file.dirty.get(index)
        if dirty is None:
            dirty = file.dirty[index] = Dirty()
        before = dirty.cost
        dirty.write(low, piece)
        self._waiting += dirty.cost - before
        whole = dirty.whole(self._data.chunk)
        if whole is not None:
            start = index * self._data.chunk
            try:
                self._make_ready(file, start, start + self._data.chunk)
                self._put(file, index, whole)
            except (OSError, MemfaasError) as error:
                log.debug("inode %d: chunk %d waits on: %s", file.ino, index, error)  # flush will say so

    def _make_ready(self, file: OpenFile, start: int, end: int) -> None:
        """Before chunks of a range are stored: their bits are, and the size."""
        first, last = start // self._data.chunk, -(-end // self._data.chunk)
        inode = file.inode
        known = not low_bits(first, last) & ~inode.low and levels(last) <= inode.levels
        if end > min(inode.size, inode.top) or not known:
            self._announce(file, end, range(first, last))
        self._presence.mark(file.ino, range(max(first, LOW), last))

    def _put(self, file: OpenFile, index: int, data: memoryview | bytearray) -> None:
        self._data.put(file.ino, index, data)
        file.stored = max(file.stored, (index + 1) * self._data.chunk)
        self._forget(file, index)

    def _forget(self, file: OpenFile, index: int) -> None:
        """A chunk is in the store, or not wanted any more."""
        dirty = file.dirty.pop(index, None)
        if dirty is not None:
            self._waiting -= dirty.cost

    def append(self, file: OpenFile, data: bytes) -> tuple[int, int]:
        """At the end of the file, wherever other mounts have brought that by now. It is in the store then.

        Returns where it was written, and how much: less when there is no room for more. When it raises, it is not
        there.
        """
        self.flush(file)
        start = self._take_place(file, len(data))
        written = 0
        try:
            written = self.write(file, start, data)
            error = self._write_out(file)
            if file.dirty:
                written = min(written, max(min(file.dirty) * self._data.chunk - start, 0))
            if error is not None and written == 0:
                raise error
        except (OSError, MemfaasError):
            self._drop(file)
            self._give_place_back(file, start, len(data), 0)
            raise
        self._drop(file)
        self._raise_error(file)
        if written < len(data):
            self._give_place_back(file, start, len(data), written)
        return start, written

    def _take_place(self, file: OpenFile, length: int) -> int:
        """Makes the file longer by so much. From where on."""
        if file.place is not None:
            self.renewed(file.ino)
            start, room, cuts = file.place
            file.place = None
            if (room, cuts) == (length, file.inode.cuts):
                return start
        start = 0
        now = time.time_ns()

        def extend(inode: Inode) -> None:
            nonlocal start
            check_tail(inode, FILE_MAX)
            start = inode.size
            if start + length > FILE_MAX:
                raise fail(errno.EFBIG, file.name)
            inode.size = start + length
            inode.top = max(inode.top, inode.size)
            inode.mtime = inode.ctime = now

        self._change(file, extend)
        return start

    def _give_place_back(self, file: OpenFile, start: int, length: int, written: int) -> None:
        try:
            shrunk = self._ends.shrink(file.ino, start + length, start + written)
            self.renewed(file.ino)
            if not shrunk and not written:
                file.place = start, length, file.inode.cuts  # for who tries again
        except (OSError, MemfaasError) as error:
            name = file.name.decode(errors="replace")
            log.warning("file %r: bytes %d to %d stay zeros: %s", name, start + written, start + length, error)

    def _change(self, file: OpenFile, change: Callable[[Inode], None]) -> None:
        inode = self._ends.change(file.ino, change)
        self.saw(file.ino, inode)
        if file.kept == inode.version - 1:
            file.kept = inode.version

    def _announce(self, file: OpenFile, end: int, chunks: Collection[int]) -> None:
        """Brings size and times to the store, and which chunks there will be, before data that may lie beyond the
        size that is there."""
        end = max(end, file.end)
        before = bits = 0
        for index in chunks:
            bits |= low_bits(index, index + 1)
        depth = levels(max(chunks, default=-1) + 1)

        def apply(inode: Inode) -> None:
            nonlocal before
            check_tail(inode, end)
            before = inode.size
            inode.size = max(inode.size, end)
            inode.top = max(inode.top, end)
            inode.low |= bits
            inode.levels = max(inode.levels, depth)
            if file.mtime is not None:
                inode.mtime = inode.ctime = max(inode.mtime, file.mtime)
            drop_privileges(inode)

        self._change(file, apply)
        if end > before:
            if before != file.announced:
                file.base, file.stored = before, 0
            file.announced = end

    def _give_back(self, file: OpenFile) -> None:
        """The size was announced, but there is less: then the file gets shorter again, unless others have changed
        it."""
        size = max(file.base, file.stored, file.end)
        if file.announced is not None and size < file.announced:
            try:
                if self._ends.shrink(file.ino, file.announced, size):
                    file.announced = size
                self.renewed(file.ino)
            except (OSError, MemfaasError) as error:
                log.warning("file %r ends in zeros: %s", file.name.decode(errors="replace"), error)

    # --- bringing it to the store -------------------------------------------------------------------------

    def flush(self, file: OpenFile) -> None:
        """All that was written is in the store. What there is no room for waits on (CapacityError); what is lost is
        said once (EIO)."""
        error = self._write_out(file)
        self._raise_error(file)
        if error is not None:
            raise error

    @staticmethod
    def _raise_error(file: OpenFile) -> None:
        if file.error:
            code, file.error = file.error, 0
            raise fail(code, file.name)

    def _write_out(self, file: OpenFile) -> OSError | MemfaasError | None:
        """Tries each chunk. Why something waits on, if it does."""
        if file.mtime is None:
            return None
        try:
            self._announce(file, file.end, file.dirty)
        except (OSError, MemfaasError) as failed:
            return failed
        cuts, end = file.inode.cuts, file.end
        error = self._store(file)
        if not file.dirty:
            self._clean(file)
        try:
            self._change(file, lambda inode: None)  # who read it meanwhile has not read all of it
            if file.inode.cuts != cuts:
                self._ends.came_late(file.ino, end)
                self.renewed(file.ino)
        except (OSError, MemfaasError) as failed:
            error = error or failed
        return error

    def _store(self, file: OpenFile) -> OSError | MemfaasError | None:
        chunk = self._data.chunk
        waits: OSError | MemfaasError | None = None
        lost: list[tuple[int, int]] = []
        why: MemfaasError | None = None
        give_up = time.monotonic() + _TRY_S
        for index, dirty in sorted(file.dirty.items()):
            start, end = index * chunk + dirty.start, index * chunk + dirty.end
            try:
                if index >= LOW:
                    self._presence.mark(file.ino, (index,))
                self._data.merge(file.ino, index, dirty)
            except CapacityError as error:
                waits = waits or error
            except (LeaseLost, ValueCorrupt) as error:
                why = error
                if lost and lost[-1][1] == start:
                    start = lost.pop()[0]
                lost.append((start, end))
                self._forget(file, index)
            except MemfaasError as error:
                waits = waits or error
                if time.monotonic() > give_up:
                    break
            else:
                file.stored = max(file.stored, end)
                self._forget(file, index)
        if why is not None:
            file.error = file.failure = errno.EIO
            file.failures += 1
            self._say_lost(file, lost, why)
        return waits

    def _clean(self, file: OpenFile) -> None:
        """Nothing waits any more."""
        file.end, file.mtime, file.stuck = 0, None, None
        file.announced, file.base, file.stored = None, 0, 0

    def _drop(self, file: OpenFile) -> None:
        for index in list(file.dirty):
            self._forget(file, index)
        self._clean(file)

    def lose(self, ino: int) -> None:
        """What waits must not be stored any more: it was under a lock that another mount may have now."""
        file = self._files.get(ino)
        if file is not None and file.mtime is not None:
            name = file.name.decode(errors="replace")
            log.error("file %r: what was written under its lock and not stored yet is lost", name)
            self._drop(file)
            file.error = errno.EIO

    def forget_waiting(self) -> None:
        """In a forked child: its parent stores it."""
        for file in self._files.values():
            self._drop(file)

    def give_up(self, file: OpenFile) -> None:
        """What waits can't be stored, and its writer has heard of it, or will: it goes."""
        if file.dirty:
            chunk = self._data.chunk
            waits = sorted(file.dirty.items())
            ranges = [(index * chunk + dirty.start, index * chunk + dirty.end) for index, dirty in waits]
            self._say_lost(file, ranges, "they could not be stored")
            file.failures += 1
            file.failure = errno.ENOSPC
            for index in list(file.dirty):
                self._forget(file, index)
            file.end = 0
            self._give_back(file)
        self._clean(file)

    def flush_inode(self, ino: int) -> None:
        file = self._files.get(ino)
        if file is not None:
            self.flush(file)

    def renewed(self, ino: int) -> OpenFile | None:
        """An open file, with its inode as it is now."""
        file = self._files.get(ino)
        inode = None if file is None else self._ends.inode(ino)
        if inode is not None:
            self.saw(ino, inode)
        return file

    def _make_room(self) -> None:
        """So much waits that nothing more can be taken before some of it is stored."""
        first: OSError | MemfaasError | None = None
        for file in list(self._files.values()):
            if self._waiting < _DIRTY_MAX:
                return
            error = self._write_out(file)
            first = first or error
        if first is not None and self._waiting >= _DIRTY_MAX:
            raise first

    def flush_old(self) -> None:
        """Writes what has waited long enough. What can't be written is tried again for some time; then it is given
        up, and said to who syncs or closes the file."""
        now = time.monotonic()
        for file in list(self._files.values()):
            if file.mtime is None or file.changed > now - _WAIT_S:
                continue
            error = self._write_out(file)
            if error is None:
                continue
            file.changed = now
            if file.stuck is None:
                file.stuck = now
                log.warning("file %r: %s", file.name.decode(errors="replace"), error)
            elif isinstance(error, CapacityError) and now > file.stuck + _GIVE_UP_S:
                self.give_up(file)
                file.error = errno.ENOSPC

    def flush_all(self) -> None:
        """Each file is tried; the first error is raised."""
        first: OSError | MemfaasError | None = None
        for file in list(self._files.values()):
            try:
                self.flush(file)
            except (OSError, MemfaasError) as error:
                first = first or error
        if first is not None:
            raise first

    # --- size and holes -----------------------------------------------------------------------------------

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
                if not last.pieces:
                    self._forget(file, size // self._data.chunk)
            file.end = min(file.end, size)
            self.flush(file)
        self._ends.truncate(ino, size, now)
        self.renewed(ino)

    def punch(self, file: OpenFile, offset: int, length: int) -> None:
        """Makes a hole, which reads as zeros."""
        self.flush(file)
        self._ends.punch(file.ino, offset, offset + length)
        self.renewed(file.ino)

    def reserve(self, file: OpenFile, offset: int, length: int, *, keep_size: bool) -> None:
        """The file is as long as the range needs, and the store has room for it now; it is not kept free. ENOSPC,
        EFBIG."""
        end = offset + length
        if end > FILE_MAX:
            raise fail(errno.EFBIG, file.name)
        self.flush(file)
        chunk = self._data.chunk
        first, last = offset // chunk, -(-end // chunk)
        there = self._presence.count(file.ino, file.inode, first, last)
        if (last - first - there) * chunk > self._data.free_bytes():
            raise fail(errno.ENOSPC, file.name)

        def apply(inode: Inode) -> None:
            if not keep_size and end > inode.size:
                check_tail(inode, end)
                inode.size = end
                inode.mtime = time.time_ns()
            inode.ctime = time.time_ns()

        self._change(file, apply)

    def _with_data(self, ino: int, inode: Inode, start: int = 0) -> Iterator[int]:
        """The chunks that are no holes, in order, from one on."""
        file = self._files.get(ino)
        waiting = [index for index in file.dirty if index >= start] if file is not None else []
        found = self._presence.present(ino, inode, start)
        return heapq.merge(found, sorted(waiting)) if waiting else found

    def data_bytes(self, ino: int, inode: Inode) -> int:
        """How much of a file is no hole, with what waits; in whole chunks, but for its end."""
        chunk, count = self._data.chunk, self._presence.count
        whole, rest = divmod(inode.size, chunk)
        total = chunk * count(ino, inode, 0, whole)
        if rest:
            total += rest * count(ino, inode, whole, whole + 1)
        file = self._files.get(ino)
        if file is not None and file.dirty:
            for index in self._presence.missing(ino, inode, sorted(file.dirty)):
                total += max(min(chunk, inode.size - index * chunk), 0)
        return total

    def seek(self, file: OpenFile, offset: int, whence: int) -> int:
        """Where the next data (os.SEEK_DATA) or the next hole (os.SEEK_HOLE) begins. ENXIO."""
        renewed = self.renewed(file.ino)
        size, chunk = file.size, self._data.chunk
        if renewed is None or not 0 <= offset < size:
            raise fail(errno.ENXIO, file.name)
        at = offset // chunk
        for index in self._with_data(file.ino, file.inode, at):
            if whence == os.SEEK_DATA:
                if index * chunk >= size:
                    break
                return max(offset, index * chunk)
            if index > at:
                break
            at = index + 1
        if whence == os.SEEK_DATA:
            raise fail(errno.ENXIO, file.name)
        return min(max(offset, at * chunk), size)
