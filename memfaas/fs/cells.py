"""Cells: values that change only if nobody else changed them, one at a time or several at once.

Each cell has a *tag*, new with every change, and the store changes it only if it still has the tag that was read
(`_save_if`). That is all that mounts on many nodes have in common: no locks, no leases, no clocks. One that was
stopped for an hour and goes on finds other tags, and its change does not happen.

Several cells at once are a transaction (Harris, Fraser and Pratt 2002): a record says that it is pending; each cell
gets a *claim* in place of its value, which holds the old and the new one and names the record; the record changes to
committed, and in this moment all cells have their new values; and the claims are replaced by these. Who reads a claim
asks the record which of the two values is the right one, and never waits. Who wants to change the cell completes
what is committed, and aborts what is pending if it does not end by itself in some milliseconds. So a mount that is
killed at whatever step leaves nothing half done, and nothing in anybody's way.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgpack

from memfaas.errors import MemfaasError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SPACE = 0
_CLAIM = b"\xff"
"""First byte of a claim; no other value begins so."""
_PENDING, _COMMITTED, _ABORTED = b"P", b"C", b"A"
_PATIENCE_S = 0.02
"""How long a transaction that stands in the way may go on. It normally takes less than a millisecond."""
_FIRST_PAUSE_S = 0.0002
_TAG = struct.Struct("<Q")
_64_BITS = (1 << 64) - 1

log = logging.getLogger(__name__)


class KeyValue(Protocol):
    """What a file system asks of a store: memfaas.client.store.Store, whose docstrings say what each does."""

    def _load(self, key: bytes, space: int) -> tuple[bytes, bytes, int] | None: ...
    def _load_into(self, key: bytes, space: int, buffer: Buffer) -> tuple[int, bytes, int] | None: ...
    def _save(self, key: bytes, space: int, value: Buffer, meta: bytes, flags: int) -> bytes | None: ...
    def _remove(self, key: bytes, space: int) -> tuple[bool, bytes | None]: ...
    def _save_if(self, key: bytes, space: int, value: Buffer, tag: bytes, flags: int, expected: bytes) -> bool: ...
    def _remove_if(self, key: bytes, space: int, expected: bytes) -> bool: ...
    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...
    def keys(self) -> list[bytes]: ...
    def fabrics(self) -> dict[str, int]: ...
    def _room(self) -> tuple[int, int]: ...
    def _drops(self) -> bool: ...


class Cell(NamedTuple):
    """What was read; `value` is None and `tag` empty when there is none."""

    key: bytes
    value: bytes | None
    tag: bytes


class Change(NamedTuple):
    cell: Cell
    value: bytes | None
    """None: it goes."""


class Cells:
    def __init__(self, store: KeyValue) -> None:
        self._store = store
        self.after_fork()
        _all.add(self)

    def after_fork(self) -> None:
        """The tags of the child must be others than those of the parent."""
        self._tags = itertools.count(int.from_bytes(os.urandom(8), "little"))
        self._name = os.urandom(8)

    def fresh_tag(self) -> bytes:
        """One that no cell ever had."""
        return _TAG.pack(next(self._tags) % _64_BITS + 1)

    # --- one cell -----------------------------------------------------------------------------------

    def read(self, key: bytes) -> bytes | None:
        """The value now. Never waits for another mount."""
        while True:
            found = self._store._load(key, _SPACE)
            if found is None:
                return None
            if found[0][:1] != _CLAIM:
                return found[0]
            claim = _Claim.unpack(found[0])
            state = self._store._load(claim.record, _SPACE)
            if state is not None:
                return claim.new if state[0] == _COMMITTED else claim.old

    def read_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        values = self._store.get_many(keys)
        for index, value in enumerate(values):
            if value is not None and value[:1] == _CLAIM:
                values[index] = self.read(keys[index])
        return values

    def load(self, key: bytes) -> Cell:
        """The value now, to be changed. What stands in the way is completed or aborted."""
        give_up = pause = 0.0
        while True:
            found = self._store._load(key, _SPACE)
            if found is None:
                return Cell(key, None, b"")
            value, tag, _ = found
            if value[:1] != _CLAIM:
                return Cell(key, value, tag)
            claim = _Claim.unpack(value)
            record = self._store._load(claim.record, _SPACE)
            if record is None:
                continue  # it has just ended
            if record[0] == _PENDING:
                now = time.monotonic()
                give_up = give_up or now + _PATIENCE_S
                if now < give_up:
                    pause = min(2 * pause, 0.005) or _FIRST_PAUSE_S
                    time.sleep(pause * random.uniform(0.5, 1.5))
                    continue
                self._store._save_if(claim.record, _SPACE, _ABORTED, self.fresh_tag(), 0, record[1])
                continue
            self._settle(key, claim.new if record[0] == _COMMITTED else claim.old, tag)

    def swap(self, cell: Cell, value: bytes | None) -> bool:
        """Changes a cell, unless somebody else did since it was read: then False."""
        if value is not None:
            return self._store._save_if(cell.key, _SPACE, value, self.fresh_tag(), 0, cell.tag)
        return not cell.tag or self._store._remove_if(cell.key, _SPACE, cell.tag)

    def update(self, key: bytes, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Changes a cell whatever others do: `change` makes the new value of the old one, perhaps several times.

        Returns the new value. When `change` raises, nothing was changed.
        """
        while True:
            cell = self.load(key)
            value = change(cell.value)
            if value == cell.value or self.swap(cell, value):
                return value

    # --- several --------------------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> bool:
        """All of the changes or none: False when one of the cells was changed since it was read.

        A cell that must stay as it is counts as changed to its own value. When it raises, nothing was changed, except
        that a TransportError may leave it open.
        """
        if len(changes) == 1:
            return self.swap(changes[0].cell, changes[0].value)
        pending = self.fresh_tag()
        record = b"t" + self._name + pending
        if not self._store._save_if(record, _SPACE, _PENDING, pending, 0, b""):
            raise RuntimeError("two transactions have the same name")
        claimed: list[tuple[Change, bytes]] = []
        committed = clear = False
        try:
            for change in sorted(changes, key=lambda change: change.cell.key):
                tag = self.fresh_tag()
                claim = _Claim(record, change.cell.value, change.value)
                claimed.append((change, tag))
                if not self._store._save_if(change.cell.key, _SPACE, claim.pack(), tag, 0, change.cell.tag):
                    claimed.pop()
                    break
            else:
                committed = self._store._save_if(record, _SPACE, _COMMITTED, self.fresh_tag(), 0, pending)
            clear = True
        except MemfaasError:
            # Whether the last step happened may be unknown: the record decides.
            if not self._store._save_if(record, _SPACE, _ABORTED, self.fresh_tag(), 0, pending):
                found = self._store._load(record, _SPACE)
                committed = found is not None and found[0] == _COMMITTED
            if not committed:
                self._clear(record, claimed, committed=False, forget=False)
                raise
        self._clear(record, claimed, committed, forget=clear)
        return committed

    def _clear(self, record: bytes, claimed: Sequence[tuple[Change, bytes]], committed: bool, forget: bool) -> None:
        """Takes the claims away. What can't be now (the store is full, say) is left for whoever changes the cell next.

        forget: the record goes, too. It must stay when a claim whose end is not known may still come to be.
        """
        try:
            if not committed:
                found = self._store._load(record, _SPACE)
                if found is not None and found[0] == _PENDING:
                    self._store._save_if(record, _SPACE, _ABORTED, self.fresh_tag(), 0, found[1])
            for change, tag in claimed:
                self._settle(change.cell.key, change.value if committed else change.cell.value, tag)
            if forget:
                self._store._remove(record, _SPACE)
        except MemfaasError as error:
            log.info("claims of a transaction stay for now: %s", error)

    def _settle(self, key: bytes, value: bytes | None, tag: bytes) -> None:
        if value is None:
            self._store._remove_if(key, _SPACE, tag)
        else:
            self._store._save_if(key, _SPACE, value, self.fresh_tag(), 0, tag)


class _Claim(NamedTuple):
    record: bytes
    old: bytes | None
    new: bytes | None

    def pack(self) -> bytes:
        packed: bytes = _CLAIM + msgpack.packb(tuple(self))
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> _Claim:
        return cls(*msgpack.unpackb(memoryview(data)[1:]))


_all: weakref.WeakSet[Cells] = weakref.WeakSet()


def _after_fork() -> None:
    for cells in list(_all):
        cells.after_fork()


os.register_at_fork(after_in_child=_after_fork)
