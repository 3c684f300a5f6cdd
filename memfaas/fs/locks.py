"""Locks of files between all mounts: a cell for each file that has any, with who holds which range.

Nobody waits in here: who does not get a lock asks again. What a mount held that is dead (members.py) holds nobody up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgpack

from memfaas.fs.cells import Cells
from memfaas.fs.members import Members
from memfaas.fs.records import lock_key

POSIX = 0
"""Of a process, for a range."""
FLOCK = 1
"""Of an open file, for all of it."""
END = 1 << 63


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
        self._held: set[tuple[int, int, int]] = set()
        """Inode, kind and owner of what this mount may hold."""

    def _lock(self, kind: int, owner: int, exclusive: bool, start: int, end: int, pid: int) -> Lock:
        return Lock(self._members.id, kind, owner, exclusive, start, end, pid)

    def take(
        self, ino: int, kind: int, owner: int, *, exclusive: bool, start: int = 0, end: int = END, pid: int = 0
    ) -> bool:
        """Locks a range, in place of what the owner had of it. False when somebody else's lock stands in the way."""
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
        self._held.add((ino, kind, owner))
        return True

    def give(self, ino: int, kind: int, owner: int, *, start: int = 0, end: int = END) -> None:
        """Unlocks a range, whether it was locked or not."""
        if (ino, kind, owner) not in self._held:
            return
        gone = self._lock(kind, owner, False, start, end, 0)
        self._cells.update(lock_key(ino), lambda old: _packed(_without(_unpacked(old), gone)))
        if (start, end) == (0, END):
            self._held.discard((ino, kind, owner))

    def holds(self, ino: int, kind: int, owner: int) -> bool:
        """Whether it may be that this owner holds a lock."""
        return (ino, kind, owner) in self._held

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
