"""`memfaas bench pressure`: what it costs that a donor watches its node, and how soon a program gets lent memory.

The headroom of the donors here is chosen so that their node is just above it, however much memory it has.
Close other programs: what they take and give back counts as the node's memory too.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import memfaas
from memfaas.bench import procfs
from memfaas.errors import MemfaasError
from memfaas.node import mem_available
from memfaas.units import MIB, format_size

SECONDS = 60.0
ROUNDS = 5
LENT = 512 * MIB
_INDEX = 64 * MIB
_TRIES = 5
_NEAR = 480 * MIB
"""So far above its headroom is the node: there it is looked at as often as ever."""
_MISSING = 64 * MIB
"""So far below it is brought by the program that wants memory."""
_PATIENCE_S = 60.0
_LOOK_S = 0.0005
_MARK = "BENCH_PRESSURE_OF"
_PROGRAM = """
import mmap, sys
size = int(sys.stdin.readline())
taken = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
print("taken", flush=True)
sys.stdin.readline()
"""

R = TypeVar("R")
Report = Callable[[float, str], None]


@dataclass
class PressureFigures:
    """What was measured."""

    seconds: float
    """So long the donor's agent was watched."""
    cpu_ns: int
    """What it used meanwhile."""
    times: list[float] = field(default_factory=list)
    """Seconds, of each round."""

    def lines(self) -> list[str]:
        """For people."""
        share = self.cpu_ns / self.seconds / 1e7
        ordered = [f"{seconds * 1000:.0f}" for seconds in sorted(self.times)]
        return [
            f"a donor whose node is near its headroom: {share:.3f} % of one core, over {self.seconds:.0f} s",
            f"from pressure until {format_size(_MISSING)} are free: {', '.join(ordered)} ms",
        ]


class Disturbed(Exception):
    """Something else on this node took memory meanwhile, each time."""


def measure_pressure(
    seconds: float = SECONDS, rounds: int = ROUNDS, report: Report = lambda share, doing: None
) -> PressureFigures:
    """First the cost for so long, then the times. Raises Disturbed."""
    figures = PressureFigures(*_undisturbed(lambda: _watch(seconds), "watching the watch", 0.0, report))
    for number in range(rounds):
        figures.times.append(_undisturbed(_take, "a program wants memory", 0.5 + number / rounds / 2, report))
    return figures


def _undisturbed(measure: Callable[[], R], doing: str, share: float, report: Report) -> R:
    report(share, f"pressure: {doing}")
    for _ in range(_TRIES):
        try:
            return measure()
        except (Disturbed, MemfaasError) as error:  # the lease was not to be had, or lost
            trouble = error
            report(share, f"pressure: {doing}, again: {error}")
    raise Disturbed(f"this node's memory is not calm enough, close other programs: {trouble}")


def _watch(seconds: float) -> tuple[float, int]:
    """Seconds, and nanoseconds of processor time that the donor's agent used in them."""
    with _donor() as donor:
        before = procfs.cpu_ns(donor.pid)
        start = time.monotonic()
        time.sleep(seconds)
        used, passed = procfs.cpu_ns(donor.pid) - before, time.monotonic() - start
        if any(info.reclaimed for info in donor.session.status().donors):
            raise Disturbed("the donor had to give memory back")
        return passed, used


def _take() -> float:
    """A program takes memory. Seconds from when it is in the headroom until what is missing has come back."""
    with (
        _donor() as donor,
        subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program,
    ):
        try:
            assert program.stdin is not None
            before = _backed(donor.lent)
            program.stdin.write(b"%d\n" % (_NEAR + _MISSING))
            program.stdin.flush()
            deadline = time.monotonic() + _PATIENCE_S
            _wait(lambda: mem_available() < donor.headroom, deadline)
            begin = time.monotonic()
            if _backed(donor.lent) < before:
                raise Disturbed("the donor had to give memory back before")
            _wait(lambda: before - _backed(donor.lent) >= _MISSING, deadline)
            return time.monotonic() - begin
        finally:
            program.kill()


def _wait(met: Callable[[], bool], deadline: float) -> None:
    while not met():
        if time.monotonic() > deadline:
            raise Disturbed("the program took memory, and the donor did not give it back")
        time.sleep(_LOOK_S)


def _backed(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


@dataclass(frozen=True)
class _Donor:
    """One near its headroom, all of whose lent memory is in pages, and most of it free."""

    pid: int
    """Of its agent."""
    headroom: int
    session: memfaas.Session
    lent: int
    """A descriptor of the memory."""


@contextmanager
def _donor() -> Iterator[_Donor]:
    mark = secrets.token_hex(8)
    os.environ[_MARK] = mark
    try:
        headroom = mem_available() - LENT - _NEAR
        if headroom <= 0:
            raise Disturbed(f"only {format_size(mem_available())} are available")
        with (
            memfaas.LocalCluster(memory=LENT + _INDEX, headroom=headroom) as cluster,
            memfaas.connect(cluster.address, timeout=_PATIENCE_S, tenant="operator") as session,
        ):
            session.store("bench-pressure", size=LENT).put("key", b"value")
            lent = _lent_memory(mark)
            try:
                yield _Donor(cluster.donor_pid(0), headroom, session, lent)
            finally:
                os.close(lent)
    finally:
        del os.environ[_MARK]


def _lent_memory(mark: str) -> int:
    """Opens the only lease's memory, once it is in pages."""
    deadline = time.monotonic() + _PATIENCE_S
    for pid in procfs.descendants(_MARK, mark):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(path)
            if target.startswith("/memfd:memfaas:") and ":control" not in target:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                while _backed(descriptor) < LENT:
                    if time.monotonic() > deadline:
                        raise Disturbed(f"the lent memory is not in pages after {_PATIENCE_S:.0f} s")
                    time.sleep(0.05)
                return descriptor
    raise Disturbed("no process of the donor has the lent memory")
