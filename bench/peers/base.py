"""What the benchmark needs to know about a system that it measures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from memfaas.bench import processes

Kind = Literal["memfaas", "peer", "floor"]

STORE_BYTES = 1 << 30
"""The room that each system gets. The working sets of four clients take a third of it."""


class StartError(Exception):
    """A system did not start; the message says why."""


@dataclass(frozen=True)
class Site:
    """Where a system is started."""

    scratch: Path
    """A directory for it alone, on disk."""
    memory: Path
    """A directory for it alone, in memory."""
    door: Path
    """The unix socket that client processes connect to."""
    pool: Path
    """The file that the values come from."""
    clients: int
    """How many client processes to start."""


class Client(Protocol):
    """One process's connection to a key-value store."""

    def key(self, name: str, /) -> Any:
        """The key in the type that this store takes most directly."""

    def put(self, key: Any, value: bytes, /) -> object: ...

    def get(self, key: Any, /) -> Any: ...

    def close(self) -> None: ...


@runtime_checkable
class ReadsInto(Protocol):
    """A client that reads into the caller's buffer."""

    def get_into(self, key: Any, buffer: bytearray, /) -> object: ...


@runtime_checkable
class WritesMany(Protocol):
    """A client that writes many values in one operation."""

    def put_many(self, items: Mapping[Any, bytes], /) -> object: ...


@runtime_checkable
class ReadsMany(Protocol):
    """A client that reads many values in one operation."""

    def get_many(self, keys: Sequence[Any], /) -> Any: ...


class KeepsSizesApart(ABC):
    """A client of a store that would suffer if values of all sizes lay side by side in it."""

    @abstractmethod
    def use(self, size: int) -> None:
        """Turn to the place for values of this size."""


class BringsLoops(ABC):
    """A client whose operation is more than one call, and which a user would write in line."""

    @abstractmethod
    def loop(self, op: str) -> Callable[[Sequence[Any]], None] | None:
        """Does the operation once for each item, without a call in between; None where one call is all."""


class TimesItself(ABC):
    """A floor in native code, which repeats an operation by itself and brings the times along."""

    ops: ClassVar[tuple[str, ...]]

    @abstractmethod
    def times(self, op: str, size: int, count: int) -> array[int]:
        """Nanoseconds of each of `count` operations."""

    @abstractmethod
    def close(self) -> None: ...


class System(ABC):
    """A system under measurement.

    One object lives in the benchmark and starts and stops the servers; each client process makes
    another one and calls only `connect` on it.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    networked: ClassVar[bool]
    """Whether the bytes are handed to another process, as they would be to another node."""
    most_clients: ClassVar[int] = 64
    patience_s: ClassVar[float] = 30.0
    """How long the start, or one order to a client process, may take."""

    @abstractmethod
    def available(self) -> str | None:
        """Why the system can't run here, or None when it can."""

    @abstractmethod
    def detail(self) -> str:
        """Versions and settings, for the report."""

    @abstractmethod
    def start(self, site: Site) -> None:
        """Start servers and client processes. Raises StartError."""

    @abstractmethod
    def connect(self, endpoint: str) -> Client | TimesItself:
        """A client of the servers at `endpoint`; called in a client process."""

    @abstractmethod
    def exited(self) -> str | None:
        """Names a process that ended by itself, or None."""

    @abstractmethod
    def stop(self) -> None:
        """End everything that was started; also after a start that failed half way."""

    def pause(self) -> None:  # noqa: B027  (most systems cost nothing while nobody asks them)
        """Make sure that the system takes no CPU time until `resume`."""

    def resume(self) -> None:  # noqa: B027
        """The opposite of `pause`."""


class ServerSystem(System):
    """A system whose servers and clients are ordinary processes."""

    def __init__(self) -> None:
        self._processes: list[tuple[str, Path, subprocess.Popen[bytes]]] = []

    def start_process(self, site: Site, label: str, argv: Sequence[str | Path]) -> None:
        """Start one process; its output goes to a log in the scratch directory."""
        log = site.scratch / f"{label}.log"
        self._processes.append((label, log, processes.start([str(word) for word in argv], log)))

    def start_clients(self, site: Site, endpoint: str) -> None:
        """Start the client processes, which `connect` to this endpoint."""
        for index in range(min(site.clients, self.most_clients)):
            argv = [sys.executable, "-m", "memfaas.bench.worker"]
            argv += [self.name, endpoint, str(site.door), str(site.pool), str(index)]
            self.start_process(site, f"client {index}", argv)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for the servers. Raises StartError when one ends, or after `patience_s`."""
        deadline = time.monotonic() + self.patience_s
        while not ready():
            if (why := self.exited()) is not None:
                raise StartError(why)
            if time.monotonic() > deadline:
                raise StartError(f"not ready after {self.patience_s:.0f} s; {self._last_words()}")
            time.sleep(0.02)

    def exited(self) -> str | None:
        for label, log, process in self._processes:
            if process.poll() is not None:
                return f"its {label} ended with status {process.returncode}: {processes.tail(log)}"
        return None

    def stop(self) -> None:
        while self._processes:
            processes.stop(self._processes.pop()[2])

    def _last_words(self) -> str:
        return "; ".join(f"{label}: {processes.tail(log)}" for label, log, _ in self._processes)


def missing(*, modules: Sequence[str] = (), programs: Sequence[str] = ()) -> str | None:
    """Says which of these is not installed, or None."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"the Python module {module} is not installed"
    for name in programs:
        if find_program(name) is None:
            return f"the program {name} is not installed"
    return None


def find_program(name: str) -> str | None:
    """A program of this Python environment, or else of the system."""
    beside_python = Path(sys.executable).parent / name
    return str(beside_python) if beside_python.exists() else shutil.which(name)


def program(name: str) -> str:
    """As `find_program`; StartError when there is none."""
    if (found := find_program(name)) is None:
        raise StartError(f"the program {name} is not installed")
    return found


def program_version(*argv: str) -> str:
    """The first line that `argv` prints."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def versions(*distributions: str) -> str:
    """`name version, name version` of installed distributions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in distributions)
