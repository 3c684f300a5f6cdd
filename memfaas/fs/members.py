"""The mounts of one file system, and the files that one of them deleted while another may have them open.

Each member gives a sign of life every BEAT_S: a number that grows, and which of the inodes that were *buried* (no
name leads to them any more) it has open. A member buries in its own list, in the very transaction that takes the
last name, so nothing is forgotten when it dies. It frees a buried inode when nobody of its own has it open, and
every other member has given two signs since (the first may have been under way) and does not hold it. No inode
without a name can be opened, so nobody who comes later matters.

The number grows only between operations, for what is open must be known then. That a member lives although its
operations take long is said by a second number of its sign, which a thread of its own raises (pulse.py).

A member whose sign does not change for DEAD_S is dead, by the clock of whoever watches it; one of the others takes over
its list, and its sign is gone. Nobody makes a sign that is gone anew: so a member that was only stopped notices when
it goes on, and joins again under another name. Its locks are lost then, and deleted files that it had open. As long
as its own clock says that its last sign is younger than half of DEAD_S, it need not look.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import msgpack

from memfaas.errors import LeaseLost
from memfaas.fs.cells import Cell, Cells, Change
from memfaas.fs.records import MEMBERS, number, numbers_of

BEAT_S = 2.0
DEAD_S = 30.0
_NAMES_TRIED = 16

log = logging.getLogger(__name__)


def _sign_key(member: bytes) -> bytes:
    return b"m" + member


def _grave_key(member: bytes) -> bytes:
    return b"g" + member


def _members(data: bytes | None) -> list[bytes]:
    return [] if data is None else list(msgpack.unpackb(data))


def _packed_members(members: Iterable[bytes]) -> bytes:
    packed: bytes = msgpack.packb(sorted(members))
    return packed


def _now() -> float:
    """Goes on while the machine sleeps, as the clocks of the others do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Gone(Exception):
    """The others took this member for dead."""


@dataclass
class _Sign:
    number: int
    pulse: int
    held: frozenset[int]
    changed: float
    """When it was seen to change, by our clock."""

    def is_as(self, value: bytes) -> bool:
        number, pulse, _ = msgpack.unpackb(value)
        return (self.number, self.pulse) == (number, pulse)


def _packed_sign(number: int, pulse: int, held: Iterable[int]) -> bytes:
    packed: bytes = msgpack.packb([number, pulse, list(held)])
    return packed


class Members:
    """Not for several threads at once, but for `pulse`."""

    def __init__(self, cells: Cells, is_open: Callable[[int], bool], lost: Callable[[], None]) -> None:
        """lost: called when the others took this mount for dead, so that its locks are lost."""
        self.id = b""
        """Another one after each `join`; empty before."""
        self.term = 0
        """How often it joined. What belongs to an earlier term is lost."""
        self._cells = cells
        self._is_open = is_open
        self._lost = lost
        self._signs: dict[bytes, _Sign] = {}
        self._waiting: dict[int, dict[bytes, int] | None] = {}
        """Buried inodes; of each member that was there, the number of its sign then. None: not looked at yet."""
        self._former: list[bytes] = []
        """Names that were ours, and may have buried something since others took them over."""
        self._beats = 0
        self._confirmed = float("-inf")
        """When the last sign that succeeded was begun."""

    def join(self) -> None:
        """Under a new name."""
        self.term += 1
        self._beats = 1
        self._confirmed = float("-inf")
        self._waiting.clear()  # whoever took them over frees them
        started = _now()
        name = self._new_name()
        self._cells.update(MEMBERS, lambda old: _packed_members({*_members(old), name}))
        if self.id:
            self._former.append(self.id)
        self.id = name
        self._confirmed = started

    def _new_name(self) -> bytes:
        """With a sign of life."""
        for left in reversed(range(_NAMES_TRIED)):
            name = os.urandom(8)
            try:
                self._cells.read(_grave_key(name))
                self._cells.swap(Cell(_sign_key(name), None, b""), _packed_sign(self._beats, 0, ()))
                return name
            except LeaseLost:  # in lost memory; another name may lie elsewhere
                if not left:
                    raise
        raise AssertionError

    def after_fork(self) -> None:
        """In a forked child: the name, and what was buried, are the parent's. Call `join`."""
        self.id = b""
        self._former.clear()
        self._signs.clear()

    def others(self) -> list[bytes]:
        return [member for member in _members(self._cells.read(MEMBERS)) if member != self.id]

    def _read(self, key: bytes) -> bytes | None:
        """Of another member. What is lost with its memory counts as gone: it has another name by now."""
        try:
            return self._cells.read(key)
        except LeaseLost:
            return None

    def _load(self, key: bytes) -> Cell:
        try:
            return self._cells.load(key)
        except LeaseLost:
            return Cell(key, None, b"")

    def alone(self) -> Change | None:
        """The list of mounts as it is, for a transaction that needs it to stay so; None when there are others."""
        cell = self._cells.load(MEMBERS)
        return Change(cell, cell.value) if _members(cell.value) == [self.id] else None

    def _look(self, member: bytes) -> _Sign | None:
        value = self._read(_sign_key(member))
        if value is None:
            return None
        before = self._signs.get(member)
        if before is None or not before.is_as(value):
            count, pulse, held = msgpack.unpackb(value)
            before = self._signs[member] = _Sign(count, pulse, frozenset(held), _now())
        return before

    # --- burials ----------------------------------------------------------------------------------------

    def burial(self, ino: int) -> Change:
        """For the transaction that takes the last name. Call `buried` when it is committed."""
        cell = self._cells.load(_grave_key(self.id))
        return Change(cell, (cell.value or b"") + number(ino))

    def buried(self, ino: int) -> None:
        """Asks nothing of the store, and so never fails."""
        self._waiting[ino] = None

    @property
    def waiting(self) -> Collection[int]:
        return self._waiting

    def free_now(self) -> list[int]:
        """Those of the buried inodes that nobody can have open any more."""
        if not self._waiting:
            return []
        self.confirm()
        signs = {member: sign for member in self.others() if (sign := self._look(member)) is not None}
        found = []
        for ino, seen in self._waiting.items():
            if seen is None:
                seen = self._waiting[ino] = {member: sign.number for member, sign in signs.items()}
            if not self._is_open(ino) and not any(
                member in seen and (sign.number < seen[member] + 2 or ino in sign.held)
                for member, sign in signs.items()
            ):
                found.append(ino)
        return found

    def freed(self, inodes: Collection[int]) -> None:
        """Nothing is left of them."""
        gone = set(inodes)

        def without(old: bytes | None) -> bytes | None:
            return b"".join(number(ino) for ino in numbers_of(old) if ino not in gone) or None

        self._cells.update(_grave_key(self.id), without)
        for ino in gone:
            self._waiting.pop(ino, None)

    # --- signs of life ------------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Makes sure that the others count this mount among the living. When they took it for dead, it has lost its
        locks, and joins anew."""
        if _now() >= self._confirmed + DEAD_S / 2:
            self._sign()

    def pulse(self, cells: Cells) -> None:
        """Says that it lives, from another thread, which has its own Cells. Gone."""
        member, started = self.id, _now()

        def raised(old: bytes | None) -> bytes:
            if old is None:
                raise Gone
            count, pulse, held = msgpack.unpackb(old)
            return _packed_sign(count, pulse + 1, held)

        cells.update(_sign_key(member), raised)
        if member == self.id:
            self._confirmed = max(self._confirmed, started)

    def _sign(self) -> None:
        held = {
            ino for member in self.others() for ino in numbers_of(self._read(_grave_key(member))) if self._is_open(ino)
        }
        started = _now()
        self._beats += 1

        def raised(old: bytes | None) -> bytes:
            if old is None:
                raise Gone
            return _packed_sign(self._beats, msgpack.unpackb(old)[1], held)

        try:
            self._cells.update(_sign_key(self.id), raised)
            self._cells.read(_grave_key(self.id))
        except Gone:
            log.warning("this mount gave no sign of life for %g s, and was taken for dead: its locks are lost", DEAD_S)
        except LeaseLost as error:
            log.warning("the locks of this mount are lost: %s", error)
        else:
            self._confirmed = max(self._confirmed, started)
            return
        self._lost()
        self.join()

    def beat(self) -> None:
        """To be called every BEAT_S."""
        self._sign()
        for former in list(self._former):
            if self._inherit(former):
                self._former.remove(former)
        for member in self.others():
            sign = self._look(member)
            if sign is None or _now() > sign.changed + DEAD_S:
                self._take_over(member)

    def _inherit(self, former: bytes) -> bool:
        """What was buried under a name that was ours when others had taken it over already."""
        grave, own = self._load(_grave_key(former)), self._cells.load(_grave_key(self.id))
        if grave.value is None:
            return True
        if not self._cells.commit([Change(grave, None), Change(own, (own.value or b"") + grave.value)]):
            return False
        for ino in numbers_of(grave.value):
            self.buried(ino)
        return True

    def _take_over(self, member: bytes) -> None:
        members, own = self._cells.load(MEMBERS), self._cells.load(_grave_key(self.id))
        sign, grave = self._load(_sign_key(member)), self._load(_grave_key(member))
        left = {one for one in _members(members.value) if one != member}
        changes = [Change(members, _packed_members(left))]
        if sign.value is not None:
            seen = self._signs.get(member)
            if seen is None or not seen.is_as(sign.value):
                return  # it lives
            changes.append(Change(sign, None))
        if grave.value is not None:
            changes += [Change(grave, None), Change(own, (own.value or b"") + grave.value)]
        if self._cells.commit(changes):
            log.warning("a mount of this file system is gone; what it had deleted is freed here")
            self._signs.pop(member, None)
            for ino in numbers_of(grave.value):
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
