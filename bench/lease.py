"""`memfaas bench lease`: from the request for a lease to the first byte served."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import memfaas
from memfaas.bench.result import LeaseFigures
from memfaas.bench.stats import quantile
from memfaas.units import GIB, MIB

GRANTS = 60
SIZE = 64 * MIB
PAUSE_S = 0.05
"""Between two grants: what is measured is a grant from a warm pool, and the pool is filled up in the background."""

Report = Callable[[float, str], None]


def measure_leases(grants: int = GRANTS, report: Report = lambda share, doing: None) -> list[LeaseFigures]:
    """Take and give back so many leases of each kind, one after the other, on a local cluster of one donor."""
    with (
        memfaas.LocalCluster(donors=1, memory=GIB) as cluster,
        memfaas.connect(cluster.address) as session,
    ):
        return [
            _measure("region", lambda number: _region(session), grants, report),
            _measure("store", lambda number: _store(session, number), grants, report),
        ]


def _measure(
    what: Literal["region", "store"], grant: Callable[[int], tuple[float, str]], grants: int, report: Report
) -> LeaseFigures:
    times = []
    fabrics = set()
    for number in range(grants):
        report(number / grants, f"leases: {what}")
        seconds, fabric = grant(number)
        times.append(seconds * 1e3)
        fabrics.add(fabric)
        time.sleep(PAUSE_S)
    return LeaseFigures(
        what=what,
        fabric=", ".join(sorted(fabrics)),
        grants=grants,
        size=SIZE,
        median_ms=median(times),
        p99_ms=quantile(times, 0.99),
        worst_ms=max(times),
    )


def _region(session: memfaas.Session) -> tuple[float, str]:
    """Seconds until the first byte was written and read back, and by which fabric."""
    start = time.perf_counter()
    region = session.lease(SIZE)
    region.write(0, b"1")
    found = region.read(0, 1)
    seconds = time.perf_counter() - start
    fabric = region.fabric
    region.release()
    if found != b"1":
        raise RuntimeError(f"a fresh region gave {found!r} for the byte that was written")
    return seconds, fabric or "none"


def _store(session: memfaas.Session, number: int) -> tuple[float, str]:
    """Seconds until the first value was stored and read back, and by which fabric."""
    name = f"bench-lease-{number}"
    start = time.perf_counter()
    store = session.store(name, size=SIZE)
    store.put(b"first", b"1")
    found = store.get(b"first")
    seconds = time.perf_counter() - start
    fabric = store.info().shards[0].fabric
    store.close()
    if found != b"1":
        raise RuntimeError(f"a fresh store gave {found!r} for the value that was put")
    return seconds, fabric or "none"
