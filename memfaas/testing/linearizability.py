"""Was every operation on a key instantaneous, at some moment between its start and its end?

The question and the search are Wing and Gong's ("Testing and Verifying Concurrent Objects", 1993);
that operations are given their place as late as possible, and that equal configurations are
explored once, is Lowe's just-in-time linearization ("Testing for linearizability", 2017). Keys are
independent objects, and linearizability is local (Herlihy and Wing, 1990), so each is checked alone.

Here also for operations whose client was killed: they took effect within their bounds, or never.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ABSENT = 0
"""State of a key that is not there; no value has this number."""


@dataclass(frozen=True, slots=True)
class Operation:
    """`value`: what was put, or what a get returned (ABSENT: nothing); `existed`: what a delete returned.

    `end` is when its result was known, or, when it is not `certain` that it took effect, the moment
    after which it cannot any more (None: it always can).
    """

    kind: Literal["put", "get", "delete"]
    start: int
    end: int | None
    value: int = ABSENT
    existed: bool = False
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Violation:
    """No order explains the results up to the end of this operation."""

    operation: Operation
    possible: frozenset[int]
    """Values that the key could have had just before, in one order or another."""
    meanwhile: tuple[Operation, ...]


_Configuration = tuple[int, frozenset[int]]
"""The key's value, and those running operations that have had their effect."""

_IMPOSSIBLE = -1


def _after(operation: Operation, value: int) -> int:
    """The key's value after the operation; _IMPOSSIBLE when it would have had another result."""
    if operation.kind == "put":
        return operation.value
    if operation.kind == "get":
        return value if value == operation.value else _IMPOSSIBLE
    if operation.certain and operation.existed != (value != ABSENT):
        return _IMPOSSIBLE
    return ABSENT


def check(operations: Iterable[Operation], initial: int = ABSENT) -> Violation | None:
    """Of one key, in any order. None: they are linearizable."""
    history = [one for one in operations if one.certain or one.kind != "get"]
    events = [(one.start, 0, number) for number, one in enumerate(history)]
    events += [(one.end, 1, number) for number, one in enumerate(history) if one.end is not None]
    running: dict[int, Operation] = {}
    possible: set[_Configuration] = {(initial, frozenset())}
    for _, ends, number in sorted(events):
        if not ends:
            running[number] = history[number]
            continue
        before, possible = possible, _ended(number, running, possible)
        if not possible:
            meanwhile = tuple(one for other, one in running.items() if other != number)
            return Violation(history[number], frozenset(value for value, _ in before), meanwhile)
        del running[number]
    return None


def _ended(number: int, running: dict[int, Operation], before: set[_Configuration]) -> set[_Configuration]:
    """What is possible at the end of an operation: it has had its effect, after those of others perhaps."""
    operation = running[number]
    after: set[_Configuration] = set()
    seen = set(before)
    todo = list(before)
    while todo:
        value, done = todo.pop()
        if number in done:
            after.add((value, done - {number}))
            continue
        if not operation.certain:
            after.add((value, done))
        result = _after(operation, value)
        if result != _IMPOSSIBLE:
            after.add((result, done))
        for other, one in running.items():
            if other == number or other in done:
                continue
            result = _after(one, value)
            if result != _IMPOSSIBLE and (further := (result, done | {other})) not in seen:
                seen.add(further)
                todo.append(further)
    return after
