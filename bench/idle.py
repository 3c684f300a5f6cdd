"""`memfaas bench idle`: what a donor costs the node while nobody asks anything of it."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import memfaas
from memfaas.bench import procfs
from memfaas.bench.result import IdleFigures, IdleProcess, Role
from memfaas.units import GIB, MIB

SECONDS = 10.0
STORE_SIZE = 256 * MIB
_MARK = "BENCH_IDLE_OF"
"""An environment variable by which the processes of the cluster are known, whoever their parent is."""
_SETTLED_BYTES = 64 * 1024
_PATIENCE_S = 60.0

Report = Callable[[float, str], None]


def measure_idle(seconds: float = SECONDS, report: Report = lambda share, doing: None) -> IdleFigures:
    """Watch a local cluster with a store and a region in use, and a client that holds them and does nothing.

    Watching begins when the functions have populated their memory, which goes on in the background
    after a lease is granted. Raises TimeoutError when that does not end.
    """
    with (
        _marked() as mark,
        memfaas.LocalCluster(donors=1, memory=GIB) as cluster,
        memfaas.connect(cluster.address) as session,
    ):
        store = session.store("bench-idle", size=STORE_SIZE)
        store.put(b"key", bytes(MIB))
        region = session.lease(STORE_SIZE)
        region.write(0, b"1")
        report(0.0, "idle: waiting for the memory")
        _wait_until_settled(mark)
        figures = watch(procfs.descendants(_MARK, mark), seconds, report)
        region.release()
        return figures


def watch(pids: Sequence[int], seconds: float, report: Report = lambda share, doing: None) -> IdleFigures:
    """What these processes use while this one sleeps."""
    before = {pid: (procfs.cpu_ns(pid), procfs.cpu_ticks(pid)) for pid in pids}
    start = time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        report(passed / seconds, "idle: watching")
        time.sleep(min(0.2, seconds - passed))
    processes = [_figures(pid, *before[pid]) for pid in pids]
    return IdleFigures(seconds=time.monotonic() - start, processes=processes)


def _figures(pid: int, cpu_before: int, ticks_before: int) -> IdleProcess:
    total, lent = procfs.pss(pid, is_lent)
    return IdleProcess(
        pid=pid,
        role=role_of(procfs.command_line(pid), lent),
        cpu_ns=procfs.cpu_ns(pid) - cpu_before,
        ticks=procfs.cpu_ticks(pid) - ticks_before,
        pss_bytes=total,
        lent_pss_bytes=lent,
    )


def is_lent(mapping: str) -> bool:
    """Whether a mapping of this name is a lease's memory."""
    return mapping.startswith("/memfd:memfaas:") and not mapping.removesuffix(" (deleted)").endswith(":control")


def role_of(command: Sequence[str], lent: int) -> Role:
    """What a process of a cluster is, by its command line and the lent memory that it maps."""
    if lent > 0:
        return "function"
    if "broker" in command:
        return "broker"
    return "donor" if "donor" in command else "helper"


def _wait_until_settled(mark: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    last = -1
    while time.monotonic() < deadline:
        lent = sum(procfs.pss(pid, is_lent)[1] for pid in procfs.descendants(_MARK, mark))
        if abs(lent - last) < _SETTLED_BYTES:
            return
        last = lent
        time.sleep(1.0)
    raise TimeoutError(f"the memory functions still populate their memory after {_PATIENCE_S:.0f} s")


@contextmanager
def _marked() -> Iterator[str]:
    """While it lasts, processes that are started inherit a mark."""
    mark = secrets.token_hex(8)
    os.environ[_MARK] = mark
    try:
        yield mark
    finally:
        del os.environ[_MARK]
