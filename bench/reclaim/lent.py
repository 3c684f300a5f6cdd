"""The steps of a reclaim, each on a local cluster of real processes, and timed as the kernel saw it.

A step is over when the kernel has so many pages of lent memory less than before, whatever the cluster
says. What it says must be true: a reply that comes before the memory is free is a failure.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import memfaas
from memfaas.bench import procfs
from memfaas.bench.lease import PAUSE_S
from memfaas.bench.lease import SIZE as LEASE_SIZE
from memfaas.bench.reclaim import ways
from memfaas.bench.reclaim.pages import Pages
from memfaas.errors import StoreFull
from memfaas.messages import Reclaimed
from memfaas.units import GIB, MIB, format_size

DEADLINE_S = 120.0
"""Far more than any step takes: what is measured is the step, not what happens when time is up."""
_HOLDER = "memfaas bench"
_DONOR = "donor0"
_OTHER = 64 * MIB
"""What a donor lends beyond the lease that is measured and its index."""
_FILL = os.urandom(16 * MIB)
_MOST = 0.8
"""Of the memory, by the step that is measured: some of a full shard is free, and is punched out before it goes."""
_PATIENCE_S = 120.0
_POLL_S = 50e-6
_POLL_SHARE = 0.005
"""Of the time until now, between looks: they take a processor, which on a small machine the kernel lacks then."""
_LATE_S = 0.05
"""A busy machine may not let us look for so long."""
_MARK = "BENCH_RECLAIM_OF"


class NotSo(Exception):
    """The memory came back otherwise than it was to be measured, or not at all; the message says how."""


# --- the steps -----------------------------------------------------------------------------------------


def unlent(size: int, pages: Pages) -> float:
    """Seconds until memory that nobody leased is out of reach. It has no pages, so the reply ends it."""
    with _operator(1, size) as (_, session):
        return _reclaim(session, size, ways.UNLENT, [])


def punched(size: int, pages: Pages) -> float:
    """Seconds until free spans are cut out of a shard that keeps serving: half of it is free."""
    with _operator(1, 2 * size) as (mark, session):
        store = session.store("bench", size=2 * size)
        store.put(b"kept", b"1")
        with _backing(mark, 2 * size) as files:
            seconds = _reclaim(session, size, ways.PUNCHED, files)
        if store.get(b"kept") != b"1":
            raise NotSo("a value was lost although only free spans were cut out")
        return seconds


def dropped(size: int, pages: Pages) -> float:
    """Seconds until a cache is evicted that is full of values."""
    with _operator(1, size) as (mark, session):
        store = session.store("bench", size=size, on_reclaim="drop")
        with suppress(StoreFull):
            for number in count():
                store.put(b"%d" % number, _FILL[:MIB])
        with _backing(mark, size) as files:
            return _reclaim(session, size, ways.DROPPED, files)


def migrated(size: int, pages: Pages) -> float:
    """Seconds until a lease full of data has moved to another donor, and its memory here is free."""
    with _operator(2, size) as (mark, session):
        return _move_away(session, mark, size, ways.MIGRATED)


def spilled(size: int, pages: Pages) -> float:
    """The same, to a donor that lends files in local scratch."""
    with _operator(1, size, spill=True) as (mark, session):
        return _move_away(session, mark, size, ways.SPILLED)


def _move_away(session: memfaas.Session, mark: str, size: int, step: str) -> float:
    with session.lease(size) as region:
        for offset in range(0, size, len(_FILL)):
            region.write(offset, memoryview(_FILL)[: min(len(_FILL), size - offset)])
        origin = region.donor
        with _backing(mark, size) as files:
            seconds = _reclaim(session, size, step, files, donor=origin)
        last = (size - 1) // len(_FILL) * len(_FILL)
        for offset in (0, last):
            length = min(len(_FILL), size - offset)
            if region.read(offset, length) != _FILL[:length]:
                raise NotSo("the lease moved, but not with the bytes that were in it")
        if region.donor == origin:
            raise NotSo(f"the lease is on {origin} as before")
        return seconds


def first_from_pool() -> float:
    """Seconds until the first byte of a first lease, on a donor whose functions wait for one."""
    with memfaas.LocalCluster(donors=1, memory=GIB) as cluster, memfaas.connect(cluster.address) as session:
        time.sleep(20 * PAUSE_S)  # its functions get ready in the background
        return _serve_first(session, time.perf_counter())


def first_from_start() -> float:
    """Seconds from the start of a donor that is to lend 8 GiB until the first byte of a lease on it."""
    with memfaas.LocalCluster(donors=1, memory=8 * GIB) as cluster, memfaas.connect(cluster.address) as session:
        cluster.kill_donor(0)
        start = time.perf_counter()
        cluster.restart_donor(0)
        return _serve_first(session, start)


# --- how they are timed --------------------------------------------------------------------------------


def _serve_first(session: memfaas.Session, start: float) -> float:
    region = session.lease(LEASE_SIZE)
    region.write(0, b"1")
    if region.read(0, 1) != b"1":
        raise NotSo("a fresh region did not give the byte that was written")
    return time.perf_counter() - start


@contextmanager
def _operator(donors: int, size: int, *, spill: bool = False) -> Iterator[tuple[str, memfaas.Session]]:
    """A session that may reclaim, on a cluster whose donors each have room for a lease of this size, and
    the mark of its processes."""
    memory = size + size // 16 + _OTHER
    with ExitStack() as stack:
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        os.environ[_MARK] = mark
        try:
            cluster = stack.enter_context(
                memfaas.LocalCluster(donors=donors, memory=memory, spill=memory if spill else None)
            )
        finally:
            del os.environ[_MARK]
        yield mark, stack.enter_context(memfaas.connect(cluster.address, tenant="operator", timeout=_PATIENCE_S))


@contextmanager
def _backing(mark: str, size: int) -> Iterator[list[int]]:
    """The memory of all leases, once the kernel has backed all of it by pages: `size` bytes and their index.

    It is held open, so that it can be looked at when all others have let go of it.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with ExitStack() as stack:
            files = _lent_files(mark)
            for descriptor in files:
                stack.callback(os.close, descriptor)
            if backed(files) >= max(size, sum(os.fstat(descriptor).st_size for descriptor in files)):
                yield files
                return
        if time.monotonic() > deadline:
            raise NotSo(f"the leases have less than {format_size(size)} in pages after {_PATIENCE_S:.0f} s")
        time.sleep(0.05)


def _lent_files(mark: str) -> list[int]:
    """Opens each lease's data memory once, whoever of the processes has it."""
    found: dict[int, int] = {}
    for pid in procfs.descendants(_MARK, mark):
        try:
            paths = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:  # it has ended
            continue
        for path in paths:
            try:
                target = os.readlink(path)
                inode = path.stat().st_ino
                if target.startswith("/memfd:memfaas:") and ":control" not in target and inode not in found:
                    found[inode] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # closed meanwhile
                continue
    return list(found.values())


def backed(files: list[int]) -> int:
    """Bytes that the kernel has in pages of these files."""
    return sum(os.fstat(descriptor).st_blocks for descriptor in files) * 512


class _Watch:
    """A thread that notes how many bytes of some files the kernel has in pages, whenever it has changed."""

    def __init__(self, files: list[int]) -> None:
        self._files = files
        self._stop = threading.Event()
        self._seen = [(time.perf_counter(), backed(files))]
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            self.look()
            time.sleep(max(_POLL_S, _POLL_SHARE * (time.perf_counter() - self._seen[0][0])))

    def look(self) -> None:
        now = backed(self._files)
        if now != self._seen[-1][1]:
            self._seen.append((time.perf_counter(), now))

    def when_less(self, size: int) -> float | None:
        """When so many bytes less than at first were left, or nothing at all; None when that was not seen."""
        limit = max(0, self._seen[0][1] - size)
        return next((at for at, now in self._seen if now <= limit), None)


def _reclaim(session: memfaas.Session, size: int, step: str, files: list[int], donor: str = _DONOR) -> float:
    """Takes `size` bytes back by this step; seconds until the kernel has all that the donor says it gave."""
    asked = size + (_unlent(session, donor) if files else 0)
    with _Watch(files) as watch:
        start = time.perf_counter()
        reclaimed = session.reclaim(donor, asked, DEADLINE_S, _HOLDER)
        replied = time.perf_counter()
    watch.look()
    _check(reclaimed, size, step)
    if step == ways.UNLENT:
        return replied - start
    free_at = watch.when_less(sum(part.size for part in reclaimed.steps if part.how != "unlent"))
    if free_at is None or free_at > replied + _LATE_S:
        raise NotSo("the donor says that the memory is free, but the kernel still has it in pages")
    return free_at - start


def _unlent(session: memfaas.Session, donor: str) -> int:
    """What the donor gives first, as nobody leased it."""
    memory = next(info.memory for info in session.status().donors if info.donor == donor)
    return max(0, memory.offered - memory.leased)


def _check(reclaimed: Reclaimed, size: int, step: str) -> None:
    by_step: dict[str, int] = {}
    for part in reclaimed.steps:
        by_step[part.how] = by_step.get(part.how, 0) + part.size
    if by_step.get(step, 0) < size * _MOST:
        shown = ", ".join(f"{format_size(freed)} {how}" for how, freed in by_step.items()) or "nothing"
        raise NotSo(f"{format_size(size)} were to be {step}, but the donor says: {shown}")
    if not reclaimed.in_time:
        raise NotSo(f"only {format_size(reclaimed.freed)} were free within {DEADLINE_S:.0f} s")
