"""lz4 for the values that gain from it, and the memory of which did not.

Whether a value gains is mostly a matter of what kind it is, and keys usually tell the kind: keys
that are the same up to the last `/`, `:` or `.`, or else up to the first digit, form a group. After
a few values of a group in a row did not gain, its next values are stored as they are, and only now
and then one is tried again; each failed try doubles the pause.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lz4.block

from memfaas._native import FLAG_LZ4
from memfaas.errors import ValueCorrupt

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LEAST = 128
"""Bytes below which nothing is worth the call."""
_MOST = 0x7E000000
"""What lz4 takes at once."""
_GAIN = 8
"""Compressed only when it saves at least one part in this many."""
_PATIENCE = 4
"""Values in a row without gain until a group is passed over."""
_FIRST_PAUSE = 16
_LONGEST_PAUSE = 1024
_GROUPS = 1024

_GROUP = re.compile(rb".*[/:.]|[^0-9]*", re.DOTALL)


@dataclass
class CompressionStats:
    """What compression did in this process. All counts are of values, or of parts of large ones."""

    compressed: int = 0
    tried_in_vain: int = 0
    passed_over: int = 0
    """Not tried, because values of their kind did not gain."""
    bytes_saved: int = 0


@dataclass
class _Group:
    failures: int = 0
    pause: int = _FIRST_PAUSE
    to_skip: int = 0


class Compressor:
    """Compresses values and remembers. Safe to use from several threads."""

    def __init__(self) -> None:
        self.stats = CompressionStats()
        self._groups: OrderedDict[bytes, _Group] = OrderedDict()
        self._lock = threading.Lock()

    def shrink(self, key: bytes, value: memoryview) -> tuple[Buffer, int]:
        """What to store for a value, and the flag that says which."""
        if not _LEAST <= len(value) <= _MOST or not self._worth_trying(key):
            return value, 0
        packed = lz4.block.compress(value)
        gained = len(packed) <= len(value) - len(value) // _GAIN
        self._record(key, len(value) - len(packed) if gained else 0)
        return (packed, FLAG_LZ4) if gained else (value, 0)

    def _worth_trying(self, key: bytes) -> bool:
        with self._lock:
            group = self._group(key)
            if group.to_skip == 0:
                return True
            group.to_skip -= 1
            self.stats.passed_over += 1
            return False

    def _record(self, key: bytes, saved: int) -> None:
        with self._lock:
            group = self._group(key)
            if saved:
                group.failures, group.pause = 0, _FIRST_PAUSE
                self.stats.compressed += 1
                self.stats.bytes_saved += saved
                return
            self.stats.tried_in_vain += 1
            group.failures += 1
            if group.failures >= _PATIENCE:
                group.to_skip = group.pause
                group.pause = min(2 * group.pause, _LONGEST_PAUSE)

    def _group(self, key: bytes) -> _Group:
        match = _GROUP.match(key)
        name = match[0] if match else b""
        group = self._groups.setdefault(name, _Group())
        self._groups.move_to_end(name)
        if len(self._groups) > _GROUPS:
            self._groups.popitem(last=False)
        return group


def expand(packed: Buffer) -> bytes:
    """Raises ValueCorrupt when it is not what `shrink` made."""
    try:
        value: bytes = lz4.block.decompress(packed)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise ValueCorrupt(f"a compressed value cannot be expanded: {error}") from error
    return value


def expand_writable(packed: Buffer) -> bytearray:
    """Like `expand`, for who wants to change the result."""
    try:
        value: bytearray = lz4.block.decompress(packed, return_bytearray=True)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise ValueCorrupt(f"a compressed value cannot be expanded: {error}") from error
    return value
