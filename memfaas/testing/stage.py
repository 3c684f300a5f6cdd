"""Real processes around one shard's memory: a function and clients, each of which may be killed.

What each thread of each client did is written down, for its history to be checked.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from memfaas._native import Memory, ShmLink
from memfaas.errors import KeyAbsent
from memfaas.testing import fsck, history
from memfaas.testing.client import VALUES, Work
from memfaas.testing.lease import BareStore, make_memory
from memfaas.testing.linearizability import Operation
from memfaas.testing.values import key_of

SIZE = 48 << 20
KEYS = 40
HOT_KEYS = 4
LIMIT_S = 60.0
"""For what a test waits for: far more than it takes, so that only a hang is a failure."""


def _wait_for_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _, errors = process.communicate(timeout=LIMIT_S)
        raise AssertionError(f"a process did not start: {errors}")


@dataclass
class Life:
    """One process of a client, and when it ended."""

    process: subprocess.Popen[str]
    history: str
    killed: bool = False
    ended: int = 0


@dataclass
class Stage:
    """The memory, its listening sockets, the function and its clients."""

    folder: Path
    choose: random.Random
    shm_threads: int = 2
    """Of each client, and so on."""
    tcp_threads: int = 1
    verbs_threads: int = 0
    data: int = 0
    control: int = 0
    lives: list[Life] = field(default_factory=list)
    function: subprocess.Popen[str] | None = None
    function_ends: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data, self.control = make_memory("shard", SIZE)
        self.memory = Memory(self.data, self.control)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0memfaas-test-{secrets.token_hex(8)}")
        self.unix.listen(100)
        self.tcp = socket.create_server(("127.0.0.1", 0), backlog=100)

    def close(self) -> None:
        running = [life.process for life in self.lives] + ([self.function] if self.function else [])
        for process in running:
            process.kill()
            process.communicate()
        self.memory.close()
        self.unix.close()
        self.tcp.close()
        os.close(self.data)
        os.close(self.control)

    def start(self, module: str, *arguments: object, descriptors: tuple[int, ...]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, arguments)],
            pass_fds=descriptors, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start_function(self) -> None:
        descriptors = (self.data, self.control, self.unix.fileno(), self.tcp.fileno())
        self.function = self.start("memfaas.testing.function", *descriptors, descriptors=descriptors)

    def kill_function(self) -> None:
        assert self.function is not None
        if self.choose.random() < 0.7:  # else perhaps while it cleans up behind its predecessor
            _wait_for_line(self.function)
        self.function.send_signal(signal.SIGKILL)
        self.function.communicate(timeout=LIMIT_S)
        self.function_ends.append(time.monotonic_ns())
        self.start_function()

    def end_function(self) -> None:
        assert self.function is not None
        _, errors = self.function.communicate(timeout=LIMIT_S)  # closes its standard input
        assert self.function.returncode == 0, errors
        self.function_ends.append(time.monotonic_ns())
        self.function = None

    def start_client(self, operations: int) -> None:
        number = len(self.lives) + 1
        work = Work(
            data=self.data, control=self.control, unix=str(self.unix.getsockname().decode()),
            tcp_port=self.tcp.getsockname()[1], part_size=self.memory.part_size,
            history=str(self.folder / f"client-{number}"), first=number << 40, seed=self.choose.randrange(1 << 30),
            shm_threads=self.shm_threads, tcp_threads=self.tcp_threads, verbs_threads=self.verbs_threads,
            operations=operations, hot_keys=HOT_KEYS, keys=KEYS, timeout_s=20.0,
        )  # fmt: skip
        process = self.start("memfaas.testing.client", json.dumps(asdict(work)), descriptors=(self.data, self.control))
        self.lives.append(Life(process, work.history))

    def running(self) -> list[Life]:
        return [life for life in self.lives if not life.ended]

    def at_work(self) -> list[Life]:
        return [life for life in self.running() if any(self.folder.glob(f"{Path(life.history).name}.0.*"))]

    def note_ends(self, timeout_s: float = 0.0) -> None:
        """Of clients that have done their work, or were killed."""
        for life in self.running():
            try:
                life.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                if timeout_s:
                    raise
                continue
            life.ended = time.monotonic_ns()
            _, errors = life.process.communicate()
            assert life.process.returncode in ((0, -signal.SIGKILL) if life.killed else (0,)), errors

    def kill(self, some: list[Life]) -> None:
        for life in some:
            life.killed = True
            life.process.kill()
        for life in some:
            life.process.wait(LIMIT_S)
        self.note_ends()

    def mapped_store(self) -> BareStore:
        """For a client in this process."""
        store = BareStore(self.memory.part_size)
        store._set_link(0, ShmLink(self.data, self.control, self.memory.attach(os.getpid(), 1), 20.0))
        return store

    def wait_until_all_is_put_right(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self.memory.participants() or fsck.held(self.control, "shard", SIZE):
            assert time.monotonic() < deadline, fsck.held(self.control, "shard", SIZE)
            time.sleep(0.01)

    def operations(self) -> dict[int, list[Operation]]:
        """By key, of all threads that ever were."""
        by_key: dict[int, list[Operation]] = defaultdict(list)
        for life in self.lives:
            for path in self.folder.glob(f"{Path(life.history).name}.*"):
                # A killed process has done nothing after its end. But a request that it sent may have been
                # served after that, until the function that had it was killed as well.
                end = life.ended
                if path.suffix != ".shm":
                    end = next(moment for moment in self.function_ends if moment >= end)
                for one in history.read(path, lambda _, end=end: end):  # type: ignore[misc]
                    by_key[one.key].append(one.operation)
        return by_key


def final_reads(store: BareStore) -> Iterator[tuple[int, Operation]]:
    """Of every key, by its number."""
    for key in range(KEYS):
        start = time.monotonic_ns()
        try:
            value = VALUES.number_of(store.get(key_of(key)))
        except KeyAbsent:
            value = 0
        yield key, Operation("get", start, time.monotonic_ns(), value)
