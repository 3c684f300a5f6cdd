"""A file system as one process sees it, by inode numbers: names, attributes, and life and death of inodes.

All calls raise OSError (errors.py has the errno of what a store raises). Not for several threads at once.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgpack

from memfaas.errors import LeaseLost, MemfaasError, TransportError, UsageError, ValueCorrupt
from memfaas.fs.cells import Cell, Cells, Change, KeyValue
from memfaas.fs.data import Data
from memfaas.fs.directory import Directories, Entry, Leaf, check_name
from memfaas.fs.ends import Ends
from memfaas.fs.errors import fail
from memfaas.fs.files import Files
from memfaas.fs.locks import Locks
from memfaas.fs.members import Members
from memfaas.fs.presence import Presence
from memfaas.fs.records import (
    DEFAULT_CHUNK,
    LINK_MAX,
    MOVES,
    NAME_MAX,
    NEXT_INODE,
    ROOT,
    SUPERBLOCK,
    TARGET_MAX,
    Inode,
    Superblock,
    drop_privileges,
    inode_key,
    lost_inode,
    new_inode,
    number,
    number_of,
    xattr_key,
)

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_TAKEN_AT_ONCE = 4096
"""Inode numbers; those that a mount does not use are lost."""
_XATTRS_MAX = 64 << 10
_FREE_AT_ONCE = 32
_FREE_BYTES = 16 << 20
_LOST = (LeaseLost, ValueCorrupt)

log = logging.getLogger(__name__)


@dataclass
class Attributes:
    """What to set; None: as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None


class Volume:
    def __init__(self, store: KeyValue, *, chunk: int = DEFAULT_CHUNK, cache_s: float = 1.0) -> None:
        """Opens the file system in a store, or makes one in an empty store.

        chunk: bytes of data under one key, when it is made.
        cache_s: how long what was read of a file's size counts for a file that is open.

        UsageError when the store drops what is in it (on_reclaim="drop"); EUCLEAN when something else is in it.
        """
        if store._drops():
            raise UsageError(
                "a store that drops values when their memory is needed (on_reclaim='drop') cannot hold a file system"
            )
        self.cells = Cells(store)
        self._store = store
        self.superblock = self._open(chunk)
        self.dirs = Directories(self.cells)
        self.data = Data(store, self.cells, self.superblock.chunk)
        self.presence = Presence(self.cells, lambda: self.members.alone())
        self.ends = Ends(self.cells, self.data, self.presence)
        self.files = Files(self.data, self.presence, self.ends, cache_s)
        self.members = Members(self.cells, self.files.is_open, self._taken_for_dead)
        self.locks = Locks(self.cells, self.members)
        self._numbers: Iterator[int] = iter(())
        self._buried_bytes = 0
        """Of what was deleted here since memory was freed last."""
        self._said: set[int] = set()
        """Lost inodes that the log names already."""
        self.members.join()

    def _open(self, chunk: int) -> Superblock:
        found = self.cells.read(SUPERBLOCK)
        if found is None:
            if chunk < 4096 or chunk & (chunk - 1) or chunk > 1 << 20:
                raise fail(errno.EINVAL, "chunk")
            now = time.time_ns()
            root = new_inode(stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), now, parent=ROOT)
            for key, value in (
                (inode_key(ROOT), root.pack()),
                (b"d" + number(ROOT), b"L"),
                (SUPERBLOCK, Superblock(chunk, os.urandom(16)).pack()),
            ):
                self.cells.swap(Cell(key, None, b""), value)  # whoever is first
            found = self.cells.read(SUPERBLOCK)
        try:
            return Superblock.unpack(found or b"")
        except ValueError as error:
            raise OSError(errno.EUCLEAN, f"cannot use this store as a file system: {error}") from error

    def close(self) -> None:
        """Everything that was written is in the store, and this is no mount of the file system any more."""
        first = None
        for step in (
            self.files.flush_all,
            self.free,
            self._free_all_if_alone,
            self.locks.give_owed,
            self.members.leave,
        ):
            error = self._tried(step)
            first = first or error
        if first is not None:
            raise first

    def _free_all_if_alone(self) -> None:
        if not self.members.others():
            self._free(list(self.members.waiting))

    def tick(self) -> None:
        """To be called every second or two: writes what waits, gives a sign of life, frees what was deleted.

        Raises the first error, when all that can be done is done.
        """
        # The sign comes first: what was written under locks that are lost must not be stored any more.
        first = self._tried(self.members.beat)
        if first is None or not self.locks.held:
            first = first or self._tried(self.files.flush_old)
        for step in (self.locks.give_owed, self.data.look_where_it_is, self.free):
            error = self._tried(step)
            first = first or error
        if first is not None:
            raise first

    @staticmethod
    def _tried(step: Callable[[], object]) -> OSError | MemfaasError | None:
        try:
            step()
        except (OSError, MemfaasError) as error:
            return error
        return None

    def _afterwards(self, *steps: Callable[[], object]) -> None:
        """What comes when an operation is done: an error of it must not be one of the operation, which would be
        tried again."""
        for step in steps:
            error = self._tried(step)
            if error is not None:
                log.warning("the operation is done; what comes after it failed: %s", error)

    def _taken_for_dead(self) -> None:
        for ino in self.locks.lose():
            self.files.lose(ino)

    def flush_under_lock(self, ino: int) -> None:
        """Before a lock is given up: what was written under it is in the store. When it was lost, nothing is stored."""
        self.members.confirm()
        self.files.flush_inode(ino)

    def after_fork(self) -> None:
        """In a forked child: it is a mount of its own from now on, under whose name, and with whose inode numbers,
        its parent goes on. What waits to be written, the parent writes."""
        self._numbers = iter(())
        self.files.forget_waiting()
        self.locks.forget()
        self.members.after_fork()
        self.members.join()

    # --- inodes -----------------------------------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """As it is, with what was written here and is not yet in the store. ESTALE when it is gone."""
        inode = self.ends.inode(ino)
        if inode is None:
            raise fail(errno.ESTALE)
        return self.files.overlay(ino, inode)

    def inodes(self, entries: list[Entry]) -> list[Inode | None]:
        """Those of the entries of a directory. None: deleted meanwhile. What is lost is as `lost_inode` says."""
        try:
            values = self.cells.read_many([inode_key(entry.ino) for entry in entries])
        except _LOST:  # which of them is it?
            return [self._inode_or_lost(entry) for entry in entries]
        return [
            None if value is None else self.files.overlay(entry.ino, Inode.unpack(value))
            for entry, value in zip(entries, values, strict=True)
        ]

    def _inode_or_lost(self, entry: Entry) -> Inode | None:
        try:
            inode = self.ends.inode(entry.ino)
        except _LOST as error:
            self._say_lost(entry.ino, entry.name, error)
            return lost_inode(entry.type)
        return None if inode is None else self.files.overlay(entry.ino, inode)

    def _say_lost(self, ino: int, name: bytes, error: MemfaasError) -> None:
        if ino not in self._said:
            self._said.add(ino)
            log.error("inode %d, named %r, is lost: %s", ino, name.decode(errors="replace"), error)

    def _take_number(self) -> int:
        for ino in self._numbers:
            return ino
        first = 0

        def take(old: bytes | None) -> bytes:
            nonlocal first
            first = ROOT + 1 if old is None else number_of(old)
            return number(first + _TAKEN_AT_ONCE)

        self.cells.update(NEXT_INODE, take)
        self._numbers = iter(range(first + 1, first + _TAKEN_AT_ONCE))
        return first

    def change(self, ino: int, change: Callable[[Inode], None]) -> Inode:
        """Changes an inode in place, whatever others do to it meanwhile. ESTALE."""
        return self.files.overlay(ino, self.ends.change(ino, change))

    def set_attributes(self, ino: int, wanted: Attributes) -> Inode:
        """As chmod, chown, truncate and utimens do; the kernel has checked who may."""
        now = time.time_ns()
        if wanted.size is not None:
            self._check_file(self.inode(ino))
            self.files.truncate(ino, wanted.size, now)

        def apply(inode: Inode) -> None:
            owner = wanted.uid is not None or wanted.gid is not None
            if wanted.mode is not None:
                inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(wanted.mode)
            elif owner and not inode.is_dir:
                drop_privileges(inode)
            inode.uid = inode.uid if wanted.uid is None else wanted.uid
            inode.gid = inode.gid if wanted.gid is None else wanted.gid
            inode.atime = inode.atime if wanted.atime is None else wanted.atime
            inode.mtime = inode.mtime if wanted.mtime is None else wanted.mtime
            inode.ctime = now

        if wanted.mtime is not None:
            self.files.flush_inode(ino)  # what waits must not set another one later
        if replace(wanted, size=None) == Attributes():
            return self.inode(ino)
        return self.change(ino, apply)

    @staticmethod
    def _check_file(inode: Inode) -> None:
        if inode.is_dir:
            raise fail(errno.EISDIR)
        if not inode.is_file:
            raise fail(errno.EINVAL)

    def _touch(self, ino: int) -> None:
        """Something was put into a directory or taken out. Its new times may get lost to another's newer ones."""
        now = time.time_ns()

        def touch() -> None:
            cell = self.cells.load(inode_key(ino))
            if cell.value is not None:
                inode = Inode.unpack(cell.value)
                inode.mtime = inode.ctime = max(now, inode.mtime)
                self.cells.swap(cell, inode.pack())

        self._afterwards(touch)

    # --- names ------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> tuple[int, Inode]:
        """ENOENT, ENOTDIR; EIO when its inode is lost."""
        ino, inode = self.lookup_or_lost(parent, name)
        if inode.is_lost:
            raise fail(errno.EIO, name)
        return ino, inode

    def lookup_or_lost(self, parent: int, name: bytes) -> tuple[int, Inode]:
        """The same, with what `lost_inode` says when the inode is lost: the name is there, and can be removed."""
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG, name)
        while True:
            entry = self._find(parent, name)
            if entry is None:
                raise fail(errno.ENOENT, name)
            inode = self._inode_or_lost(entry)
            if inode is not None:
                return entry.ino, inode
            if self._find(parent, name) == entry:  # else it was deleted in between
                log.error("the inode %d of %r is lost", entry.ino, name)
                return entry.ino, lost_inode(entry.type)

    def _find(self, parent: int, name: bytes) -> Entry | None:
        try:
            return self.dirs.find(parent, name)
        except FileNotFoundError:
            self._check_dir(parent)
            raise

    def _check_dir(self, ino: int) -> Inode:
        inode = self.ends.inode(ino)
        if inode is None:
            raise fail(errno.ENOENT)
        if not inode.is_dir:
            raise fail(errno.ENOTDIR)
        return inode

    def entries(self, ino: int) -> list[Entry]:
        self._check_dir(ino)
        return self.dirs.entries(ino)

    def make(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0, target: bytes = b""
    ) -> tuple[int, Inode]:
        """A new file, directory, symbolic link or other node, by the type in `mode`. EEXIST, ENOENT, ENOTDIR."""
        check_name(name)
        if len(target) > TARGET_MAX:
            raise fail(errno.ENAMETOOLONG, name)
        above = self._check_dir(parent)
        is_dir = stat.S_ISDIR(mode)
        if above.mode & stat.S_ISGID:
            gid = above.gid
            mode |= stat.S_ISGID if is_dir else 0
        leaf = self.dirs.roomy_leaf(parent, name)
        if leaf.find(name) is not None:
            raise fail(errno.EEXIST, name)
        ino = self._take_number()
        inode = new_inode(mode, uid, gid, time.time_ns(), rdev=rdev, parent=parent if is_dir else 0, target=target)
        if not self.cells.swap(Cell(inode_key(ino), None, b""), inode.pack()):
            raise RuntimeError(f"inode {ino} was given twice")
        try:
            if is_dir:
                self.dirs.create(ino)
            while not self.cells.swap(leaf.cell, leaf.added(name, ino, mode).entries):
                leaf = self.dirs.roomy_leaf(parent, name)
                if leaf.find(name) is not None:
                    raise fail(errno.EEXIST, name)
        except TransportError as error:
            # The name may be there, or still come: a request that was given up may be on its way.
            log.info("inode %d stays, perhaps without a name: %s", ino, error)
            raise
        except (OSError, MemfaasError):
            self._afterwards(lambda: self._forget_new(ino, is_dir))
            raise
        self._touch(parent)
        return ino, inode

    def _forget_new(self, ino: int, is_dir: bool) -> None:
        """It got no name."""
        self.cells.update(inode_key(ino), lambda _: None)
        if is_dir:
            self.dirs.forget(ino)

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """One more name for a file. EPERM for a directory, EEXIST, EMLINK, ENOENT."""
        check_name(name)
        while True:
            self._check_dir(parent)
            leaf = self.dirs.roomy_leaf(parent, name)
            if leaf.find(name) is not None:
                raise fail(errno.EEXIST, name)
            cell = self.cells.load(inode_key(ino))
            inode = Inode.unpack(cell.value) if cell.value is not None else None
            if inode is None or inode.nlink == 0:
                raise fail(errno.ENOENT)
            if inode.is_dir:
                raise fail(errno.EPERM)
            if inode.nlink >= LINK_MAX:
                raise fail(errno.EMLINK)
            inode.nlink += 1
            inode.ctime = time.time_ns()
            if self.cells.commit([leaf.added(name, ino, inode.mode).change(), Change(cell, inode.pack())]):
                self._touch(parent)
                return self.files.overlay(ino, inode)

    def unlink(self, parent: int, name: bytes) -> None:
        """ENOENT, EISDIR."""
        while True:
            leaf, entry = self._entry(parent, name)
            if stat.S_ISDIR(entry.type):
                raise fail(errno.EISDIR, name)
            changes, inode = self._drop(entry)
            if self.cells.commit([leaf.removed(name).change(), *changes]):
                break
        self._dropped(entry.ino, inode)
        self._touch(parent)

    def _entry(self, parent: int, name: bytes) -> tuple[Leaf, Entry]:
        """A name that is there, to be changed."""
        self._check_dir(parent)
        leaf = self.dirs.leaf(parent, name)
        entry = leaf.find(name)
        if entry is None:
            raise fail(errno.ENOENT, name)
        return leaf, entry

    def _drop(self, entry: Entry) -> tuple[list[Change], Inode | None]:
        """What taking one name of a file away changes besides the directory; its inode then, unless that is lost."""
        try:
            cell = self.cells.load(inode_key(entry.ino))
        except _LOST as error:
            self._say_lost(entry.ino, entry.name, error)
            return [], None
        if cell.value is None:
            return [], None
        inode = Inode.unpack(cell.value)
        inode.nlink -= 1
        inode.ctime = time.time_ns()
        changes = [Change(cell, inode.pack())]
        if inode.nlink == 0:
            changes.append(self.members.burial(entry.ino))
        return changes, inode

    def _dropped(self, ino: int, inode: Inode | None) -> None:
        """A name of it was taken away."""
        if inode is not None and inode.nlink == 0:
            self.members.buried(ino)
            self._buried_bytes += inode.top
            if len(self.members.waiting) >= _FREE_AT_ONCE or self._buried_bytes >= _FREE_BYTES:
                self._afterwards(self.free)

    def rmdir(self, parent: int, name: bytes) -> None:
        """ENOENT, ENOTDIR, ENOTEMPTY."""
        while True:
            leaf, entry = self._entry(parent, name)
            if not stat.S_ISDIR(entry.type):
                raise fail(errno.ENOTDIR, name)
            if self.cells.commit([leaf.removed(name).change(), *self._removal(entry)]):
                break
        self._touch(parent)

    def _removal(self, entry: Entry) -> list[Change]:
        """What takes an empty directory away, besides its name."""
        try:
            changes = [self.dirs.removal(entry.ino)]
        except FileNotFoundError:
            return []  # another mount is taking it away: the name has changed, too
        for key in (inode_key(entry.ino), xattr_key(entry.ino)):
            try:
                cell = self.cells.load(key)
            except _LOST as error:
                self._say_lost(entry.ino, entry.name, error)
                continue
            if cell.value is not None:
                changes.append(Change(cell, None))
        return changes

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
        """Atomic, also over what is there. ENOENT, EEXIST, ENOTEMPTY, EISDIR, ENOTDIR, EINVAL."""
        check_name(new_name)
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise fail(errno.EINVAL)
        while True:
            changes, moved, dropped = self._renaming(parent, name, new_parent, new_name, flags)
            if not changes:
                return
            if self.cells.commit(changes):
                break
        if dropped is not None:
            self._dropped(*dropped)
        self._touch(parent)
        if new_parent != parent:
            self._touch(new_parent)
        for ino in moved:
            self._afterwards(functools.partial(self._changed, ino))

    def _changed(self, ino: int) -> None:
        def change(old: bytes | None) -> bytes | None:
            if old is None:
                return None  # deleted meanwhile
            inode = Inode.unpack(old)
            inode.ctime = time.time_ns()
            return inode.pack()

        self.cells.update(inode_key(ino), change)

    def _renaming(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> tuple[list[Change], list[int], tuple[int, Inode | None] | None]:
        """The changes; the inodes that get another ctime afterwards; the one that lost a name."""
        self._check_dir(new_parent)
        target = self.dirs.roomy_leaf(new_parent, new_name)
        source, entry = self._entry(parent, name)
        same = source.cell.key == target.cell.key
        if same:
            target = source  # it was read later: the entry is in it
        other = target.find(new_name)
        exchange = flags == RENAME_EXCHANGE
        if other is None and exchange:
            raise fail(errno.ENOENT, new_name)
        if other is not None and flags == RENAME_NOREPLACE:
            raise fail(errno.EEXIST, new_name)
        if other is not None and other.ino == entry.ino:
            return [], [], None
        changes: list[Change] = []
        replaced: tuple[int, Inode | None] | None = None
        moved = [entry.ino]
        if other is not None and exchange:
            moved.append(other.ino)
        elif other is not None:
            if stat.S_ISDIR(other.type) != stat.S_ISDIR(entry.type):
                raise fail(errno.EISDIR if stat.S_ISDIR(other.type) else errno.ENOTDIR, new_name)
            if stat.S_ISDIR(other.type):
                changes += self._removal(other)
            else:
                dropped, inode = self._drop(other)
                changes += dropped
                replaced = other.ino, inode
        if parent != new_parent:
            moves = [(entry, new_parent)] + ([(other, parent)] if other is not None and exchange else [])
            changes += self._moving([(one, to) for one, to in moves if stat.S_ISDIR(one.type)])
        source = source.removed(name)
        target = source if same else target
        if other is not None:
            target = target.removed(new_name)
        target = target.added(new_name, entry.ino, entry.type)
        source = target if same else source
        if other is not None and exchange:
            source = source.added(name, other.ino, other.type)
        changes.append(source.change())
        if not same:
            changes.append(target.change())
        return changes, moved, replaced

    def _moving(self, moves: list[tuple[Entry, int]]) -> list[Change]:
        """What moving directories to other parents changes in them. EINVAL: into themselves.

        The cell MOVES changes with it, so no other such move can make a loop of ours at the same time.
        """
        if not moves:
            return []
        cell = self.cells.load(MOVES)
        changes = [Change(cell, self.cells.fresh_tag())]
        for entry, to in moves:
            above = to
            while above != ROOT:
                if above == entry.ino:
                    raise fail(errno.EINVAL, entry.name)
                above = self._check_dir(above).parent
            inode_cell = self.cells.load(inode_key(entry.ino))
            if inode_cell.value is not None:
                inode = Inode.unpack(inode_cell.value)
                inode.parent = to
                changes.append(Change(inode_cell, inode.pack()))
        return changes

    # --- the end of inodes --------------------------------------------------------------------------------

    def free(self) -> bool:
        """Frees what was deleted and nobody has open. Whether there was any."""
        inodes = self.members.free_now()
        if inodes:
            self._free(inodes)
        self._buried_bytes = 0
        return bool(inodes)

    def _free(self, inodes: list[int]) -> None:
        """As many as is possible, whatever becomes of one of them; then it raises the first error."""
        first: OSError | MemfaasError | None = None
        freed = []
        for ino in inodes:
            try:
                self._free_one(ino)
            except _LOST as error:
                log.error("of the deleted inode %d something is lost, and the rest of it stays: %s", ino, error)
            except (OSError, MemfaasError) as error:
                first = first or error
                continue
            freed.append(ino)
        self.members.freed(freed)
        if first is not None:
            raise first

    def _free_one(self, ino: int) -> None:
        cell = self.cells.load(inode_key(ino))
        if cell.value is not None:
            inode = Inode.unpack(cell.value)
            self.ends.remove_all(ino, inode)
            if inode.has_xattrs:
                self.cells.update(xattr_key(ino), lambda _: None)
            self.cells.update(inode_key(ino), lambda _: None)

    # --- extended attributes --------------------------------------------------------------------------------

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        if not self.inode(ino).has_xattrs:
            return {}
        value = self.cells.read(xattr_key(ino))
        return {} if value is None else msgpack.unpackb(value)

    def set_xattr(self, ino: int, name: bytes, value: bytes | None) -> None:
        """None removes it. ENODATA, ENOSPC."""
        while True:
            cell, inode_cell = self.cells.load(xattr_key(ino)), self.cells.load(inode_key(ino))
            if inode_cell.value is None:
                raise fail(errno.ESTALE)
            xattrs: dict[bytes, bytes] = {} if cell.value is None else msgpack.unpackb(cell.value)
            if value is None and name not in xattrs:
                raise fail(errno.ENODATA)
            if value is None:
                del xattrs[name]
            else:
                xattrs[name] = value
            packed: bytes | None = msgpack.packb(xattrs) if xattrs else None
            if packed is not None and len(packed) > _XATTRS_MAX:
                raise fail(errno.ENOSPC)
            inode = Inode.unpack(inode_cell.value)
            inode.has_xattrs = int(bool(xattrs))
            inode.ctime = time.time_ns()
            if self.cells.commit([Change(cell, packed), Change(inode_cell, inode.pack())]):
                return
