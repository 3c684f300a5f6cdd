"""`memfaas demo`: a local cluster at work, in less than a minute."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from memfaas.auth import OPERATOR
from memfaas.cli.listing import make_console
from memfaas.cli.reclaim import report
from memfaas.cli.status import donor_table, lease_table
from memfaas.client.local import LocalCluster
from memfaas.client.session import Session, connect
from memfaas.errors import CapacityError, DeadlineExceeded, MemfaasError, ValueCorrupt
from memfaas.node import mem_available
from memfaas.units import MIB, format_duration, format_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memfaas.client.store import Store
    from memfaas.fabric import Choice

DONORS = 3
FABRICS: tuple[Choice, ...] = ("shm", "tcp")
_MOST = 320 * MIB
_LEAST = 16 * MIB
_SMALL = 4096
_SMALL_OPERATIONS = 2000
_REFRESH_S = 0.25
_BACKED_S = 5.0
_DEADLINE = "5s"


@dataclass(frozen=True)
class Result:
    """What one fabric did. Times are in seconds, those of small operations one by one."""

    fabric: str
    arrays: int
    size: int
    put: float
    get: float
    small_puts: list[float]
    small_gets: list[float]


@click.command()
def demo() -> None:
    """Start a local cluster, store a NumPy data set over every fabric, read it back and verify it.

    One broker and three donors run as real processes, on memory of this machine that is free. They
    end with the demo, which leaves nothing behind.
    """
    console = make_console()
    size = _data_size()
    console.print(f"A data set of {format_size(size)}, {DONORS} donors on this machine, over {' and '.join(FABRICS)}.")
    data = _data_set(size)
    started = time.perf_counter()
    # With one donor less there must be room still. Shards are equal and values are cut into parts, so some
    # is lost to rounding.
    with LocalCluster(donors=DONORS, memory=size + 64 * MIB) as cluster:
        console.print(
            f"The cluster is up at {cluster.address.partition('?')[0]}, "
            f"after {format_duration(time.perf_counter() - started)}."
        )
        results = [_over(fabric, cluster.address, data, console) for fabric in FABRICS]
    console.print(_result_table(results))
    console.print(
        f"All {sum(result.arrays for result in results)} arrays came back byte for byte, and did so again when a donor "
        "had taken its memory back. The processes have ended, and their memory is free again.",
        highlight=False,
    )


def _data_size() -> int:
    """A few hundred MiB, or less where little is available: the demo takes up to four times as much."""
    available = mem_available()
    if available < 10 * _LEAST:
        raise CapacityError(f"only {format_size(available)} are available; the demo needs {format_size(10 * _LEAST)}")
    return max(_LEAST, min(_MOST, available // 10 // MIB * MIB))


def _data_set(size: int) -> dict[str, NDArray[Any]]:
    """What a simulation might write: a large field, snapshots in double precision, particles, a mask."""
    import numpy as np

    random = np.random.default_rng(7)
    share = size // 8
    particle = np.dtype([("id", "<i8"), ("position", "<f4", (3,)), ("velocity", "<f4", (3,)), ("kind", "u1")])
    particles = np.zeros(share // particle.itemsize, particle)
    particles["id"] = np.arange(particles.size)
    particles["position"] = random.random((particles.size, 3), dtype=np.float32)
    particles["kind"] = particles["id"] % 5
    wave = np.sin(np.linspace(0, 1000, share // 2 // 8))
    data: dict[str, NDArray[Any]] = {
        "field": random.random(share // (64 * 64) * 64 * 64, dtype=np.float32).reshape(-1, 64, 64),
        "particles": particles,
        "mask": random.integers(0, 2, share, dtype=np.uint8).astype(np.bool_),
    }
    for step in range(4):
        data[f"snapshot/{step}"] = wave * (1 + step / 10)
    return data


def _over(fabric: Choice, address: str, data: dict[str, NDArray[Any]], console: Console) -> Result:
    size = sum(array.nbytes for array in data.values())
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}")
    )
    with connect(address, fabric=fabric) as session:
        store = session.store(f"demo-{fabric}", size=size * 5 // 4 + 32 * MIB)
        with _shown(session, progress, console):
            _wait_until_backed(session)
            put = _put_all(store, data, progress)
            get = _get_all(store, data, progress)
            puts, gets = _small_operations(store)
        _take_back(address, store, data, console)
        used = store.info()
        reached = {shard.fabric for shard in used.shards}
        if reached != {fabric}:
            raise MemfaasError(f"the store was to be reached over {fabric}, but was over {reached}")
    return Result(fabric, len(data), size, put, get, puts, gets)


@contextmanager
def _shown(session: Session, progress: Progress, console: Console) -> Iterator[None]:
    """Donors and leases, as the broker sees them, over the progress bars; without a terminal, at the end."""
    done = threading.Event()

    def render() -> RenderableType:
        report = session.status()
        return Group(donor_table(report), lease_table(report), progress)

    def refresh(live: Live) -> None:
        while not done.wait(_REFRESH_S):
            live.update(render(), refresh=True)

    with Live(render(), console=console, auto_refresh=False) as live:
        thread = threading.Thread(target=refresh, args=(live,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        live.update(render(), refresh=True)
    console.print()


def _wait_until_backed(session: Session) -> None:
    """Donors back a new lease in the background; the first to touch a page would wait for it."""
    deadline = time.monotonic() + _BACKED_S
    while time.monotonic() < deadline:
        if all(donor.memory.populated >= donor.memory.leased * 0.99 for donor in session.status().donors):
            return
        time.sleep(_REFRESH_S)


def _put_all(store: Store, data: dict[str, NDArray[Any]], progress: Progress) -> float:
    task = progress.add_task("put", total=sum(array.nbytes for array in data.values()), speed="")
    took = 0.0
    done = 0
    for name, array in data.items():
        started = time.perf_counter()
        store.put(name, array)
        took += time.perf_counter() - started
        done += array.nbytes
        progress.update(task, advance=array.nbytes, speed=_speed(done, took))
    return took


def _get_all(store: Store, data: dict[str, NDArray[Any]], progress: Progress) -> float:
    import numpy as np

    task = progress.add_task("get and verify", total=sum(array.nbytes for array in data.values()), speed="")
    took = 0.0
    done = 0
    for name, array in data.items():
        started = time.perf_counter()
        found = store.get_array(name)
        took += time.perf_counter() - started
        same = found.dtype == array.dtype and found.shape == array.shape
        if not same or not np.array_equal(_flat(found), _flat(array)):
            raise ValueCorrupt(f"{name} did not come back as it was stored")
        done += array.nbytes
        progress.update(task, advance=array.nbytes, speed=_speed(done, took))
    return took


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1).view("u1")


def _small_operations(store: Store) -> tuple[list[float], list[float]]:
    value = bytes(range(256)) * (_SMALL // 256)
    puts, gets = [], []
    for number in range(_SMALL_OPERATIONS):
        key = f"small/{number % 64}"
        started = time.perf_counter()
        store.put(key, value)
        stored = time.perf_counter()
        found = store.get(key)
        gets.append(time.perf_counter() - stored)
        puts.append(stored - started)
        if found != value:
            raise ValueCorrupt(f"{key} did not come back as it was stored")
    return puts, gets


def _take_back(address: str, store: Store, data: dict[str, NDArray[Any]], console: Console) -> None:
    """A batch job wants the memory of one donor, while the data set is in it."""
    donor = store.keepers[0].place.donor
    with connect(address, tenant=OPERATOR) as operator:
        lends = next(one.memory.offered for one in operator.status().donors if one.donor == donor)
        console.print(f"A batch job wants all memory of {donor} back:")
        reclaimed = operator.reclaim(donor, lends, deadline=_DEADLINE, holder="the demo's batch job")
        console.print(report(reclaimed))
        if not reclaimed.in_time:
            raise DeadlineExceeded(f"donor {donor} did not give its memory back within {_DEADLINE}")
        progress = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=console)
        with progress:
            _get_all(store, data, progress)
        operator.lend(donor, "the demo's batch job")
    console.print()


def _speed(size: int, seconds: float) -> str:
    return f"{size / max(seconds, 1e-9) / 1e9:.2f} GB/s"


def _result_table(results: list[Result]) -> Table:
    table = Table(title="what it took", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("fabric", header_style="dim")
    headers = ("put", "get", f"put {format_size(_SMALL)}: median", "99 %", f"get {format_size(_SMALL)}: median", "99 %")
    for header in headers:
        table.add_column(header, justify="right", header_style="dim")
    for result in results:
        row = [_speed(result.size, result.put), _speed(result.size, result.get)]
        for times in (result.small_puts, result.small_gets):
            row += [format_duration(statistics.median(times)), format_duration(statistics.quantiles(times, n=100)[98])]
        table.add_row(result.fabric, *row)
    return table
