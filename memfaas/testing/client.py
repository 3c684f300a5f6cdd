"""A client that works hard until it is killed: `python -m memfaas.testing.client '{...}'` (see Work).

Its threads use one link to the memory each way, mapped, over tcp and over verbs, and write down what they do.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from memfaas._native import BROKEN, FROZEN, NEED_CONNECTION, LinkDown, ShmLink, TcpLink, VerbsLink
from memfaas.errors import FabricUnavailable, KeyAbsent, StoreFull
from memfaas.testing.function import admitted, welcomed
from memfaas.testing.history import Recorder, Step
from memfaas.testing.lease import BareStore, any_device
from memfaas.testing.values import Values, key_of

VALUES = Values(8, 40, 160, 600, 3000, 70_000, 200_000, 600_000)
"""Of values: small ones, in one block, and large ones, in pieces."""
WEIGHTS = (20, 30, 30, 10, 5, 3, 1, 1)
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Work:
    data: int
    control: int
    unix: str
    tcp_port: int
    part_size: int
    history: str
    """Files begin so; a thread's number and fabric are added."""
    first: int
    """Number of the first value; each thread has 2**32 of its own."""
    seed: int
    shm_threads: int
    tcp_threads: int
    verbs_threads: int
    operations: int
    """Of each thread, at most."""
    hot_keys: int
    keys: int
    timeout_s: float


T = TypeVar("T")


def _connect(
    family: socket.AddressFamily, address: str | tuple[str, int], ask: Callable[[socket.socket], T]
) -> tuple[socket.socket, T]:
    """A socket whose other end admitted us. A function that is killed meanwhile is followed by another."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(_PATIENCE_S)
        try:
            sock.connect(address)
            answer = ask(sock)
            sock.settimeout(None)
            return sock, answer
        except (EOFError, ConnectionError, BlockingIOError):
            sock.close()
            if time.monotonic() > deadline:
                raise


def connect_unix(path: str) -> tuple[socket.socket, int]:
    return _connect(socket.AF_UNIX, path, admitted)


def connect_tcp(port: int) -> int:
    return _connect(socket.AF_INET, ("127.0.0.1", port), admitted)[0].detach()


def add_verbs(link: VerbsLink, port: int) -> None:
    """Raises FabricUnavailable when the function is another one than before: its memory is registered anew."""
    pair = link.queue_pair()
    sock, welcome = _connect(socket.AF_INET, ("127.0.0.1", port), lambda sock: welcomed(sock, pair.address))
    with sock:
        link.add(sock.fileno(), pair, welcome, _PATIENCE_S)
        sock.detach()


def connect_verbs(port: int, timeout_s: float) -> VerbsLink:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        link = VerbsLink(any_device(), timeout_s)
        try:
            add_verbs(link, port)
            return link
        except FabricUnavailable:  # killed just now
            if time.monotonic() > deadline:
                raise


class _Worker:
    def __init__(self, work: Work, number: int, link: ShmLink | TcpLink | VerbsLink, recorder: Recorder) -> None:
        self._work = work
        self._choose = random.Random(work.seed * 1000 + number)
        self._next = work.first + (number << 32)
        self._record = recorder
        self._store = BareStore(work.part_size, self._repair)
        self._store._set_link(0, link)

    def _repair(self, store: BareStore, reason: int) -> None:
        if reason == FROZEN:  # while it is copied
            return
        link = store._get_link(0)
        if isinstance(link, ShmLink) or reason not in (NEED_CONNECTION, BROKEN):
            raise LinkDown(reason)
        if isinstance(link, TcpLink):
            link.add(connect_tcp(self._work.tcp_port))
        elif isinstance(link, VerbsLink):
            try:
                add_verbs(link, self._work.tcp_port)
            except FabricUnavailable:
                store._set_link(0, connect_verbs(self._work.tcp_port, self._work.timeout_s))

    def run(self) -> None:
        for _ in range(self._work.operations):
            hot = self._choose.random() < 0.7
            key = self._choose.randrange(self._work.hot_keys if hot else self._work.keys)
            self._one(key, self._choose.random())
        self._record.close()

    def _one(self, key: int, choice: float) -> None:
        name = key_of(key)
        if choice < 0.45:
            self._record.begin(Step.GET, key)
            try:
                value = self._store.get(name)
            except KeyAbsent:
                self._record.end(0)
            else:
                self._record.end(VALUES.number_of(value))
        elif choice < 0.85:
            self._next += 8
            number = self._next + self._choose.choices(range(8), WEIGHTS)[0]
            self._record.begin(Step.PUT, key, number)
            try:
                self._store.put(name, VALUES.value_of(number))
            except StoreFull:
                self._record.refused()
            else:
                self._record.end()
        else:
            self._record.begin(Step.DELETE, key)
            self._record.end(self._store.delete(name))


def main(work: Work) -> None:
    presence, participant = connect_unix(work.unix)
    shm = ShmLink(work.data, work.control, participant, work.timeout_s)
    links: list[tuple[ShmLink | TcpLink | VerbsLink, str]] = [(shm, "shm")] * work.shm_threads
    links += [(TcpLink(work.timeout_s), "tcp")] * work.tcp_threads
    if work.verbs_threads:
        links += [(connect_verbs(work.tcp_port, work.timeout_s), "verbs")] * work.verbs_threads
    failed: list[BaseException] = []

    def run(worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:
            failed.append(error)
            raise

    threads = []
    for number, (link, fabric) in enumerate(links):
        recorder = Recorder(Path(f"{work.history}.{number}.{fabric}"))
        worker = _Worker(work, number, link, recorder)
        threads.append(threading.Thread(target=run, args=(worker.run,), daemon=True))
    print("ready", flush=True)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    presence.close()
    if failed:
        raise SystemExit(f"an operation failed: {failed[0]!r}")


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])))
