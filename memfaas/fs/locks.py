"""Locks of files between all mounts: a cell for each file that has any, with who holds which range.

Nobody waits in here: who does not get a lock asks again. What a mount held that is dead (members.py) holds nobody up.
If it was only stopped, what it had open of the files whose locks it has lost can't be read or written any more, as with
NFS: its program must open them, and lock them, again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import msgpack

from memfaas.errors import LeaseLost, MemfaasError, TransportError
from memfaas.fs.cells import Cells
from memfaas.fs.errors import fail
from memfaas.fs.members import Members
from memfaas.fs.records import lock_key

POSIX = 0
"""Of a process, for a range."""
FLOCK = 1
"""Of an open file, for all of it."""
END = 1 << 63

log = logging.getLogger(__name__)


class Lock(NamedTuple):
    member: bytes
    kind: int
    owner: int
    exclusive: bool
    start: int
    end: int
    pid: int

    def is_of(self, other: Lock) -> bool:
        return (self.member, self.kind, self.owner) == (other.member, other.kind, other.owner)

    def overlaps(self, other: Lock) -> bool:
        return self.kind == other.kind and self.start < other.end and other.start < self.end

    def stops(self, other: Lock) -> bool:
        return self.overlaps(other) and (self.exclusive or other.exclusive) and not self.is_of(other)


def _unpacked(data: bytes | None) -> list[Lock]:
    return [] if data is None else [Lock(*fields) for fields in msgpack.unpackb(data)]


def _packed(locks: Iterable[Lock]) -> bytes | None:
    kept = [tuple(lock) for lock in locks]
    packed: bytes | None = msgpack.packb(kept) if kept else None
    return packed


def _without(locks: Iterable[Lock], gone: Lock) -> Iterator[Lock]:
    """What is left when an owner gives a range up."""
    for lock in locks:
        if not (lock.is_of(gone) and lock.overlaps(gone)):
            yield lock
            continue
        if lock.start < gone.start:
            yield lock._replace(end=gone.start)
        if gone.end < lock.end:
            yield lock._replace(start=gone.end)


class _Stopped(Exception):
    pass


class Locks:
    def __init__(self, cells: Cells, members: Members) -> None:
        self._cells = cells
        self._members = members
        self._held: dict[int, set[tuple[int, int]]] = {}
        """Of each inode: kind and owner of what this mount may hold."""
        self._lost: dict[int, int] = {}
        """Of each inode of which locks were lost: the last term of the mount in which some were held."""
        self._owed: list[tuple[int, Lock]] = []
        """What was to be given up, and could not."""

    def _lock(self, kind: int, owner: int, exclusive: bool, start: int, end: int, pid: int) -> Lock:
        return Lock(self._members.id, kind, owner, exclusive, start, end, pid)

    def take(
        self, ino: int, kind: int, owner: int, *, exclusive: bool, start: int = 0, end: int = END, pid: int = 0
    ) -> bool:
        """Locks a range, in place of what the owner had of it. False when somebody else's lock stands in the way."""
        self._members.confirm()
        self.give_owed()
        wanted = self._lock(kind, owner, exclusive, start, end, pid)

        def change(old: bytes | None) -> bytes | None:
            locks = _unpacked(old)
            if any(lock.stops(wanted) for lock in locks):
                locks = self._of_the_living(locks)
                if any(lock.stops(wanted) for lock in locks):
                    raise _Stopped
            return _packed([*_without(locks, wanted), wanted])

        try:
            self._cells.update(lock_key(ino), change)
        except _Stopped:
            return False
        except TransportError:  # it may be there, and is given up with all that this owner has
            self._held.setdefault(ino, set()).add((kind, owner))
            raise
        self._held.setdefault(ino, set()).add((kind, owner))
        return True

    def give(self, ino: int, kind: int, owner: int, *, start: int = 0, end: int = END) -> None:
        """Unlocks a range, whether it was locked or not. What fails is tried again later."""
        if not self.holds(ino, kind, owner):
            return
        if (start, end) == (0, END):
            self._held[ino].discard((kind, owner))
            if not self._held[ino]:
                del self._held[ino]
        gone = self._lock(kind, owner, False, start, end, 0)
        try:
            self._give(ino, gone)
        except MemfaasError:
            self._owed.append((ino, gone))
            raise

    def _give(self, ino: int, gone: Lock) -> None:
        self._cells.update(lock_key(ino), lambda old: _packed(_without(_unpacked(old), gone)))

    def give_owed(self) -> None:
        """Before anything else is locked: it may be the same range."""
        while self._owed:
            ino, gone = self._owed[0]
            try:
                self._give(ino, gone)
            except LeaseLost as error:
                log.error("the locks of inode %d are lost: %s", ino, error)
            del self._owed[0]

    def holds(self, ino: int, kind: int, owner: int) -> bool:
        """Whether it may be that this owner holds a lock."""
        return (kind, owner) in self._held.get(ino, ())

    def check(self, ino: int, term: int) -> None:
        """EIO for what was opened in a term of this mount in which locks of the inode were held that are lost now:
        another mount may have the lock, and not expect any changes."""
        if ino in self._held:
            self._members.confirm()
        if self._lost and term <= self._lost.get(ino, -1):
            raise fail(errno.EIO)

    @property
    def held(self) -> Collection[int]:
        """Inodes of which this mount may hold locks."""
        return self._held.keys()

    def lose(self) -> list[int]:
        """The others took this mount for dead. Which inodes it had locks of."""
        lost = list(self._held)
        self._lost.update((ino, self._members.term) for ino in lost)
        self.forget()
        return lost

    def forget(self) -> None:
        """In a forked child: they are its parent's."""
        self._held.clear()
        self._owed.clear()

    def in_the_way(self, ino: int, owner: int, *, exclusive: bool, start: int, end: int) -> Lock | None:
        """A POSIX lock that such a one would have to wait for. Its pid is 0 when it is another mount's."""
        wanted = self._lock(POSIX, owner, exclusive, start, end, 0)
        for lock in self._of_the_living(_unpacked(self._cells.read(lock_key(ino)))):
            if lock.stops(wanted):
                return lock if lock.member == self._members.id else lock._replace(pid=0)
        return None

    def _of_the_living(self, locks: list[Lock]) -> list[Lock]:
        living = {self._members.id, *self._members.others()}
        return [lock for lock in locks if lock.member in living]
