"""What tests do with a computing centre whose nodes lend memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import memfaas
from memfaas.messages import DonorInfo
from memfaas.units import MIB
from tests.slurm import measure
from tests.slurm.center import Center, wait_for

NODES = ["donor0", "donor1", "donor2"]
"""Slurm's name of a node is that of the donor."""
PLAIN_NODE = "plain"
"""A node that lends nothing."""
LENT_MIB = 256
DEADLINE = "2s"
VALUE = 256 * 1024
_LONG_S = 60.0
_HOOKS = ("PrologSlurmctld", "Prolog", "Epilog", "EpilogSlurmctld")


class HookRun(NamedTuple):
    hook: str
    job: str
    status: int
    seconds: float


class Site:
    def __init__(self, center: Center, cluster: memfaas.LocalCluster) -> None:
        self.center = center
        self.cluster = cluster
        self._job = "0"

    @contextmanager
    def session(self, tenant: str = "alice") -> Iterator[memfaas.Session]:
        with memfaas.connect(self.cluster.address, tenant=tenant) as opened:
            yield opened

    # --- memory -----------------------------------------------------------------------------------

    def donors(self) -> dict[str, DonorInfo]:
        with self.session("operator") as opened:
            return {one.donor: one for one in opened.status().donors}

    def in_kernel(self, index: int) -> int:
        """Bytes that the kernel has given to the shared memory of a donor."""
        return measure.memfd_bytes(self.cluster.donor_pid(index))

    def seen_by_job(self, index: int, *options: str) -> int:
        """Runs a job on one node. Returns what `in_kernel` is as its first step begins."""
        command = [sys.executable, "-I", str(Path(measure.__file__)), str(self.cluster.donor_pid(index))]
        # A line for the job, and one for the memory.
        said = self.center.run(
            "srun", f"--nodelist=donor{index}", *options, "sh", "-c", 'echo $SLURM_JOB_ID; exec "$@"', "sh", *command
        )
        self._job, memory = said.split()
        return int(memory)

    def wait_calm(self) -> None:
        self.center.wait_idle()

        def all_lent() -> bool:
            return all(
                one.connected and not one.reclaimed and one.memory.offered == LENT_MIB * MIB
                for one in self.donors().values()
            )

        wait_for(all_lent, "all donors lend again all that they lent", _LONG_S, self.explain)
        with self.session("operator") as operator:
            # What a broker that is started anew hears of is kept for a while, for sessions that may come back.
            wait_for(lambda: not operator.status().stores, "no store is left", _LONG_S, self.explain)

    # --- hooks ------------------------------------------------------------------------------------

    def hooks(self) -> dict[str, HookRun]:
        """What became of each hook of the last job of `seen_by_job`, once all have run."""

        def found() -> dict[str, HookRun]:
            lines = (self.center.folder / "runs").read_text().splitlines()
            runs = [
                HookRun(hook, job, int(status), float(end) - float(start))
                for hook, job, status, start, end in map(str.split, lines)
            ]
            return {one.hook: one for one in runs if one.job == self._job}

        wait_for(lambda: set(_HOOKS) <= found().keys(), f"all hooks of job {self._job} have run", _LONG_S, self.explain)
        runs = found()
        print(f"job {self._job}: " + ", ".join(f"{hook} {runs[hook].seconds * 1000:.0f} ms" for hook in _HOOKS))
        return runs

    def said(self, hook: str) -> str:
        """What a hook has logged for the last job of `seen_by_job`."""
        lines = (self.center.folder / f"{hook}.log").read_text().splitlines()
        return "\n".join(line for line in lines if f"job {self._job}:" in line)

    def explain(self) -> str:
        logs = sorted(self.cluster.folder.glob("*.log"))
        return self.center.logs() + "".join(f"\n--- {one.name}\n{one.read_text()[-3000:]}" for one in logs)


def value(index: int) -> bytes:
    return index.to_bytes(4, "little") * (VALUE // 4)


def fill(store: memfaas.Store, size: int) -> int:
    """Puts values of so many bytes in all; returns how many."""
    count = size // VALUE
    for index in range(count):
        store.put(str(index), value(index))
    return count


class Reader:
    """Gets value after value in a thread and checks them, until it is stopped."""

    def __init__(self, store: memfaas.Store, count: int) -> None:
        self.gets = 0
        self.wrong: list[str] = []
        self._store, self._count = store, count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            index = self.gets % self._count
            try:
                if self._store.get(str(index)) != value(index):
                    self.wrong.append(f"{index}: another value")
            except memfaas.MemfaasError as error:
                self.wrong.append(f"{index}: {error!r}")
            self.gets += 1

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
