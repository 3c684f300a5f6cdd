"""What the tests of reclaim and migration share: who holds which lease's memory, as the kernel tells it."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.errors import LeaseLost, MemfaasError, TransportError
from memfaas.messages import Reclaimed, Step
from memfaas.testing import fsck
from memfaas.units import GIB
from tests.e2e.scene import LIMIT_S, idle_functions_of, processes_of, until

EVERYTHING = 1 << 50
"""Bytes: more than any donor lends."""
PATIENT_S = LIMIT_S
"""A deadline for a reclaim that is to lose nothing, however busy the machine is."""
WARM = 2
"""Idle functions that a donor keeps."""
ContextOfMemory = AbstractContextManager[Callable[[], int]]


def operator(address: str) -> memfaas.Session:
    """A session that may reclaim, and waits for the answer as long as a test may take."""
    return memfaas.connect(address, tenant="operator", timeout=LIMIT_S)


# --- what the kernel knows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A process that serves a lease, or waits for one that is being sent to it."""

    pid: int
    lease: str
    """The first 8 digits."""
    donor: str
    data: Path
    """Opens the memory, for as long as the process lives."""
    control: Path
    backed: int
    """Bytes of the data that have pages, or blocks of a disk."""


def functions_in(pids: Iterable[int]) -> list[Function]:
    """Those of these processes that have a lease's memory and listen for its clients."""
    listening: dict[str, dict[str, Path]] = {}
    found = []
    for pid in pids:
        try:
            network = os.readlink(f"/proc/{pid}/ns/net")
            if network not in listening:
                listening[network] = _listening(pid)
            one = _function(pid, listening[network])
        except OSError:  # it has ended meanwhile
            continue
        if one is not None:
            found.append(one)
    return found


def functions_of(cluster: LocalCluster) -> list[Function]:
    return functions_in(processes_of(cluster))


def of_donor(cluster: LocalCluster, donor: str) -> list[Function]:
    return [one for one in functions_of(cluster) if one.donor == donor]


def _function(pid: int, listening: dict[str, Path]) -> Function | None:
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    if not name.startswith("mf-"):
        return None
    data = control = home = None
    for path in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(path)
        if ":control" in target:
            control = path
        elif target.endswith(" (deleted)") and stat.S_ISREG(path.stat().st_mode):  # a spill donor's has no name either
            data = path
        elif target.startswith("socket:") and (socket := listening.get(target)) and socket.suffix == ".sock":
            home = socket.parent.name
    if data is None or control is None or home is None:
        return None
    return Function(pid, name.removeprefix("mf-"), home, data, control, data.stat().st_blocks * 512)


def _listening(pid: int) -> dict[str, Path]:
    """Paths of the Unix sockets in the network of a process, by what their descriptors are called."""
    found = {}
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) > 7:
            found[f"socket:[{words[6]}]"] = Path(words[7])
    return found


@contextmanager
def memory_of(functions: Iterable[Function]) -> Iterator[Callable[[], int]]:
    """Bytes in pages of these functions' leases, also when all processes have let go of them."""
    with ExitStack() as stack:
        descriptors = []
        for one in functions:
            descriptors.append(os.open(one.data, os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, descriptors[-1])
        yield lambda: sum(os.fstat(descriptor).st_blocks * 512 for descriptor in descriptors)


def agents_descriptors(cluster: LocalCluster) -> dict[str, int]:
    """Open files of the broker and of each agent."""
    pids = {name: process.pid for name, process in cluster._processes.items()}
    return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}


# --- what must be so when all is quiet ------------------------------------------------------------------


def served_once(cluster: LocalCluster, session: memfaas.Session) -> bool:
    """Each lease that the broker knows of has one function, where it says; and there are no other functions."""
    try:
        leases = {(lease.lease.hex()[:8], lease.donor) for lease in session.status().leases if not is_over(lease.state)}
    except TransportError:
        return False
    return Counter(leases) == Counter((one.lease, one.donor) for one in functions_of(cluster))


def is_over(state: str) -> bool:
    return state in ("lost", "dropped")


def faults_of(cluster: LocalCluster) -> dict[str, object]:
    """What is wrong with the memory of each shard, or held in it, when nobody uses it."""
    found: dict[str, object] = {}
    for one in functions_of(cluster):
        with ExitStack() as stack:
            descriptors = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (one.data, one.control)]
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            wrong = fsck.faults(*descriptors)
        if wrong:
            found[f"{one.lease} on {one.donor}"] = wrong
    return found


def check_quiet(cluster: LocalCluster, session: memfaas.Session) -> None:
    """When the clients have gone: every lease is in one place, whole, and nothing else is left of any move."""
    until(lambda: served_once(cluster, session))
    donors = [name for name in cluster._processes if name != "broker"]
    until(lambda: idle_functions_of(cluster) == WARM * len(donors))
    # Broker, agents, their zygotes, and the functions: nobody else.
    until(lambda: len(processes_of(cluster)) == 1 + (2 + WARM) * len(donors) + len(functions_of(cluster)))
    for donor in donors:
        names = {path.name for path in (cluster.folder / "run" / donor).iterdir()}
        sockets = {name for name in names if name.endswith((".sock", ".ctl"))}
        leases = {name[:8] for name in sockets if not name.startswith("agent")}
        assert leases == {one.lease for one in of_donor(cluster, donor)}, f"{donor} left files: {sorted(names)}"
    until(lambda: faults_of(cluster) == {})


def check_nothing_lent(cluster: LocalCluster, donor: str) -> None:
    """Its agent and all functions have no page of anybody's lease."""
    assert of_donor(cluster, donor) == []


# --- reclaims -------------------------------------------------------------------------------------------


def freed(reclaimed: Reclaimed, *steps: Step) -> int:
    """Bytes that came back by these steps."""
    return sum(part.size for part in reclaimed.steps if part.how in steps)


def lost(reclaimed: Reclaimed) -> list[str]:
    return [part.what for part in reclaimed.steps if part.how == "lost"]


class Asked:
    """A reclaim that goes on in another thread."""

    def __init__(self, address: str, donor: str, size: int, deadline_s: float, holder: str = "job") -> None:
        self.reclaimed: Reclaimed | None = None
        self.error: MemfaasError | None = None
        self._arguments = (donor, size, deadline_s, holder)
        self._session = operator(address)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.reclaimed = self._session.reclaim(*self._arguments)
        except MemfaasError as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join(2 * LIMIT_S)
        assert not self._thread.is_alive(), "a reclaim does not end"
        self._session.close()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Reclaimed:
        self._thread.join(2 * LIMIT_S)
        if self.error is not None:
            raise self.error
        assert self.reclaimed is not None
        return self.reclaimed


def copying(cluster: LocalCluster, asked: Asked, away_from: str, least: int) -> Function:
    """Waits until another donor has got so many bytes of a lease that is still on its way; who gets them."""
    return copying_among(lambda: functions_of(cluster), asked, away_from, least)


def copying_among(all_functions: Callable[[], list[Function]], asked: Asked, away_from: str, least: int) -> Function:
    found: list[Function] = []

    def look() -> bool:
        assert not asked.over, f"it was over too soon: {asked.reclaimed or asked.error}"
        functions = all_functions()
        sent = {one.lease for one in functions if one.donor == away_from}
        found[:] = [one for one in functions if one.donor != away_from and one.lease in sent and one.backed >= least]
        return bool(found)

    until(look)
    return found[0]


def insist(session: memfaas.Session, donor: str, size: int, deadline_s: float, holder: str) -> Reclaimed:
    """As an operator does who hears that it failed: asks again."""
    answers: list[Reclaimed] = []

    def ask() -> bool:
        try:
            answers.append(session.reclaim(donor, size, deadline_s, holder))
        except TransportError:
            return False
        return True

    until(ask)
    return answers[0]


# --- values ---------------------------------------------------------------------------------------------


class Ledger:
    """Values that a store has acknowledged, and what became of each."""

    def __init__(self, store: memfaas.Store, count: int, length: int, seed: int = 1) -> None:
        self._length = length
        self._seed = seed
        self.keys = [b"%d" % number for number in range(count)]
        for key in self.keys:
            store.put(key, self._value(key))

    def _value(self, key: bytes) -> bytes:
        piece = b"%s/%d/" % (key, self._seed)
        return (piece * (self._length // len(piece) + 1))[: self._length]

    def missing(self, store: memfaas.Store) -> list[bytes]:
        """Keys whose value is reported as lost. All others must be there, whole."""
        missing = []
        for key in self.keys:
            try:
                assert store.get(key) == self._value(key), key
            except LeaseLost:
                missing.append(key)
        return missing


# --- another donor --------------------------------------------------------------------------------------


def add_donor(cluster: LocalCluster, name: str, memory: int, **settings: object) -> None:
    cluster._launch(
        "donor",
        broker=cluster._address,
        name=name,
        memory=memory,
        headroom=0,
        listen_host="127.0.0.1",
        runtime_dir=cluster.folder / "run",
        **settings,
    )
    cluster._processes[name].wait_ready()


def add_spill_donor(cluster: LocalCluster, name: str, backing: Path, memory: int = GIB) -> None:
    add_donor(cluster, name, memory, backing=backing)
