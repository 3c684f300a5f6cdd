"""The file system by paths, for programs: what `os` and `open` offer, on the files of a store."""

from __future__ import annotations

import atexit
import errno
import io
import logging
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from memfaas.errors import MemfaasError
from memfaas.fs.directory import Entry
from memfaas.fs.errors import errno_of, fail
from memfaas.fs.members import BEAT_S
from memfaas.fs.pulse import Pulse
from memfaas.fs.records import DEFAULT_CHUNK, ROOT, Inode
from memfaas.fs.volume import RENAME_NOREPLACE, Attributes, Volume

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from memfaas.fs.cells import KeyValue
    from memfaas.fs.files import OpenFile

_LINKS_MAX = 40
_TRIES = 100
"""To find or make a file that others make and delete meanwhile, through links."""

log = logging.getLogger(__name__)


class FileSystem:
    """The files of a store, the same that its mounts show. May be used by many threads at once.

    Raises OSError and its children, as `os` does: FileNotFoundError, FileExistsError, and OSError with the errno ENOSPC
    when the store is full, EIO when memory of the file was lost. The caller counts as the owner of all files.

    A forked child may go on with it, and with open files: it is a mount of its own from its next use on. What the
    parent has written and not yet flushed, the parent brings to the store.
    """

    def __init__(self, store: KeyValue, *, chunk: int = DEFAULT_CHUNK) -> None:
        """Opens the file system in a store, or makes one in an empty store, with `chunk` bytes of data under each
        key."""
        self._store = store
        self._volume = Volume(store, chunk=chunk, cache_s=0.0)
        self._after_fork()
        self._start()
        atexit.register(self._close_at_exit)
        _all.add(self)

    def _start(self) -> None:
        self._owner = os.getpid()
        self._pulse = Pulse(self._store, self._volume.members)
        self._ticker = threading.Thread(target=self._tick, name="memfaas-fs", daemon=True)
        self._ticker.start()

    def _after_fork(self) -> None:
        """A thread of the parent may have held what it waits with."""
        self._lock = threading.RLock()
        self._ended = threading.Event()

    @property
    def chunk(self) -> int:
        """Bytes of a file that lie together: a good size for reads and writes."""
        return self._volume.data.chunk

    def _tick(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                with self._lock:
                    self._volume.tick()
            except (OSError, MemfaasError):
                pass  # the next one says what is needed; an operation that fails says so itself

    def close(self) -> None:
        """Writes what waits. Closing twice does nothing."""
        if not self._ended.is_set():
            self._ended.set()
            atexit.unregister(self._close_at_exit)
            if os.getpid() != self._owner:
                return
            self._pulse.close()
            self._ticker.join()
            with self._errors() as volume:
                volume.close()

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except (OSError, MemfaasError) as error:
            log.error("not all that was written last to files is in the store: %s", error)

    def __enter__(self) -> FileSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _errors(self, path: str | bytes | None = None) -> Iterator[Volume]:
        with self._lock:
            try:
                if os.getpid() != self._owner:
                    self._volume.after_fork()
                    self._start()
                yield self._volume
            except MemfaasError as error:
                raise OSError(errno_of(error), str(error), path) from error
            except OSError as error:
                if path is not None and error.errno is not None:
                    raise OSError(error.errno, os.strerror(error.errno), path) from error
                raise

    # --- paths ------------------------------------------------------------------------------------------

    def _walk(self, path: bytes, follow: bool, start: int = ROOT, links: int = 0) -> tuple[int, Inode]:
        ino = ROOT if path[:1] == b"/" else start
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        inode = self._volume.inode(ino)
        for at, part in enumerate(parts):
            if part == b"..":
                ino = inode.parent or ROOT
                inode = self._volume.inode(ino)
                continue
            parent = ino
            ino, inode = self._volume.lookup(parent, part)
            if stat.S_ISLNK(inode.mode) and (follow or at + 1 < len(parts)):
                if links >= _LINKS_MAX:
                    raise fail(errno.ELOOP)
                ino, inode = self._walk(inode.target, True, parent, links + 1)
        return ino, inode

    def _above(self, path: str | bytes) -> tuple[int, bytes]:
        """The directory that a path's last part is in."""
        whole = os.fsencode(path).rstrip(b"/")
        above, _, name = whole.rpartition(b"/")
        if not name:
            raise fail(errno.EBUSY)
        return self._walk(above or b"/", True)[0], name

    def stat(self, path: str | bytes, *, follow: bool = True) -> Inode:
        with self._errors(path):
            return self._walk(os.fsencode(path), follow)[1]

    def exists(self, path: str | bytes) -> bool:
        try:
            self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def scan(self, path: str | bytes) -> list[tuple[Entry, Inode]]:
        """The entries of a directory, in no order."""
        with self._errors(path) as volume:
            ino, _ = self._walk(os.fsencode(path), True)
            entries = volume.entries(ino)
            inodes = volume.inodes(entries)
            return [(entry, inode) for entry, inode in zip(entries, inodes, strict=True) if inode is not None]

    def list(self, path: str | bytes) -> list[str]:
        with self._errors(path) as volume:
            return [os.fsdecode(entry.name) for entry in volume.entries(self._walk(os.fsencode(path), True)[0])]

    # --- changes ------------------------------------------------------------------------------------------

    def mkdir(self, path: str | bytes, mode: int = 0o777, *, parents: bool = False) -> None:
        with self._errors(path):
            if not parents:
                self._mkdir(path, mode)
                return
            parts = [part for part in os.fsencode(path).split(b"/") if part]
            for count in range(1, len(parts) + 1):
                try:
                    self._mkdir(b"/" + b"/".join(parts[:count]), mode)
                except FileExistsError:
                    if count == len(parts) and not self.stat(path).is_dir:
                        raise

    def _mkdir(self, path: str | bytes, mode: int) -> None:
        parent, name = self._above(path)
        self._volume.make(parent, name, stat.S_IFDIR | mode, os.getuid(), os.getgid())

    def remove(self, path: str | bytes) -> None:
        with self._errors(path) as volume:
            volume.unlink(*self._above(path))

    def rmdir(self, path: str | bytes) -> None:
        with self._errors(path) as volume:
            volume.rmdir(*self._above(path))

    def rename(self, path: str | bytes, to: str | bytes, *, replace: bool = True) -> None:
        with self._errors(path) as volume:
            volume.rename(*self._above(path), *self._above(to), 0 if replace else RENAME_NOREPLACE)

    def link(self, path: str | bytes, to: str | bytes) -> None:
        with self._errors(to) as volume:
            volume.link(self._walk(os.fsencode(path), False)[0], *self._above(to))

    def symlink(self, target: str | bytes, path: str | bytes) -> None:
        with self._errors(path) as volume:
            parent, name = self._above(path)
            volume.make(parent, name, stat.S_IFLNK | 0o777, os.getuid(), os.getgid(), target=os.fsencode(target))

    def readlink(self, path: str | bytes) -> str:
        inode = self.stat(path, follow=False)
        if not stat.S_ISLNK(inode.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return os.fsdecode(inode.target)

    def set_attributes(self, path: str | bytes, wanted: Attributes) -> None:
        with self._errors(path) as volume:
            volume.set_attributes(self._walk(os.fsencode(path), True)[0], wanted)

    def truncate(self, path: str | bytes, size: int) -> None:
        self.set_attributes(path, Attributes(size=size))

    def utime(self, path: str | bytes, ns: tuple[int, int] | None = None) -> None:
        now = time.time_ns()
        atime, mtime = ns if ns is not None else (now, now)
        self.set_attributes(path, Attributes(atime=atime, mtime=mtime))

    # --- files ----------------------------------------------------------------------------------------------

    def open(self, path: str | bytes, mode: str = "rb", *, permissions: int = 0o666) -> io.BufferedIOBase:
        """A binary file: `mode` is one of rb, r+b, wb, w+b, xb, x+b, ab, a+b, as for the function of this name."""
        raw = self._open(path, mode, permissions)
        kind: Any = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        buffered: io.BufferedIOBase = kind(raw, self.chunk)
        return buffered

    def _open(self, path: str | bytes, mode: str, permissions: int = 0o666) -> _RawFile:
        if len(mode.replace("b", "").replace("+", "")) != 1 or mode.strip("rwxab+") or "b" not in mode:
            raise ValueError(f"mode {mode!r} is not one of rb, wb, xb, ab, or these with a +")
        with self._errors(path) as volume:
            ino, inode = self._found_or_made(path, mode, permissions)
            if inode.is_dir:
                raise fail(errno.EISDIR)
            file = volume.files.open(ino, os.fsencode(path))
            if "w" in mode and file.size:
                volume.files.truncate(ino, 0, time.time_ns())
        return _RawFile(self, file, mode)

    def _found_or_made(self, path: str | bytes, mode: str, permissions: int) -> tuple[int, Inode]:
        if "r" in mode:
            return self._walk(os.fsencode(path), True)
        for _ in range(_TRIES):
            if "x" not in mode:
                try:
                    return self._walk(os.fsencode(path), True)
                except FileNotFoundError:
                    pass
            try:
                parent, name = self._above(path)
                return self._volume.make(parent, name, stat.S_IFREG | permissions, os.getuid(), os.getgid())
            except FileExistsError:
                if "x" in mode:
                    raise
                path = self._made_there(path)
        raise fail(errno.ELOOP)

    def _made_there(self, path: str | bytes) -> str | bytes:
        """Where a file is to be made: what a link leads to, when that is not there."""
        found = self._walk(os.fsencode(path), False)[1]
        return os.path.join(os.path.dirname(os.fsencode(path)), found.target) if stat.S_ISLNK(found.mode) else path

    def read_bytes(self, path: str | bytes, start: int = 0, end: int | None = None) -> bytes:
        """All of a file, or a part of it."""
        with self._errors(path) as volume:
            ino, _ = self._walk(os.fsencode(path), True)
            file = volume.files.open(ino, os.fsencode(path))
            try:
                stop = file.size if end is None else min(end, file.size)
                return bytes(volume.files.read(file, start, max(stop - start, 0)))
            finally:
                volume.files.close(file)

    def write_bytes(self, path: str | bytes, data: Buffer) -> None:
        with self._open(path, "wb") as file, memoryview(data).cast("B") as left:
            done = 0
            while done < len(left):  # it is shorter when the room ends amid it; then the next one says so
                done += file.write(left[done:])


class _RawFile(io.RawIOBase):
    """One open file, without a buffer of its own."""

    def __init__(self, owner: FileSystem, file: OpenFile, mode: str) -> None:
        self._owner = owner
        self._file = file
        self._readable = "r" in mode or "+" in mode
        self._writable = "r" not in mode or "+" in mode
        self._appends = "a" in mode
        self._at = file.size if self._appends else 0

    def readable(self) -> bool:
        return self._readable

    def writable(self) -> bool:
        return self._writable

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with self._owner._errors() as volume:
                self._at = volume.files.seek(self._file, offset, whence)
            return self._at
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise fail(errno.EINVAL)
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        if not self._readable:
            raise io.UnsupportedOperation("not readable")
        view = memoryview(buffer).cast("B")
        with self._owner._errors() as volume:
            data = volume.files.read(self._file, self._at, len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def write(self, data: Buffer) -> int:
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        piece = bytes(memoryview(data).cast("B"))
        with self._owner._errors() as volume:
            if self._appends:
                self._at, count = volume.files.append(self._file, piece)
            else:
                count = volume.files.write(self._file, self._at, piece)
        self._at += count
        return count

    def truncate(self, size: int | None = None) -> int:
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        wanted = self._at if size is None else size
        with self._owner._errors() as volume:
            volume.files.truncate(self._file.ino, wanted, time.time_ns())
        return wanted

    def close(self) -> None:
        """What was written is in the store when this returns."""
        if not self.closed:
            try:
                with self._owner._errors() as volume:
                    volume.files.close(self._file)
            finally:
                super().close()


_all: weakref.WeakSet[FileSystem] = weakref.WeakSet()


def _after_fork() -> None:
    for files in list(_all):
        files._after_fork()


os.register_at_fork(after_in_child=_after_fork)
