"""What the kernel asks of a mount, answered by a Volume.

All requests of a mount run one after the other in the event loop, without a change of thread: over shm each takes some
microseconds, which is less than the change would. What several processes have at once is in the store.

The kernel keeps names and attributes for `cache_s`, and data as long as a file is of the version that this
mount saw when it was closed here. An open looks at the inode itself, so it never meets data older than the last
close or fsync elsewhere. A name that the kernel kept may lead to an inode that was deleted meanwhile: open says
ESTALE, and the kernel looks again.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from memfaas.errors import CapacityError, MemfaasError
from memfaas.fs.directory import Entry
from memfaas.fs.errors import errno_of, fail
from memfaas.fs.files import OpenFile
from memfaas.fs.records import NAME_MAX, Inode
from memfaas.fs.volume import Attributes, Volume
from memfaas.mounts import PID_XATTR

_PID_XATTR = PID_XATTR.encode()
_CAPABILITY = b"security.capability"
_KNOWN = 1 << 16
_LISTED_AT_ONCE = 64
_STATFS_S = 2.0
_DEEPEST = 100
_BLOCK = 512
_MOVING_S = 5.0
"""How long a call waits for room, while the store has some but not where it is needed."""
_RETRY_S = 0.05
_SAY_AGAIN_S = 60.0
_SPARE = 0.1
"""Of a store: so much must be free, or it counts as full."""

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def _handler(
    function: Callable[Concatenate[Operations, P], R],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Makes a handler of a function: its errors become those of the call."""

    async def handle(self: Operations, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            try:
                return function(self, *args, **kwargs)
            except CapacityError:
                return await self._when_there_is_room(lambda: function(self, *args, **kwargs))
        except MemfaasError as error:  # first, for one of them is an OSError, too
            code = errno_of(error)
            if code != errno.ENOSPC:
                self._say(f"{function.__name__}: {error}")
            raise pyfuse3.FUSEError(code) from error
        except OSError as error:
            raise pyfuse3.FUSEError(errno_of(error)) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            log.exception("%s failed", function.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    handler: Any = functools.update_wrapper(handle, function)
    return handler  # type: ignore[no-any-return]


class _Handle:
    __slots__ = ("appends", "file", "heard", "term")

    def __init__(self, file: OpenFile, appends: bool, term: int) -> None:
        self.file = file
        self.appends = appends
        self.heard = file.failures
        """Of how many losses of the file its owner knows."""
        self.term = term
        """Of this mount (members.py)."""


class _Listing:
    __slots__ = ("entries", "ino")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.entries: list[Entry] = []


class Operations(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]
    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, volume: Volume, capacity: Callable[[], tuple[int, int]], cache_s: float) -> None:
        """capacity: says how many bytes there are, and how many are free."""
        super().__init__()
        self.volume = self._volume = volume
        self._capacity = capacity
        self._cache_s = cache_s
        self._handles: dict[int, _Handle | _Listing] = {}
        self._next_handle = 1
        self._known: OrderedDict[int, int] = OrderedDict()
        """Of which version of a file the kernel has data."""
        self._outdated: dict[int, tuple[OpenFile, int]] = {}
        """Open files of which it has to read anew, and the version that it reads then at least."""
        self._statfs: tuple[float, int, int] = (0.0, 0, 0)
        self._said: dict[str, float] = {}
        self._names: dict[int, tuple[int, bytes]] = {}
        """By which name the kernel found an inode last: for messages."""

    # --- helpers ----------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Logs, but the same not again and again: what is lost is met with each call."""
        now = time.monotonic()
        if now > self._said.get(text, -_SAY_AGAIN_S) + _SAY_AGAIN_S:
            if len(self._said) > _KNOWN:
                self._said.clear()
            self._said[text] = now
            log.error("%s", text)

    async def _when_there_is_room(self, call: Callable[[], R]) -> R:
        """Frees what was deleted, and tries again. A donor that gives memory back makes its shard smaller before it
        moves: then there is room as soon as it has."""
        deadline = time.monotonic() + _MOVING_S
        while True:
            try:
                self._volume.free()
            except (OSError, MemfaasError) as error:
                log.info("what was deleted is not free yet: %s", error)
            try:
                return call()
            except CapacityError:
                size, free = self._capacity()
                if free < size * _SPARE or time.monotonic() > deadline:
                    raise
            await trio.sleep(_RETRY_S)

    def _attributes(self, ino: int, inode: Inode) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.entry_timeout = entry.attr_timeout = 0.0 if inode.is_lost else self._cache_s
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blksize = self._volume.data.chunk
        entry.st_blocks = -(-self._volume.files.data_bytes(ino, inode) // _BLOCK) if inode.is_file else 0
        entry.st_atime_ns = inode.atime
        entry.st_mtime_ns = inode.mtime
        entry.st_ctime_ns = inode.ctime
        return entry

    def _named(self, parent: int, name: bytes, ino: int, inode: Inode) -> pyfuse3.EntryAttributes:
        if len(self._names) > _KNOWN:
            self._names.clear()
        self._names[ino] = parent, name
        return self._attributes(ino, inode)

    def _path(self, ino: int) -> bytes:
        """About where a file is: its name may have changed, or be one of several."""
        parts: list[bytes] = []
        while (found := self._names.get(ino)) is not None and len(parts) < _DEEPEST:
            parts.insert(0, found[1])
            ino = found[0]
        return b"/".join(parts)

    def _new_handle(self, handle: _Handle | _Listing) -> int:
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = handle
        return number

    def _file(self, fh: int) -> _Handle:
        handle = self._handles[fh]
        assert isinstance(handle, _Handle)
        return handle

    def file_of(self, fh: int) -> OpenFile:
        return self._usable(fh).file

    def _usable(self, fh: int) -> _Handle:
        """EIO when a lock that its file had is lost."""
        handle = self._file(fh)
        self._volume.locks.check(handle.file.ino, handle.term)
        return handle

    def is_outdated(self, ino: int) -> bool:
        """Whether another mount has changed a file that is open here."""
        file = self._volume.files.renewed(ino)
        if file is None or file.kept == file.inode.version:
            return False
        self._outdated[ino] = file, file.inode.version
        return True

    def forget_data(self, ino: int) -> None:
        """What was outdated, the kernel reads anew. In another thread than the event loop, which it may wait for."""
        found = self._outdated.get(ino)
        try:
            pyfuse3.invalidate_inode(ino)
        except OSError:
            pass  # it has nothing
        if found is not None:
            file, version = found
            file.kept = version

    def _note(self, file: OpenFile) -> None:
        """What the kernel has when the file is closed."""
        if file.kept is not None:
            self._known[file.ino] = file.kept
            self._known.move_to_end(file.ino)
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)

    def _info(self, file: OpenFile, flags: int) -> pyfuse3.FileInfo:
        appends = bool(flags & os.O_APPEND)
        known = file.kept if file.handles > 1 else self._known.get(file.ino)
        same = known == file.inode.version
        if known is not None and not same:
            try:
                pyfuse3.invalidate_inode(file.ino, attr_only=True)
            except OSError:
                pass  # the kernel does not know it
        file.kept = file.inode.version
        self._note(file)
        handle = self._new_handle(_Handle(file, appends, self._volume.members.term))
        return pyfuse3.FileInfo(fh=handle, keep_cache=same, direct_io=appends)

    # --- names ------------------------------------------------------------------------------------------

    @_handler
    def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._named(parent_inode, name, *self._volume.lookup_or_lost(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept for an inode that the kernel knows."""

    @_handler
    def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> pyfuse3.EntryAttributes:
        made = self._volume.make(parent_inode, name, mode, ctx.uid, ctx.gid, rdev=rdev)
        return self._named(parent_inode, name, *made)

    @_handler
    def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        return self._named(parent_inode, name, *self._volume.make(parent_inode, name, mode, ctx.uid, ctx.gid))

    @_handler
    def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        made = self._volume.make(parent_inode, name, stat.S_IFLNK | 0o777, ctx.uid, ctx.gid, target=target)
        return self._attributes(*made)

    @_handler
    def readlink(self, inode: int, ctx: Any) -> bytes:
        return self._volume.inode(inode).target

    @_handler
    def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(inode, self._volume.link(inode, new_parent_inode, new_name))

    @_handler
    def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._volume.unlink(parent_inode, name)

    @_handler
    def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._volume.rmdir(parent_inode, name)

    @_handler
    def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        self._volume.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    # --- attributes -------------------------------------------------------------------------------------

    @_handler
    def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(inode, self._volume.inode(inode))

    @_handler
    def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        wanted = Attributes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if fh is not None and wanted.size is not None:
            self._usable(fh)
        return self._attributes(inode, self._volume.set_attributes(inode, wanted))

    @_handler
    def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        if name == _PID_XATTR and inode == pyfuse3.ROOT_INODE:
            return str(os.getpid()).encode()
        value = self._volume.xattrs(inode).get(name)
        if value is None:
            raise fail(errno.ENODATA)
        return value

    @_handler
    def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        _check_xattr(name)
        self._volume.set_xattr(inode, name, value)

    @_handler
    def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        self._volume.set_xattr(inode, name, None)

    @_handler
    def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        return sorted(self._volume.xattrs(inode))

    @_handler
    def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        then, size, free = self._statfs
        if time.monotonic() > then + _STATFS_S:
            size, free = self._capacity()
            self._statfs = time.monotonic(), size, free
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = 4096
        result.f_blocks = size // 4096
        result.f_bfree = result.f_bavail = free // 4096
        result.f_files = size // 4096
        result.f_ffree = result.f_favail = free // 4096
        result.f_namemax = NAME_MAX
        return result

    # --- directories ------------------------------------------------------------------------------------

    @_handler
    def opendir(self, inode: int, ctx: Any) -> int:
        return self._new_handle(_Listing(inode))

    @_handler
    def readdir(self, fh: int, start_id: int, token: Any) -> None:
        listing = self._handles[fh]
        assert isinstance(listing, _Listing)
        if start_id == 0:
            above = self._volume.inode(listing.ino).parent or pyfuse3.ROOT_INODE
            dots = [Entry(b".", listing.ino, stat.S_IFDIR), Entry(b"..", above, stat.S_IFDIR)]
            listing.entries = dots + self._volume.entries(listing.ino)
        while start_id < len(listing.entries):
            some = listing.entries[start_id : start_id + _LISTED_AT_ONCE]
            for entry, inode in zip(some, self._volume.inodes(some), strict=True):
                start_id += 1
                if inode is None:
                    continue  # deleted meanwhile
                if not pyfuse3.readdir_reply(token, entry.name, self._attributes(entry.ino, inode), start_id):
                    return

    async def releasedir(self, fh: int) -> None:
        del self._handles[fh]

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Changes of names are in the store when they return."""

    # --- files ------------------------------------------------------------------------------------------

    @_handler
    def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return self._opened(inode, flags)

    def _opened(self, ino: int, flags: int) -> pyfuse3.FileInfo:
        file = self._volume.files.open(ino, self._path(ino))
        if flags & os.O_TRUNC and flags & os.O_ACCMODE != os.O_RDONLY:
            try:
                self._volume.files.truncate(ino, 0, time.time_ns())
            except BaseException:
                self._volume.files.close(file)
                raise
        return self._info(file, flags)

    @_handler
    def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        while True:
            try:
                ino, inode = self._volume.make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx.uid, ctx.gid)
                entry = self._named(parent_inode, name, ino, inode)
                return self._info(self._volume.files.opened(ino, inode, self._path(ino)), flags), entry
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
            try:
                self._volume.lookup(parent_inode, name)
            except FileNotFoundError:
                continue
            # Another mount has just made it. The kernel looks again, and whether this one may open it.
            raise fail(errno.ESTALE, name)

    @_handler
    def read(self, fh: int, off: int, size: int) -> bytes:
        data: Any = self._volume.files.read(self._usable(fh).file, off, size)  # any buffer will do
        return data  # type: ignore[no-any-return]

    @_handler
    def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._usable(fh)
        if handle.file.inode.has_xattrs:
            self._drop_capability(handle.file.ino)
        if handle.appends:
            return self._volume.files.append(handle.file, buf)[1]
        files, file = self._volume.files, handle.file
        inside = off + len(buf) <= file.size
        written = files.write(file, off, buf)
        while inside and written < len(buf):
            # It may come from a mapping: then the kernel does not mind that it was less, but it does mind an error.
            written += files.write(file, off + written, buf[written:])
        return written

    def _drop_capability(self, ino: int) -> None:
        """Who writes to a program must not leave it its rights. (The kernel leaves that to us: extra.c.)"""
        if _CAPABILITY in self._volume.xattrs(ino):
            self._volume.set_xattr(ino, _CAPABILITY, None)

    async def flush(self, fh: int) -> None:
        await self._sync(await self._to_sync(fh))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._sync(await self._to_sync(fh))

    @_handler
    def _to_sync(self, fh: int) -> _Handle:
        return self._usable(fh)

    async def _sync(self, handle: _Handle) -> None:
        """What is given up is said once to each who has the file open: it may be his."""
        file = handle.file
        try:
            await self._flush(file)
        except pyfuse3.FUSEError as error:
            if error.errno == errno.ENOSPC:
                self._volume.files.give_up(file)
            handle.heard = file.failures
            raise
        if handle.heard != file.failures:
            handle.heard = file.failures
            raise pyfuse3.FUSEError(file.failure)

    @_handler
    def _flush(self, file: OpenFile) -> None:
        self._volume.files.flush(file)

    async def release(self, fh: int) -> None:
        handle = self._file(fh)
        del self._handles[fh]
        try:  # it was flushed, but for what was written through a mapping since
            await self._sync(handle)
        except pyfuse3.FUSEError as error:
            log.error("file %r: %s", handle.file.name.decode(errors="replace"), os.strerror(error.errno))
        try:
            self._volume.files.close(handle.file)
        except (OSError, MemfaasError) as error:
            log.error("file %r: %s", handle.file.name.decode(errors="replace"), error)
        self._note(handle.file)
        if handle.file.handles == 0:
            self._outdated.pop(handle.file.ino, None)


def _check_xattr(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise fail(errno.ERANGE)
    if name.startswith(b"system.") or name == _PID_XATTR:
        raise fail(errno.EOPNOTSUPP)
