"""The mounts of one file system, and the files that one of them deleted while another may have them open.

Each member gives a sign of life every BEAT_S: a number that grows, and which of the inodes that were *buried* (no
name leads to them any more) it has open. A member buries in its own list, in the very transaction that takes the
last name, so nothing is forgotten when it dies. It frees a buried inode when nobody of its own has it open, and
every other member has given two signs since (the first may have been under way) and does not hold it. No inode
without a name can be opened, so nobody who comes later matters.

A member whose sign does not change for DEAD_S is dead, by the clock of whoever watches it; one of the others takes over
its list. If it was only stopped, it joins again when it goes on: what it may have lost are files that were deleted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import msgpack

from memfaas.fs.cells import Cells, Change
from memfaas.fs.records import MEMBERS, number, number_of

BEAT_S = 2.0
DEAD_S = 30.0

log = logging.getLogger(__name__)


def _sign_key(member: bytes) -> bytes:
    return b"m" + member


def _grave_key(member: bytes) -> bytes:
    return b"g" + member


def _numbers(data: bytes | None) -> list[int]:
    data = data or b""
    return [number_of(data[at : at + 8]) for at in range(0, len(data), 8)]


def _members(data: bytes | None) -> list[bytes]:
    return [] if data is None else list(msgpack.unpackb(data))


def _packed_members(members: Iterable[bytes]) -> bytes:
    packed: bytes = msgpack.packb(sorted(members))
    return packed


@dataclass
class _Sign:
    number: int
    held: frozenset[int]
    changed: float
    """When it was seen to change, by our clock."""


class Members:
    def __init__(self, cells: Cells, is_open: Callable[[int], bool]) -> None:
        self.id = os.urandom(8)
        self._cells = cells
        self._is_open = is_open
        self._signs: dict[bytes, _Sign] = {}
        self._waiting: dict[int, dict[bytes, int]] = {}
        """Buried inodes; of each member that was there, the number of its sign then."""
        self._beats = 0

    def join(self) -> None:
        self._sign(())
        self._cells.update(MEMBERS, lambda old: _packed_members({*_members(old), self.id}))

    def others(self) -> list[bytes]:
        return [member for member in _members(self._cells.read(MEMBERS)) if member != self.id]

    def alone(self) -> Change | None:
        """The list of mounts as it is, for a transaction that needs it to stay so; None when there are others."""
        cell = self._cells.load(MEMBERS)
        return Change(cell, cell.value) if _members(cell.value) == [self.id] else None

    def _sign(self, held: Iterable[int]) -> None:
        self._beats += 1
        value = msgpack.packb([self._beats, list(held)])
        self._cells.update(_sign_key(self.id), lambda old: value)

    def _look(self, member: bytes) -> _Sign | None:
        value = self._cells.read(_sign_key(member))
        if value is None:
            return None
        count, held = msgpack.unpackb(value)
        before = self._signs.get(member)
        if before is None or before.number != count:
            before = self._signs[member] = _Sign(count, frozenset(held), time.monotonic())
        return before

    # --- burials ----------------------------------------------------------------------------------------

    def burial(self, ino: int) -> Change:
        """For the transaction that takes the last name. Call `buried` when it is committed."""
        cell = self._cells.load(_grave_key(self.id))
        return Change(cell, (cell.value or b"") + number(ino))

    def buried(self, ino: int) -> None:
        self._waiting[ino] = {
            member: sign.number for member in self.others() if (sign := self._look(member)) is not None
        }

    @property
    def waiting(self) -> Collection[int]:
        return self._waiting

    def free_now(self) -> list[int]:
        """Those of the buried inodes that nobody can have open any more."""
        if not self._waiting:
            return []
        signs = {member: self._look(member) for member in self.others()}
        return [
            ino
            for ino, seen in self._waiting.items()
            if not self._is_open(ino)
            and not any(
                sign is not None and member in seen and (sign.number < seen[member] + 2 or ino in sign.held)
                for member, sign in signs.items()
            )
        ]

    def freed(self, inodes: Collection[int]) -> None:
        """Nothing is left of them."""
        gone = set(inodes)

        def without(old: bytes | None) -> bytes | None:
            return b"".join(number(ino) for ino in _numbers(old) if ino not in gone) or None

        self._cells.update(_grave_key(self.id), without)
        for ino in gone:
            self._waiting.pop(ino, None)

    # --- signs of life ------------------------------------------------------------------------------------

    def beat(self) -> None:
        """To be called every BEAT_S."""
        others = self.others()
        held = {
            ino for member in others for ino in _numbers(self._cells.read(_grave_key(member))) if self._is_open(ino)
        }
        if self._cells.read(_sign_key(self.id)) is None:
            log.warning("this mount gave no sign of life for %g s, and was taken for dead: its locks are lost", DEAD_S)
            self.id = os.urandom(8)
            self._waiting.clear()  # another one has taken them over
            self.join()
        self._sign(held)
        for member in others:
            sign = self._look(member)
            if sign is None or time.monotonic() > sign.changed + DEAD_S:
                self._take_over(member)

    def _take_over(self, member: bytes) -> None:
        members, sign, grave, own = map(
            self._cells.load, (MEMBERS, _sign_key(member), _grave_key(member), _grave_key(self.id))
        )
        left = {one for one in _members(members.value) if one != member}
        changes = [Change(members, _packed_members(left))]
        if sign.value is not None:
            if member in self._signs and msgpack.unpackb(sign.value)[0] != self._signs[member].number:
                return  # it lives
            changes.append(Change(sign, None))
        if grave.value is not None:
            changes += [Change(grave, None), Change(own, (own.value or b"") + grave.value)]
        if self._cells.commit(changes):
            log.warning("a mount of this file system is gone; what it had deleted is freed here")
            self._signs.pop(member, None)
            for ino in _numbers(grave.value):
                self.buried(ino)

    def leave(self) -> None:
        """What is still buried is left to the others; when there are none, nobody can have it open."""
        while True:
            members, sign, grave = map(self._cells.load, (MEMBERS, _sign_key(self.id), _grave_key(self.id)))
            left = {one for one in _members(members.value) if one != self.id}
            changes = [Change(sign, None)] if sign.value is not None else []
            if grave.value is None:
                changes.append(Change(members, _packed_members(left)))
            if not changes or self._cells.commit(changes):
                return  # with a grave it stays a member without a sign, and is taken over at once
