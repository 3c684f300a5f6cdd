"""A run of `memfaas bench verbs`.

All ways take turns, in another order in each round, and both ends are on this node: the device talks to
itself. Times are by CLOCK_MONOTONIC around each operation; of perftest they are the difference of two runs
of different lengths.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from functools import partial

from memfaas.bench.result import Machine, this_machine
from memfaas.bench.verbs import null
from memfaas.bench.verbs.bars import (
    BARE,
    BLOCK,
    OURS,
    PERFTEST,
    PERFTEST_LATENCY,
    PYVERBS,
    SIZES,
    VALUE,
    Op,
    Row,
    SkippedError,
    VerbsResult,
    judge,
)
from memfaas.bench.verbs.built import BARE_LIBRARY, Bare, built
from memfaas.bench.verbs.null import Name, NullDevice
from memfaas.bench.verbs.perftest import perftest_us
from memfaas.bench.verbs.pyverbs import Pair
from memfaas.bench.verbs.ways import COUNTS, STORE_OPS, region_ways, store_ways, timed
from memfaas.errors import FabricUnavailable, MemfaasError
from memfaas.fabric.devices import PyverbsMissing, chosen_device

ROUNDS = 5
_EMULATED = "QEMU TCG"
"""What qemu calls the processor that it emulates."""
_PERFTEST: dict[tuple[str, Op], str] = {
    (PERFTEST, "read"): "ib_read_bw",
    (PERFTEST, "write"): "ib_write_bw",
    (PERFTEST_LATENCY, "read"): "ib_read_lat",
}

Report = Callable[[float, str], None]
Way = Callable[[], float | None]
"""Microseconds of one operation, in one round; None: it cannot be told in this one."""
Group = tuple[list[Name], Callable[[ExitStack], dict[Name, Way]]]


def measure_verbs(wanted: str, rounds: int, report: Report) -> VerbsResult:
    """Without an RDMA device that works, only what needs none. Raises FabricUnavailable when `wanted` is not there."""
    started, begin, machine = f"{datetime.now():%Y-%m-%d %H:%M:%S}", time.monotonic(), this_machine()
    device, reason = "", ""
    try:
        device = chosen_device(wanted)
    except FabricUnavailable as error:
        if wanted:
            raise
        reason = str(error)
    rows: dict[Name, Row] = {}
    ways: dict[Name, Way] = {}
    with ExitStack() as stack:
        for names, make in (*_groups(device, reason), _null(machine)):
            rows.update({name: Row(way=name[0], op=name[1], size=name[2]) for name in names})
            try:
                ways.update(make(stack))
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
    us = None
    if row.skipped is None:
        try:
            us = way()
        except (SkippedError, OSError, MemfaasError) as error:
            row.skipped = str(error)
    row.us.append(us)


# --- those that take part -----------------------------------------------------------------------------


def _groups(device: str, reason: str) -> list[Group]:
    """With the device; without one all of them are skipped, for this reason."""
    one_sided: tuple[Op, ...] = ("read", "write")
    names: dict[str, list[Name]] = {
        way: [(way, op, size) for op in one_sided for size in SIZES] for way in (OURS, BARE, PYVERBS)
    }
    names[OURS] += [(OURS, op, VALUE) for op in STORE_OPS]
    names[BARE] += [(BARE, "exchange", VALUE), (BARE, "read", BLOCK)]
    perftest: list[Name] = [(way, op, size) for way, op in _PERFTEST for size in SIZES]

    def ours(stack: ExitStack) -> dict[Name, Way]:
        ways = {**region_ways(device, stack), **store_ways(device, stack)}
        return {(OURS, op, size): way for (op, size), way in ways.items()}

    def bare(stack: ExitStack) -> dict[Name, Way]:
        pair = stack.enter_context(Bare(built(BARE_LIBRARY, stack), device, max(SIZES)))
        return {name: partial(pair.run, name[1], name[2], COUNTS[name[2]]) for name in names[BARE]}

    def pyverbs(stack: ExitStack) -> dict[Name, Way]:
        try:
            pair = stack.enter_context(Pair(device, max(SIZES)))
        except PyverbsMissing as error:
            raise SkippedError(f"{error}; {error.remedy}") from error
        calls = {name: [partial(pair.run, name[1] == "read", name[2])] * COUNTS[name[2]] for name in names[PYVERBS]}
        return {name: partial(timed, these) for name, these in calls.items()}

    def others(stack: ExitStack) -> dict[Name, Way]:
        if absent := [program for program in _PERFTEST.values() if shutil.which(program) is None]:
            raise SkippedError(f"no {', '.join(absent)}: sudo apt-get install perftest")
        return {name: partial(perftest_us, _PERFTEST[name[0], name[1]], device, name[2]) for name in perftest}

    def skipped(stack: ExitStack) -> dict[Name, Way]:
        raise SkippedError(reason)

    groups: list[Group] = [(names[OURS], ours), (names[BARE], bare), (names[PYVERBS], pyverbs), (perftest, others)]
    return groups if device else [(these, skipped) for these, _ in groups]


def _null(machine: Machine) -> Group:
    def make(stack: ExitStack) -> dict[Name, Way]:
        if _EMULATED in machine.processor:
            raise SkippedError("an emulated processor says nothing of what software takes")
        return {**stack.enter_context(NullDevice(stack)).ways()}

    return null.OURS + null.BARE, make
