"""One system with its client processes, as the benchmark sees it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from memfaas.bench.link import Answer, Done, Failed, Hello, Link, Load, Order, Prepare, Ran, Run, Stop
from memfaas.bench.measure import Slice
from memfaas.bench.peers.base import Kind, Site, StartError, System
from memfaas.bench.plan import Case
from memfaas.bench.values import write_pool

_HEAD_START_NS = 5_000_000
"""How far ahead a common start is set: enough for every client to get the order and be waiting."""


class CrewError(Exception):
    """The system could not do what was asked; the message says why."""


class CrewLost(CrewError):
    """Nothing more will come from this system."""


class Crew(Protocol):
    """What the run needs of a system: real ones are `ProcessCrew`s."""

    name: str
    kind: Kind

    def can(self, case: Case) -> bool:
        """Whether the system has this operation and so many clients."""

    def load(self, size: int, clients: int) -> None:
        """Store the working sets of so many clients. Raises CrewError."""

    def prepare(self, case: Case) -> float:
        """Make the case ready; about how many nanoseconds an operation takes. Raises CrewError."""

    def run(self, case: Case, window_s: float) -> list[Slice]:
        """Do the prepared case for this long, all clients at once; one slice for each. Raises CrewError."""

    def rest(self) -> None:
        """Take no CPU time until the next order."""


class ProcessCrew:
    """A running system. `start` makes it, `stop` ends all of its processes."""

    def __init__(self, system: System, clients: int) -> None:
        self.name = system.name
        self.kind = system.kind
        self._system = system
        self._clients = min(clients, system.most_clients)
        self._links: list[Link] = []
        self._ops: tuple[str, ...] = ()
        self._resting = False

    def start(self, scratch: Path, memory: Path, pool: Path) -> None:
        """Start the system and wait for its clients. Raises StartError; call `stop` also then."""
        door = scratch / "door"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(door))
            listener.listen()
            listener.settimeout(0.2)
            self._system.start(Site(scratch, memory, door, pool, self._clients))
            self._links = self._welcome(listener)

    def can(self, case: Case) -> bool:
        return case.op in self._ops and case.clients <= self._clients

    def load(self, size: int, clients: int) -> None:
        self._ask(self._links[:clients], Load(size))

    def prepare(self, case: Case) -> float:
        answers = self._ask(self._links[: case.clients], Prepare(case))
        return max(answer.op_ns for answer in answers if isinstance(answer, Done))

    def run(self, case: Case, window_s: float) -> list[Slice]:
        links = self._links[: case.clients]
        start = time.monotonic_ns() + (_HEAD_START_NS if len(links) > 1 else 0)
        answers = self._ask(links, Run(start, start + int(window_s * 1e9)))
        return [answer.slice for answer in answers if isinstance(answer, Ran)]

    def rest(self) -> None:
        if not self._resting:
            self._resting = True
            self._system.pause()

    def stop(self) -> None:
        """End all processes of the system. Never raises."""
        self._wake()
        for link in self._links:
            try:
                link.send(Stop())
            except OSError:
                pass  # it is gone already
            link.close()
        self._links = []
        self._system.stop()

    def _welcome(self, listener: socket.socket) -> list[Link]:
        found: dict[int, tuple[Link, Hello]] = {}
        deadline = time.monotonic() + self._system.patience_s
        while len(found) < self._clients:
            if (why := self._system.exited()) is not None:
                raise StartError(why)
            if time.monotonic() > deadline:
                came = f"{len(found)} of {self._clients} clients"
                raise StartError(f"only {came} came in {self._system.patience_s:.0f} s")
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            link = Link(sock)
            hello = link.answer(self._system.patience_s)
            if not isinstance(hello, Hello):
                raise StartError(f"a client began with {hello}")
            found[hello.client] = link, hello
        self._ops = found[0][1].ops
        return [link for _, (link, _) in sorted(found.items())]

    def _ask(self, links: Sequence[Link], order: Order) -> list[Answer]:
        self._wake()
        try:
            for link in links:
                link.send(order)
            answers = [link.answer(self._system.patience_s) for link in links]
        except TimeoutError:
            raise CrewLost(f"a client did not answer in {self._system.patience_s:.0f} s") from None
        except (EOFError, OSError) as error:
            raise CrewLost(self._system.exited() or f"a client is gone: {error}") from error
        for answer in answers:
            if isinstance(answer, Failed):
                raise CrewError(answer.reason)
        return answers

    def _wake(self) -> None:
        if self._resting:
            self._resting = False
            self._system.resume()


@contextmanager
def camp(sizes: Sequence[int]) -> Iterator[Camp]:
    """A place to start systems in; at the end all are stopped and their files removed."""
    with ExitStack() as stack:
        disk = Path(stack.enter_context(TemporaryDirectory(prefix="memfaas-bench-")))
        memory = Path(stack.enter_context(TemporaryDirectory(prefix="memfaas-bench-", dir="/dev/shm")))
        pool = memory / "pool"
        write_pool(pool, sizes)
        yield Camp(stack, disk, memory, pool)


class Camp:
    """Starts systems, each in directories of its own."""

    def __init__(self, stack: ExitStack, disk: Path, memory: Path, pool: Path) -> None:
        self._stack = stack
        self._disk = disk
        self._memory = memory
        self._pool = pool
        self._count = 0

    def start(self, system: System, clients: int) -> ProcessCrew:
        """A running crew of the system. Raises StartError, with nothing left running."""
        self._count += 1
        scratch, memory = (place / str(self._count) for place in (self._disk, self._memory))
        scratch.mkdir()
        memory.mkdir()
        crew = ProcessCrew(system, clients)
        self._stack.callback(crew.stop)
        try:
            crew.start(scratch, memory, self._pool)
        except Exception as error:
            crew.stop()
            raise StartError(str(error) or type(error).__name__) from error
        return crew
