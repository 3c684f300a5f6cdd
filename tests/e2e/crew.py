"""A crew of client processes at work on one store, and the judge of what they saw."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import memfaas
from memfaas.errors import KeyAbsent
from memfaas.fabric import Choice
from memfaas.testing import history
from memfaas.testing.linearizability import Operation, check
from memfaas.testing.values import key_of
from tests.e2e.load import VALUES, Work
from tests.e2e.scene import LIMIT_S, until

_LOAD = Path(__file__).with_name("load.py")
_RECORD_BYTES = 24
_MORE = 40
"""Records of each thread after which it is plain that it goes on."""


@dataclass
class Client:
    process: subprocess.Popen[str]
    work: Work

    def progress(self) -> list[int]:
        """Records that each thread has written so far."""
        paths = [Path(f"{self.work.history}.{number}") for number in range(self.work.threads)]
        return [path.stat().st_size // _RECORD_BYTES for path in paths]


class Crew:
    """Ends, and kills, whom it started. `finish` says whether all was as it should be."""

    def __init__(
        self,
        address: str,
        folder: Path,
        *,
        store: str = "s",
        keys: int = 12,
        seed: int = 1,
        longest: int = max(VALUES.lengths),
        fabrics: tuple[Choice, ...] = ("shm", "tcp"),
    ) -> None:
        """`longest`: bytes of the longest value; `fabrics`: those that can be used."""
        self._address = address
        self._longest = longest
        self._fabrics = fabrics
        self._folder = folder
        self._store = store
        self._keys = keys
        self._seed = seed
        self._started = 0
        self.clients: list[Client] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self.clients:
            client.process.kill()
            client.process.communicate()

    def join(self, fabric: Choice, threads: int = 2, only_reads: bool = False) -> Client:
        """One more client, which is at work when this returns."""
        self._started += 1
        work = Work(
            address=self._address, fabric=fabric, store=self._store, history=str(self._folder / f"c{self._started}"),
            first=self._started << 40, threads=threads, keys=self._keys, seed=self._seed * 100 + self._started,
            longest=self._longest, only_reads=only_reads,
        )  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-P", str(_LOAD), json.dumps(asdict(work))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        client = Client(process, work)
        self.clients.append(client)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise AssertionError(f"a client did not start: {process.communicate(timeout=LIMIT_S)[1]}")
        return client

    def running(self) -> list[Client]:
        return [client for client in self.clients if client.process.returncode is None]

    def kill(self, client: Client) -> None:
        """As by `kill -9`; what it did until then counts."""
        client.process.kill()
        client.process.communicate(timeout=LIMIT_S)

    def goes_on(self) -> None:
        """Returns when every thread of every client that lives has done some more."""
        running = self.running()
        before = [client.progress() for client in running]

        def done() -> bool:
            for client in running:
                assert client.process.poll() is None, client.process.communicate()[1]
            return all(
                now >= then + _MORE
                for client, was in zip(running, before, strict=True)
                for now, then in zip(client.progress(), was, strict=True)
            )

        until(done)

    def finish(self) -> None:
        """Ends all, and asserts that nobody saw an error, and that each key's whole history is linearizable."""
        for client in self.running():
            _, errors = client.process.communicate(timeout=LIMIT_S)
            assert client.process.returncode == 0, errors
        by_key: dict[int, list[Operation]] = defaultdict(list)
        for client in self.clients:
            for number in range(client.work.threads):
                for one in history.read(Path(f"{client.work.history}.{number}"), lambda start: None):
                    by_key[one.key].append(one.operation)
        for key, operation in self._final():
            by_key[key].append(operation)
        for key, operations in by_key.items():
            violation = check(operations)
            assert violation is None, f"{key_of(key)!r}: {violation}"

    def _final(self) -> Iterable[tuple[int, Operation]]:
        """What is there in the end, as a newcomer sees it, on each fabric."""
        for fabric in self._fabrics:
            with memfaas.connect(self._address, fabric=fabric) as session:
                store = session.store(self._store)
                for key in range(self._keys):
                    start = time.monotonic_ns()
                    try:
                        number = VALUES.number_of(store.get(key_of(key)))
                    except KeyAbsent:
                        number = 0
                    yield key, Operation("get", start, time.monotonic_ns(), number)
