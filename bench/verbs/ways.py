"""memfaas' own ways: both ends of a link over verbs in this process, by the code that all links use."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

from memfaas.bench.verbs.bars import BATCH, BLOCK, SIZES, VALUE, Op
from memfaas.testing.lease import BareLease
from memfaas.units import KIB, MIB

Way = Callable[[], float]
"""Microseconds of one operation, in one round."""
COUNTS: dict[int, int] = {8: 200, 4 * KIB: 200, BLOCK: 200, 64 * KIB: 50, MIB: 10}
"""Operations in a round. An emulated device takes 20 ms for the largest."""
STORE_OPS: tuple[Op, ...] = ("get", "get, not seen before", "put", "get in batches", "put in batches")
_KEYS = 256
_BATCHES = 8
_TIMEOUT_S = 30.0


def timed(calls: Iterable[Callable[[], object]]) -> float:
    """Microseconds of one, at the median."""
    times = array("q")
    for call in calls:
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return median(times) / 1e3


def region_ways(device: str, stack: ExitStack, sizes: Sequence[int] = SIZES) -> dict[tuple[Op, int], Way]:
    """Reads and writes of a region. Raises MemfaasError, OSError."""
    lease = stack.enter_context(BareLease("region", 4 * MIB, timeout_s=_TIMEOUT_S, device=device))
    region = lease.region(lease.verbs_link())
    ways: dict[tuple[Op, int], Way] = {}
    for size in sizes:
        write, read = partial(region.write, 0, os.urandom(size)), partial(region.read_into, 0, bytearray(size))
        ways["write", size] = partial(timed, [write] * COUNTS[size])
        ways["read", size] = partial(timed, [read] * COUNTS[size])
    return ways


def store_ways(device: str, stack: ExitStack) -> dict[tuple[Op, int], Way]:
    """Those of `STORE_OPS`. Raises MemfaasError, OSError."""
    lease = stack.enter_context(BareLease("shard", 64 * MIB, timeout_s=_TIMEOUT_S, device=device))
    store = lease.store(lease.verbs_link())
    value, room = os.urandom(VALUE), bytearray(VALUE)
    keys = [b"%d" % i for i in range(_KEYS)]
    batches = [keys[first : first + BATCH] for first in range(0, _KEYS, BATCH)] * (_BATCHES * BATCH // _KEYS)
    items = [dict.fromkeys(batch, value) for batch in batches]
    gets = [partial(store.get_into, key, room) for key in keys]
    puts = [partial(store.put, key, value) for key in keys]

    def known() -> float:
        for get in gets:  # so that this link knows their places
            get()
        return timed(gets)

    def fresh() -> float:
        new = lease.store(lease.verbs_link())
        assert b"absent" not in new  # so it is ready
        return timed(partial(new.get_into, key, room) for key in keys)

    store.put_many(dict.fromkeys(keys, value))
    return {
        ("get", VALUE): known,
        ("get, not seen before", VALUE): fresh,
        ("put", VALUE): lambda: timed(puts),
        ("get in batches", VALUE): lambda: timed(partial(store.get_many, batch) for batch in batches) / BATCH,
        ("put in batches", VALUE): lambda: timed(partial(store.put_many, one) for one in items) / BATCH,
    }
