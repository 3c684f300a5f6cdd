"""`memfaas bench verbs`: the verbs fabric beside what the same device does with nothing around it.

All ways take turns, in another order in each round, and both ends are on this node: the device talks to
itself. Times are by CLOCK_MONOTONIC around each operation; of perftest, whose own clock counts the
cycles of a processor that may be emulated, they are the difference of two runs of different lengths.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median
from typing import Any

from memfaas.bench.result import this_machine
from memfaas.bench.verbs_bars import (
    BARE,
    BATCH,
    OURS,
    PERFTEST,
    PERFTEST_LATENCY,
    PYVERBS,
    SIZES,
    Op,
    Row,
    VerbsResult,
    judge,
)
from memfaas.bench.verbs_pyverbs import Pair
from memfaas.errors import MemfaasError
from memfaas.fabric.devices import PyverbsMissing, chosen_device
from memfaas.testing.lease import BareLease, BareRegion, BareStore
from memfaas.units import KIB, MIB

ROUNDS = 5
BUILT = "MEMFAAS_BENCH_VERBS"
"""Environment variable that names the built verbs.c, for where compilers are slow."""
_VALUE = 4 * KIB
_KEYS = 256
_TIMEOUT_S = 30.0
_PERFTEST_S = 60.0
_OPS: dict[int, int] = {8: 200, 4 * KIB: 200, 64 * KIB: 50, MIB: 10}
"""Operations in a round. An emulated device takes 20 ms for the largest."""

Report = Callable[[float, str], None]
Way = Callable[[], float]
"""Microseconds of one operation, in one round."""


class SkippedError(Exception):
    """A way cannot take part here; the text says why."""


def measure_verbs(wanted: str, rounds: int, report: Report) -> VerbsResult:
    """Raises FabricUnavailable when this node has no RDMA device that works."""
    device = chosen_device(wanted)
    machine, begin = this_machine(), time.monotonic()
    started = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    rows: dict[tuple[str, Op, int], Row] = {}
    ways: dict[tuple[str, Op, int], Way] = {}
    with ExitStack() as stack:
        for group in (_ours, _bare, _pyverbs, _perftest):
            names, make = group(device, stack)
            rows.update({name: Row(way=name[0], op=name[1], size=name[2]) for name in names})
            try:
                ways.update(make())
            except (SkippedError, OSError, MemfaasError) as error:
                for name in names:
                    rows[name].skipped = str(error)
        rng = random.Random(1)
        for turn in range(rounds):
            order = list(ways)
            rng.shuffle(order)
            for count, name in enumerate(order):
                report((turn + count / len(order)) / rounds, f"{name[0]}: {name[1]}")
                _take_turn(rows[name], ways[name])
    machine.load_after = os.getloadavg()[0]
    seconds = time.monotonic() - begin
    found = VerbsResult(started=started, seconds=seconds, device=device, machine=machine, rows=list(rows.values()))
    found.verdicts = judge(found)
    return found


def _take_turn(row: Row, way: Way) -> None:
    if row.skipped is None:
        try:
            row.us.append(way())
            return
        except (SkippedError, OSError, MemfaasError) as error:
            row.skipped = str(error)
    row.us.append(None)


def _timed(count: int, operation: Callable[[int], object]) -> float:
    times = array("q")
    for i in range(count):
        start = time.perf_counter_ns()
        operation(i)
        times.append(time.perf_counter_ns() - start)
    return median(times) / 1e3


Names = list[tuple[str, Op, int]]
Group = tuple[Names, Callable[[], dict[tuple[str, Op, int], Way]]]
_ONE_SIDED: tuple[Op, ...] = ("read", "write")


# --- memfaas ----------------------------------------------------------------------------------------


def _ours(device: str, stack: ExitStack) -> Group:
    stores: tuple[Op, ...] = ("get", "get, not seen before", "put", "get in batches", "put in batches")
    names: Names = [(OURS, op, size) for op in _ONE_SIDED for size in SIZES]
    names += [(OURS, op, _VALUE) for op in stores]

    def make() -> dict[tuple[str, Op, int], Way]:
        near = stack.enter_context(BareLease("region", 4 * MIB, timeout_s=_TIMEOUT_S, device=device))
        region = near.region(near.verbs_link())
        ways: dict[tuple[str, Op, int], Way] = {}
        for size in SIZES:
            data, room = os.urandom(size), bytearray(size)
            ways[OURS, "write", size] = partial(_timed, _OPS[size], partial(_write, region, data))
            ways[OURS, "read", size] = partial(_timed, _OPS[size], partial(_read, region, room))
        lease = stack.enter_context(BareLease("shard", 64 * MIB, timeout_s=_TIMEOUT_S, device=device))
        return ways | {(OURS, op, _VALUE): way for op, way in _store_ways(lease).items()}

    return names, make


def _write(region: BareRegion, data: bytes, _: int) -> None:
    region.write(0, data)


def _read(region: BareRegion, room: bytearray, _: int) -> None:
    region.read_into(0, room)


def _store_ways(lease: BareLease) -> dict[Op, Way]:
    store = lease.store(lease.verbs_link())
    value, room = os.urandom(_VALUE), bytearray(_VALUE)
    keys = [b"%d" % i for i in range(_KEYS)]
    store.put_many({key: value for key in keys})

    def fresh(count: int) -> float:
        new: BareStore = lease.store(lease.verbs_link())
        new.get_into(b"another", room) if b"another" in new else None  # the link is ready
        return _timed(count, lambda i: new.get_into(keys[i], room))

    def get_batch(i: int) -> None:
        first = i * BATCH % _KEYS
        store.get_many(keys[first : first + BATCH])

    def put_batch(i: int) -> None:
        first = i * BATCH % _KEYS
        store.put_many({key: value for key in keys[first : first + BATCH]})

    def known() -> float:
        for key in keys:
            store.get_into(key, room)
        return _timed(_KEYS, lambda i: store.get_into(keys[i], room))

    return {
        "get": known,
        "get, not seen before": lambda: fresh(_KEYS),
        "put": lambda: _timed(_KEYS, lambda i: store.put(keys[i], value)),
        "get in batches": lambda: _timed(8, get_batch) / BATCH,
        "put in batches": lambda: _timed(8, put_batch) / BATCH,
    }


# --- the floors -------------------------------------------------------------------------------------


def _bare(device: str, stack: ExitStack) -> Group:
    ops: dict[Op, int] = {"read": 0, "write": 1, "exchange": 2}
    names: Names = [(BARE, op, size) for op in _ONE_SIDED for size in SIZES]
    names.append((BARE, "exchange", _VALUE))

    def make() -> dict[tuple[str, Op, int], Way]:
        library = _built(stack)
        name, port, gid = device.split(":")
        error = ctypes.c_int()
        library.bare_open.restype = ctypes.c_void_p
        handle = library.bare_open(name.encode(), int(port), int(gid), ctypes.c_size_t(max(SIZES)), ctypes.byref(error))
        if not handle:
            raise OSError(error.value, os.strerror(error.value))
        bare = ctypes.c_void_p(handle)
        stack.callback(library.bare_close, bare)

        def run(op: int, size: int) -> float:
            times = array("q", bytes(8 * _OPS[size]))
            where = ctypes.c_void_p(times.buffer_info()[0])
            if status := library.bare_run(bare, op, ctypes.c_size_t(size), _OPS[size], where):
                raise OSError(status, os.strerror(status))
            return median(times) / 1e3

        return {one: partial(run, ops[one[1]], one[2]) for one in names}

    return names, make


def _built(stack: ExitStack) -> ctypes.CDLL:
    if BUILT in os.environ:
        return ctypes.CDLL(os.environ[BUILT])
    into = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memfaas-bench-")), "verbs.so")
    build(into)
    return ctypes.CDLL(str(into))


def build(into: Path) -> None:
    """Compiles verbs.c. Raises SkippedError: it takes gcc and libibverbs-dev."""
    gcc = shutil.which("gcc")
    if gcc is None:
        raise SkippedError("no gcc: sudo apt-get install gcc libibverbs-dev")
    with as_file(files("memfaas.bench") / "verbs.c") as source:
        command = [gcc, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(into), str(source), "-libverbs"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise SkippedError(f"gcc can't build verbs.c ({last}): sudo apt-get install libibverbs-dev")


def _pyverbs(device: str, stack: ExitStack) -> Group:
    names: Names = [(PYVERBS, op, size) for op in _ONE_SIDED for size in SIZES]

    def make() -> dict[tuple[str, Op, int], Way]:
        try:
            pair = stack.enter_context(Pair(device, max(SIZES)))
        except PyverbsMissing as error:
            raise SkippedError(str(error)) from error
        return {one: partial(_timed, _OPS[one[2]], partial(pair.run, one[1] == "read", one[2])) for one in names}

    return names, make


def _perftest(device: str, stack: ExitStack) -> Group:
    programs: dict[tuple[str, Op], str] = {
        (PERFTEST, "read"): "ib_read_bw",
        (PERFTEST, "write"): "ib_write_bw",
        (PERFTEST_LATENCY, "read"): "ib_read_lat",
    }
    names: Names = [(way, op, size) for way, op in programs for size in SIZES]

    def make() -> dict[tuple[str, Op, int], Way]:
        if absent := [program for program in programs.values() if shutil.which(program) is None]:
            raise SkippedError(f"no {', '.join(absent)}: sudo apt-get install perftest")
        return {one: partial(_perftest_us, programs[one[0], one[1]], device, one[2]) for one in names}

    return names, make


def _perftest_us(program: str, device: str, size: int) -> float:
    """By two runs: what both take to start and connect falls out."""
    few, many = _OPS[size] * 2, _OPS[size] * (50 if size < 64 * KIB else 10)
    us = (_perftest_s(program, device, size, many) - _perftest_s(program, device, size, few)) / (many - few) * 1e6
    if us <= 0:
        raise SkippedError(f"{program}: its start took longer one time than {many - few} operations another time")
    return us


def _perftest_s(program: str, device: str, size: int, count: int) -> float:
    name, port, gid = device.split(":")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        control = str(probe.getsockname()[1])
    command = [program, "-d", name, "-i", port, "-x", gid, "-s", str(size), "-n", str(count), "-F", "-p", control]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    try:
        deadline = time.monotonic() + _PERFTEST_S
        while not _listens(int(control)):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SkippedError(f"{program} does not start")
            time.sleep(0.01)
        start = time.perf_counter()
        done = subprocess.run([*command, "127.0.0.1"], timeout=_PERFTEST_S, check=False, **quiet)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SkippedError(f"{program} ends with status {done.returncode}")
        return seconds
    except subprocess.TimeoutExpired as error:
        raise SkippedError(f"{program} takes longer than {_PERFTEST_S:g} s") from error
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    """Without connecting, which would be taken for the client."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                return True
    return False
