"""`memfaas bench kv` and `memfaas bench compare`: start the systems, measure them together, judge."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime

from memfaas.bench.bars import judge
from memfaas.bench.crew import Camp, ProcessCrew, camp
from memfaas.bench.peers import SYSTEMS
from memfaas.bench.peers.base import StartError, System
from memfaas.bench.plan import CLIENTS, cases
from memfaas.bench.result import Result, SystemInfo, this_machine
from memfaas.bench.run import LEAST_ROUNDS, Interleaved

OURS = tuple(name for name, system in SYSTEMS.items() if system.kind != "peer")
"""memfaas and the floors: what `kv` measures."""

Report = Callable[[float, str], None]
"""Called with the share that is done, and what is done now."""


def measure_systems(
    names: Sequence[str],
    sizes: Sequence[int],
    seconds: float,
    *,
    command: str,
    least_rounds: int = LEAST_ROUNDS,
    report: Report = lambda share, doing: None,
) -> Result:
    """Measure these systems side by side for about `seconds`; those that can't take part are named in the result.

    Verdicts are not yet in it, as the figures of leases and of the idle donor come from elsewhere.
    """
    machine, started, begin = this_machine(), datetime.now(), time.monotonic()
    seed = random.SystemRandom().randrange(1 << 32)
    infos: list[SystemInfo] = []
    with camp(sizes) as place:
        crews: list[ProcessCrew] = []
        for name in names:
            report(0.0, f"starting {name}")
            info, crew = _start(place, SYSTEMS[name]())
            infos.append(info)
            crews += [crew] if crew is not None else []
        run = Interleaved(crews, cases(sizes), random.Random(seed), report=report)
        run.run(seconds, least_rounds)
        report(1.0, "stopping")
    machine.load_after = this_machine().load_before
    return Result(
        command=command,
        started=started.isoformat(sep=" ", timespec="seconds"),
        seconds=time.monotonic() - begin,
        seed=seed,
        rounds=run.rounds,
        machine=machine,
        systems=infos,
        cells=run.cells(),
    )


def finish(result: Result) -> Result:
    """The result with its verdicts."""
    result.verdicts = judge(result)
    return result


def _start(place: Camp, system: System) -> tuple[SystemInfo, ProcessCrew | None]:
    info = SystemInfo(name=system.name, kind=system.kind, networked=system.networked)
    info.skipped = system.available()
    if info.skipped is not None:
        return info, None
    try:
        crew = place.start(system, max(CLIENTS))
        info.detail = system.detail()
    except StartError as error:
        info.skipped = str(error)
        return info, None
    return info, crew
