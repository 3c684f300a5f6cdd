"""A client process at work until its standard input ends: run by path, with a `Work` as JSON.

Each thread puts, gets and deletes a few keys that it shares with everybody else, and writes down what
it did and when. Any error but an absent key and a full store ends the process with exit status 1.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import memfaas
from memfaas.errors import KeyAbsent, StoreFull
from memfaas.fabric import Choice
from memfaas.testing.history import Recorder, Step
from memfaas.testing.values import Values, key_of

VALUES = Values(8, 40, 160, 1000, 6000, 70_000, 600_000, 5_000_000)
"""Of values: in one block, in chunks, and the longest in parts that lie in all shards."""
_WEIGHTS = (20, 30, 30, 20, 10, 4, 2, 1)
_READS = 0.5
_PUTS = 0.4
_PAUSE_S = 0.002
"""At most, between operations: two processors are enough for all, and histories stay short."""


@dataclass(frozen=True)
class Work:
    address: str
    fabric: Choice
    store: str
    history: str
    """Files begin so; a thread's number is added."""
    first: int
    """Number of the first value; each thread has 2**32 of its own."""
    threads: int
    keys: int
    seed: int
    longest: int
    """Bytes of the longest value."""
    only_reads: bool = False


class _Worker:
    def __init__(self, work: Work, number: int, store: memfaas.Store) -> None:
        self._work = work
        self._store = store
        self._choose = random.Random(work.seed * 1000 + number)
        self._next = work.first + (number << 32)
        self._record = Recorder(Path(f"{work.history}.{number}"))
        self._buffer = bytearray(work.longest)
        self._lengths = [index for index, length in enumerate(VALUES.lengths) if length <= work.longest]
        self._weights = [_WEIGHTS[index] for index in self._lengths]

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            time.sleep(self._choose.uniform(0, _PAUSE_S))
            key, choice = self._choose.randrange(self._work.keys), self._choose.random()
            if self._work.only_reads or choice < _READS:
                self._get(key)
            elif choice < _READS + _PUTS:
                self._put(key)
            else:
                self._record.begin(Step.DELETE, key)
                self._record.end(self._store.delete(key_of(key)))
        self._record.close()

    def _get(self, key: int) -> None:
        copies = self._choose.random() < 0.5
        self._record.begin(Step.GET, key)
        try:
            if copies:
                value = self._store.get(key_of(key))
            else:
                value = bytes(memoryview(self._buffer)[: self._store.get_into(key_of(key), self._buffer)])
        except KeyAbsent:
            self._record.end(0)
        else:
            self._record.end(VALUES.number_of(value))

    def _put(self, key: int) -> None:
        self._next += 8
        number = self._next + self._choose.choices(self._lengths, self._weights)[0]
        value = VALUES.value_of(number)
        self._record.begin(Step.PUT, key, number)
        try:
            self._store.put(key_of(key), value)
        except StoreFull:
            self._record.refused()
        else:
            self._record.end()


def main(work: Work) -> None:
    stop = threading.Event()

    def run(worker: _Worker) -> None:
        try:
            worker.run(stop)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # nobody waits for the other threads

    with memfaas.connect(work.address, fabric=work.fabric) as session:
        store = session.store(work.store)
        workers = [_Worker(work, number, store) for number in range(work.threads)]
        threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        print("ready", flush=True)
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])))
