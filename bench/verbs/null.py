"""What software takes of an operation over verbs: the same operations, over a verbs library without a device.

That library (null.c) does all at once, by a copy within its process; so both ends are in a process of their own,
which loads it instead of the system's libibverbs. That process is also one to profile:

    python -m memfaas.bench.verbs.null --profile get --seconds 10
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from memfaas.bench.verbs.bars import NULL_BARE, NULL_OURS, SMALL, VALUE, Op, SkippedError
from memfaas.bench.verbs.built import NULL_LIBRARY, Bare, built
from memfaas.bench.verbs.ways import COUNTS, STORE_OPS, Way, region_ways, store_ways

_DEVICE = "null0:1:0"
Name = tuple[str, Op, int]
_ONE_SIDED: tuple[Op, ...] = ("read", "write")
OURS: list[Name] = [(NULL_OURS, op, size) for op in _ONE_SIDED for size in SMALL]
OURS += [(NULL_OURS, op, VALUE) for op in STORE_OPS]
BARE: list[Name] = [(NULL_BARE, op, size) for op in _ONE_SIDED for size in SMALL]
BARE += [(NULL_BARE, "exchange", VALUE)]


class NullDevice:
    """The process with the library that has no device. Raises SkippedError when it cannot be built."""

    def __init__(self, stack: ExitStack) -> None:
        command = [sys.executable, "-P", "-m", __name__, "--library", str(built(NULL_LIBRARY, stack))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ways(self) -> dict[Name, Way]:
        return {name: partial(self._run, name) for name in OURS + BARE}

    def _run(self, name: Name) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(name), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SkippedError("the process without a device has ended")
        return float(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


# --- in that process ----------------------------------------------------------------------------------


def _ways(library: Path, stack: ExitStack) -> dict[Name, Way]:
    ctypes.CDLL(str(library))  # by its soname it is libibverbs.so.1, whoever loads that from now on
    ways: dict[Name, Way] = {}
    for (op, size), way in {**region_ways(_DEVICE, stack, SMALL), **store_ways(_DEVICE, stack)}.items():
        ways[NULL_OURS, op, size] = way
    bare = stack.enter_context(Bare(library, _DEVICE, max(SMALL)))
    return ways | {name: partial(bare.run, name[1], name[2], COUNTS[name[2]]) for name in BARE}


def main() -> None:
    """Answers the names of ways, a line each, with microseconds; or repeats one way, for a profiler."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path)
    parser.add_argument("--profile", choices=get_args(Op))
    parser.add_argument("--size", type=int, default=VALUE)
    parser.add_argument("--seconds", type=float, default=10.0)
    asked = parser.parse_args()
    with ExitStack() as stack:
        ways = _ways(asked.library or built(NULL_LIBRARY, stack), stack)
        if asked.profile is None:
            for line in sys.stdin:
                way, op, size = json.loads(line)
                print(ways[way, op, size](), flush=True)
            return
        for name in (NULL_OURS, NULL_BARE):
            way = ways.get((name, asked.profile, asked.size))
            end = time.monotonic() + asked.seconds
            while way is not None and time.monotonic() < end:
                latest = way()
            if way is not None:
                print(f"{name}: {asked.profile} of {asked.size} B: {latest:.2f} us")


if __name__ == "__main__":
    main()
