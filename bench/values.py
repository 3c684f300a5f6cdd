"""The bytes that are stored: random, so that nothing can compress them, and known to every process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_STEP = 64
_MOST_KEYS = 64


class Values:
    """Values cut out of one pool of random bytes, each starting a little further on than the one before."""

    def __init__(self, pool: bytes | mmap.mmap) -> None:
        self._pool = pool

    @classmethod
    def open(cls, path: Path) -> Values:
        """The values of a pool that `write_pool` wrote; the pages are shared by all who open it."""
        with path.open("rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def value(self, size: int, index: int) -> bytes:
        """A fresh copy of the bytes that belong under the `index`-th key of this size."""
        start = _STEP * index
        if start + size > len(self._pool):
            raise ValueError(f"the pool of {len(self._pool)} bytes has no value {index} of {size} bytes")
        return self._pool[start : start + size]


def write_pool(path: Path, sizes: Iterable[int]) -> None:
    """Write a pool that is large enough for values of these sizes."""
    path.write_bytes(os.urandom(max(sizes) + _STEP * _MOST_KEYS))
