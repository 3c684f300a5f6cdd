"""The measuring core: repeat an operation for a while and note how long it took each time.

The clock is an argument, so that the core is tested without time passing.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import msgspec

Clock = Callable[[], int]
"""Nanoseconds since some fixed moment."""

BLOCK_NS = 20_000
"""Operations are timed in blocks of about this long: reading the clock costs tens of nanoseconds,
as much as a tenth of the fastest operations here."""

MAX_BLOCK = 64

CALIBRATION_NS = 50_000_000


class Action(msgspec.Struct):
    """An operation and the arguments it rotates over.

    `run(items)` does it once for each item. The number of items is a power of two.
    """

    run: Callable[[Sequence[Any]], None]
    items: Sequence[Any]


class Slice(msgspec.Struct):
    """What one client did in one slice of time.

    `blocks` has nanoseconds per operation, each value a mean over one block of operations; `singles`
    has nanoseconds of single operations, each timed by itself. `ops` and `elapsed_ns` count all.
    """

    ops: int
    elapsed_ns: int
    blocks: list[float]
    singles: list[float]


def one_argument(function: Callable[[Any], object]) -> Callable[[Sequence[Any]], None]:
    """A `run` for functions of one argument."""

    def run(items: Sequence[Any]) -> None:
        for item in items:
            function(item)

    return run


def two_arguments(function: Callable[[Any, Any], object]) -> Callable[[Sequence[Any]], None]:
    """A `run` for functions of two arguments; the items are pairs."""

    def run(items: Sequence[Any]) -> None:
        for first, second in items:
            function(first, second)

    return run


def calibrate(action: Action, clock: Clock = time.perf_counter_ns) -> tuple[int, float]:
    """The right block length, and nanoseconds per operation, from a pass over as many items as a little time allows."""
    before = clock()
    action.run(action.items[:1])
    first = max(1, clock() - before)
    some = action.items[: max(1, min(len(action.items), CALIBRATION_NS // first))]
    before = clock()
    action.run(some)
    each = (clock() - before) / len(some)
    block = 1
    while block < min(MAX_BLOCK, len(action.items)) and block * each < BLOCK_NS:
        block *= 2
    return (block if each * 4 < BLOCK_NS else 1), each


def measure(action: Action, block: int, until_ns: int, clock: Clock = time.perf_counter_ns) -> Slice:
    """Repeat the action until the clock shows `until_ns`, at least once.

    Three quarters of the time in blocks, for an exact median; the rest one by one, for the tail.
    """
    start = clock()
    with _no_collections():
        if block == 1:
            times, now = _repeat(action, 1, start, until_ns, clock)
            each = [float(t) for t in times]
            return Slice(len(times), now - start, each, each)
        middle = start + (until_ns - start) * 3 // 4
        in_blocks, now = _repeat(action, block, start, middle, clock)
        alone, now = _repeat(action, 1, now, until_ns, clock)
    return Slice(
        ops=len(in_blocks) * block + len(alone),
        elapsed_ns=now - start,
        blocks=[t / block for t in in_blocks],
        singles=[float(t) for t in alone],
    )


def _repeat(action: Action, block: int, now: int, until_ns: int, clock: Clock) -> tuple[array[int], int]:
    """Nanoseconds of each block, and the time at the end."""
    run = action.run
    times = array("q")
    note = times.append
    parts = [action.items[i : i + block] for i in range(0, len(action.items), block)]
    for part in cycle(parts):
        run(part)
        after = clock()
        note(after - now)
        now = after
        if now >= until_ns:
            break
    return times, now


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without the cycle collector, whose pauses belong to no system."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
