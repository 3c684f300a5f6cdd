"""What is measured: operations, sizes, numbers of clients, and the working set of each size.

Everything here is the same for every system, so that a figure of one can be set beside another's.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import msgspec

from memfaas.units import KIB, MIB

SIZES = (100, 4 * KIB, 64 * KIB, MIB, 16 * MIB)
CLIENTS = (1, 4)
BATCH = 64
BATCH_SIZE = 100

SINGLE_OPS = ("put", "get", "get_into")
BATCH_OPS = ("put_many", "get_many")
SHARED_OPS = ("put", "get")
"""What several clients do at once."""


class Case(msgspec.Struct, frozen=True, order=True):
    """One thing to measure: `op` on values of `size` bytes by `clients` processes at once."""

    op: str
    size: int
    clients: int
    batch: int = 1


def cases(sizes: Iterable[int] = SIZES) -> list[Case]:
    """All cases of a run on these sizes."""
    sizes = tuple(sizes)
    found = [Case(op, size, 1) for op, size in product(SINGLE_OPS, sizes)]
    found += [Case(op, size, clients) for op, size, clients in product(SHARED_OPS, sizes, CLIENTS) if clients > 1]
    if BATCH_SIZE in sizes:
        found += [Case(op, BATCH_SIZE, 1, BATCH) for op in BATCH_OPS]
    return found


def key_count(size: int) -> int:
    """How many keys each client rotates over.

    A single key would be served from the first cache level for ever; 4 values of 16 MiB leave
    every cache that a client's core has to itself.
    """
    if size <= 64 * KIB:
        return 64
    return 8 if size <= MIB else 4


def key_name(size: int, client: int, index: int) -> str:
    """The key of one value. Each client has its own, as independent programs would."""
    return f"bench-{client}-{size}-{index}"
