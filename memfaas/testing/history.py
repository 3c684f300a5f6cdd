"""What a process did to keys and when, in a file that survives the process's sudden death.

Each record is one write of a fixed length, so a killed process leaves whole records. An operation is
written down before it begins and again when it has ended; one without an end may have had its effect.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from memfaas.testing.linearizability import Operation

_RECORD = struct.Struct("<BxHIqQ")


class Step(IntEnum):
    PUT = 1
    GET = 2
    DELETE = 3
    ENDED = 4
    REFUSED = 5
    """It ended without effect."""


class Recorder:
    """Of one thread."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        os.close(self._file)

    def begin(self, step: Step, key: int, value: int = 0) -> None:
        os.write(self._file, _RECORD.pack(step, key, 0, time.monotonic_ns(), value))

    def end(self, result: int = 0) -> None:
        """`result`: the value that was got, or whether something was deleted."""
        os.write(self._file, _RECORD.pack(Step.ENDED, 0, 0, time.monotonic_ns(), result))

    def refused(self) -> None:
        os.write(self._file, _RECORD.pack(Step.REFUSED, 0, 0, time.monotonic_ns(), 0))


@dataclass(frozen=True, slots=True)
class Recorded:
    key: int
    operation: Operation


def read(path: Path, bound: Callable[[int], int | None]) -> Iterator[Recorded]:
    """`bound(start)` is when an operation without an end can have had no effect any more."""
    begun: tuple[Step, int, int, int] | None = None
    content = path.read_bytes()
    # The piece of a record that a killed client leaves says nothing: what it was to begin had not begun, and what
    # it was to end is uncertain.
    content = content[: len(content) - len(content) % _RECORD.size]
    for step, key, _, moment, value in _RECORD.iter_unpack(content):
        if step <= Step.DELETE:
            if begun is not None:
                raise ValueError(f"{path}: an operation begins before the one before it has ended")
            begun = (Step(step), key, moment, value)
            continue
        if begun is None:
            raise ValueError(f"{path}: an operation ends that did not begin")
        if step == Step.ENDED:
            yield _recorded(begun, moment, value, certain=True)
        begun = None
    if begun is not None:
        yield _recorded(begun, bound(begun[2]), 0, certain=False)


def _recorded(begun: tuple[Step, int, int, int], end: int | None, result: int, *, certain: bool) -> Recorded:
    step, key, start, value = begun
    if step == Step.PUT:
        operation = Operation("put", start, end, value, certain=certain)
    elif step == Step.GET:
        operation = Operation("get", start, end, result, certain=certain)
    else:
        operation = Operation("delete", start, end, existed=bool(result), certain=certain)
    return Recorded(key, operation)
