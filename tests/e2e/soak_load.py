"""One process of the soak: run by path, with a `Work` as JSON. Prints what it has left in the stores.

Every thread is the only writer of its own keys, so it knows what each must hold, whatever the others do;
it also reads the others' keys, whose versions may only grow. A value follows from its key and version.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import memfaas
from memfaas.errors import KeyAbsent, StoreFull
from memfaas.fabric import Choice

LENGTHS = (16, 50, 300, 4000, 30_000, 200_000, 1_500_000, 5_000_000)
"""Of values; the longest is in parts."""
_WEIGHTS = (20, 30, 30, 20, 10, 5, 2, 1)
SMALL = 3
"""Lengths up to that of this index are for batches."""
KEYS = 16
"""Of each thread in each store."""
_PAUSE_S = 0.003


def value_of(key: bytes, version: int) -> bytes:
    """Version and length first; odd versions cannot be compressed, even ones can."""
    seed = hashlib.blake2b(b"%d:%s" % (version, key), digest_size=8).digest()
    rest = LENGTHS[version % 8] - 16
    body = random.Random(seed).randbytes(rest) if version >> 3 & 1 else seed * (rest // 8 + 1)
    return version.to_bytes(8, "little") + rest.to_bytes(8, "little") + body[:rest]


def version_of(key: bytes, value: bytes) -> int:
    """Raises AssertionError for bytes that nobody has put under this key."""
    version = int.from_bytes(value[:8], "little")
    assert value == value_of(key, version), f"{key!r} has {len(value)} bytes that are no version of it: {value[:32]!r}"
    return version


def key_of(process: int, thread: int, number: int) -> bytes:
    return b"%d/%d/%d" % (process, thread, number)


@dataclass(frozen=True)
class Work:
    address: str
    fabric: Choice
    stores: list[str]
    process: int
    processes: int
    threads: int
    seconds: float
    seed: int


class Owner:
    """One thread, with its keys in one store."""

    def __init__(self, work: Work, thread: int, store: memfaas.Store) -> None:
        self.versions: dict[bytes, int] = {}
        """Of those keys that are there."""
        self.operations = 0
        self._work = work
        self._prefix = b"%d/%d/" % (work.process, thread)
        self._own = [key_of(work.process, thread, number) for number in range(KEYS)]
        self._store = store
        self._choose = random.Random(f"{work.seed}/{store.name}/{work.process}/{thread}")
        self._seen: dict[bytes, int] = {}
        self._version = 0
        self._buffer = bytearray(max(LENGTHS))

    def step(self) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (30, self._put), (20, self._read), (20, self._read_another), (8, self._delete), (6, self._put_many),
            (6, self._get_many), (4, self._put_array), (3, self._put_stream), (2, self._list), (1, self._sweep),
        ]  # fmt: skip
        weights = [weight for weight, _ in actions]
        (_, action) = self._choose.choices(actions, weights)[0]
        action()
        self.operations += 1

    # --- own keys -----------------------------------------------------------------------------------

    def _next(self, longest: int = len(LENGTHS) - 1) -> int:
        """A higher version, with a length of chance."""
        self._version += 1
        length = self._choose.choices(range(longest + 1), _WEIGHTS[: longest + 1])[0]
        return self._version << 3 | length

    def _write(self, key: bytes, write: Callable[[bytes], object]) -> None:
        """What the store had no room for leaves what was there."""
        version = self._next()
        value = value_of(key, version)
        try:
            write(value)
        except StoreFull:
            return
        self.versions[key] = version

    def _put(self) -> None:
        key = self._choose.choice(self._own)
        self._write(key, lambda value: self._store.put(key, value))

    def _put_array(self) -> None:
        key = self._choose.choice(self._own)
        self._write(key, lambda value: self._store.put(key, np.frombuffer(value, np.uint8)))
        if key in self.versions:
            assert self._store.get_array(key).tobytes() == value_of(key, self.versions[key])

    def _put_stream(self) -> None:
        key = self._choose.choice(self._own)
        self._write(key, lambda value: self._store.put_from(key, io.BytesIO(value)))
        if key in self.versions:
            copy = io.BytesIO()
            self._store.get_to(key, copy)
            assert copy.getvalue() == value_of(key, self.versions[key])

    def _put_many(self) -> None:
        fresh = {key: self._next(SMALL) for key in self._choose.sample(self._own, 6)}
        try:
            self._store.put_many({key: value_of(key, version) for key, version in fresh.items()})
        except StoreFull:  # some of them may be there
            for key in fresh:
                self._store.delete(key)
                self.versions.pop(key, None)
            return
        self.versions |= fresh

    def _read(self) -> None:
        key = self._choose.choice(self._own)
        try:
            if self._choose.random() < 0.5:
                value = self._store.get(key)
            else:
                value = bytes(memoryview(self._buffer)[: self._store.get_into(key, self._buffer)])
        except KeyAbsent:
            assert key not in self.versions, f"{key!r} is lost"
            assert key not in self._store
        else:
            assert version_of(key, value) == self.versions.get(key), f"{key!r} is not what was put"
            assert key in self._store

    def _get_many(self) -> None:
        keys = self._choose.sample(self._own, 10)
        for key, value in zip(keys, self._store.get_many(keys), strict=True):
            found = None if value is None else version_of(key, value)
            assert found == self.versions.get(key), f"{key!r} is not what was put"

    def _delete(self) -> None:
        key = self._choose.choice(self._own)
        assert self._store.delete(key) == (key in self.versions)
        self.versions.pop(key, None)

    def _list(self) -> None:
        assert sorted(self._store.keys(self._prefix)) == sorted(self.versions)

    def _sweep(self) -> None:
        """Nothing is old enough, so it must leave everybody's parts alone."""
        assert self._store._parts.sweep() == 0

    # --- the others' ------------------------------------------------------------------------------------

    def _read_another(self) -> None:
        choose = self._choose.randrange
        key = key_of(choose(self._work.processes), choose(self._work.threads), choose(KEYS))
        try:
            version = version_of(key, self._store.get(key))
        except KeyAbsent:
            return
        assert version >= self._seen.get(key, 0), f"{key!r} went back to an older version"
        self._seen[key] = version


def main(work: Work) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    left: dict[str, dict[str, int]] = {name: {} for name in work.stores}
    operations = 0

    def run(owners: list[Owner], until: float) -> None:
        try:
            while time.monotonic() < until:
                for owner in owners:
                    owner.step()
                    time.sleep(_PAUSE_S)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # nobody waits for the other threads

    with memfaas.connect(work.address, fabric=work.fabric) as session:
        stores = [session.store(name) for name in work.stores]
        crews = [[Owner(work, number, store) for store in stores] for number in range(work.threads)]
        until = time.monotonic() + work.seconds
        threads = [threading.Thread(target=run, args=(owners, until)) for owners in crews]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for owners in crews:
            for name, owner in zip(work.stores, owners, strict=True):
                left[name] |= {key.decode(): version for key, version in owner.versions.items()}
                operations += owner.operations
    del stores, crews, threads, session
    gc.collect()
    assert threading.active_count() == 1, threading.enumerate()
    now = os.listdir("/proc/self/fd")
    assert len(now) == descriptors, f"{len(now)} descriptors are open, not {descriptors}"
    print(json.dumps({"left": left, "operations": operations}))


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])))
