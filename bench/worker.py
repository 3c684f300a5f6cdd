"""A client process: it connects to one system and carries out the benchmark's orders.

python -m memfaas.bench.worker SYSTEM ENDPOINT DOOR POOL INDEX
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from memfaas.bench.link import Answer, Done, Failed, Hello, Link, Load, Order, Prepare, Ran, Run, Stop
from memfaas.bench.measure import Action, Clock, Slice, calibrate, measure, one_argument, two_arguments
from memfaas.bench.peers.base import BringsLoops, Client, KeepsSizesApart, ReadsInto, ReadsMany, TimesItself, WritesMany
from memfaas.bench.plan import Case, key_count, key_name
from memfaas.bench.values import Values

_WARM_UP_NS = 2_000_000


class Worker(Protocol):
    """What carries out the orders."""

    def ops(self) -> tuple[str, ...]: ...
    def load(self, size: int) -> None: ...
    def prepare(self, case: Case) -> float: ...
    def run(self, until_ns: int) -> Slice: ...
    def close(self) -> None: ...


class StoreWorker:
    """Carries out orders with a key-value client."""

    def __init__(self, client: Client, index: int, values: Values, clock: Clock = time.monotonic_ns) -> None:
        self._client = client
        self._index = index
        self._values = values
        self._clock = clock
        self._calibrated: dict[Case, tuple[int, float]] = {}
        self._case = Case("get", 0, 1)
        self._action: Action | None = None
        self._buffer = bytearray()

    def ops(self) -> tuple[str, ...]:
        """The operations that the client knows."""
        found = ["put", "get"]
        if isinstance(self._client, ReadsInto):
            found.append("get_into")
        if isinstance(self._client, WritesMany):
            found.append("put_many")
        if isinstance(self._client, ReadsMany):
            found.append("get_many")
        return tuple(found)

    def load(self, size: int) -> None:
        """Store the working set of this size and check all of it. Raises ValueError on wrong bytes."""
        self._turn_to(size)
        keys = self._keys(size)
        for index, key in enumerate(keys):
            self._client.put(key, self._values.value(size, index))
        for index, key in enumerate(keys):
            self._check(self._client.get(key), size, index)

    def prepare(self, case: Case) -> float:
        """Make the case ready and warm; returns about how many nanoseconds one operation takes."""
        self._turn_to(case.size)
        action = self._make_action(case)
        if case not in self._calibrated:
            self._calibrated[case] = calibrate(action, self._clock)
        end = self._clock() + _WARM_UP_NS
        for start in range(len(action.items)):
            action.run(action.items[start : start + 1])
            if self._clock() >= end:
                break
        self._case, self._action = case, action
        return self._calibrated[case][1]

    def run(self, until_ns: int) -> Slice:
        """Do the prepared case until the clock shows `until_ns`, and check one of the values."""
        if self._action is None:
            raise RuntimeError("no case is prepared")
        action, case = self._action, self._case
        # The values of a large put are many megabytes: they are not kept while others are measured.
        self._action = None
        outcome = measure(action, self._calibrated[case][0], until_ns, self._clock)
        self._check(self._client.get(self._keys(case.size)[0]), case.size, 0)
        if case.op == "get_into":
            action.run(action.items[:1])
            self._check(self._buffer, case.size, 0)
        return outcome

    def close(self) -> None:
        self._client.close()

    def _make_action(self, case: Case) -> Action:
        client, size = self._client, case.size
        keys = self._keys(size)
        loop = client.loop(case.op) if isinstance(client, BringsLoops) else None
        if case.op == "put":
            pairs = [(key, self._values.value(size, index)) for index, key in enumerate(keys)]
            return Action(loop or two_arguments(client.put), pairs)
        if case.op == "get":
            return Action(loop or one_argument(client.get), keys)
        if case.op == "get_into" and isinstance(client, ReadsInto):
            self._buffer = bytearray(size)
            return Action(two_arguments(client.get_into), [(key, self._buffer) for key in keys])
        if case.op == "put_many" and isinstance(client, WritesMany):
            items = {key: self._values.value(size, i) for i, key in enumerate(keys[: case.batch])}
            return Action(one_argument(client.put_many), [items])
        if case.op == "get_many" and isinstance(client, ReadsMany):
            self._check_many(client.get_many(keys[: case.batch]), keys[: case.batch], size)
            return Action(one_argument(client.get_many), [keys[: case.batch]])
        raise ValueError(f"this client has no {case.op}")

    def _turn_to(self, size: int) -> None:
        if isinstance(self._client, KeepsSizesApart):
            self._client.use(size)

    def _keys(self, size: int) -> list[Any]:
        return [self._client.key(key_name(size, self._index, i)) for i in range(key_count(size))]

    def _check(self, found: Any, size: int, index: int) -> None:
        if found is None or bytes(found) != self._values.value(size, index):
            what = "nothing" if found is None else f"{len(found)} bytes, and not the right ones"
            raise ValueError(f"a get of {size} bytes brought {what}")

    def _check_many(self, found: Any, keys: list[Any], size: int) -> None:
        values = [found[key] for key in keys] if isinstance(found, Mapping) else list(found)
        if len(values) != len(keys):
            raise ValueError(f"a get of {len(keys)} keys brought {len(values)} values")
        for index, value in enumerate(values):
            self._check(value, size, index)


class FloorWorker:
    """Carries out orders with native code that times itself."""

    def __init__(self, floor: TimesItself, clock: Clock = time.monotonic_ns) -> None:
        self._floor = floor
        self._clock = clock
        self._case = Case("get", 0, 1)
        self._op_ns = 0.0

    def ops(self) -> tuple[str, ...]:
        return self._floor.ops

    def load(self, size: int) -> None:
        """Nothing is stored."""

    def prepare(self, case: Case) -> float:
        times = self._floor.times(case.op, case.size, 10 if case.size < 1 << 20 else 3)
        self._case, self._op_ns = case, sum(times) / len(times)
        return self._op_ns

    def run(self, until_ns: int) -> Slice:
        start = self._clock()
        count = max(1, int((until_ns - start) / self._op_ns))
        times = [float(t) for t in self._floor.times(self._case.op, self._case.size, count)]
        return Slice(len(times), self._clock() - start, times, times)

    def close(self) -> None:
        self._floor.close()


def make_worker(client: Client | TimesItself, pool: Path, index: int) -> Worker:
    """What carries out orders with this kind of client."""
    if isinstance(client, TimesItself):
        return FloorWorker(client)
    return StoreWorker(client, index, Values.open(pool))


def serve(client: Client | TimesItself, door: Path, pool: Path, index: int) -> None:
    """Take orders at the benchmark's door until it says stop or goes away."""
    worker = make_worker(client, pool, index)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(door))
        link = Link(sock)
        link.send(Hello(client=index, pid=os.getpid(), ops=worker.ops()))
        try:
            while not isinstance(order := link.next_order(), Stop):
                link.send(carry_out(worker, order))
        except EOFError:
            pass  # the benchmark is gone
        finally:
            worker.close()


def carry_out(worker: Worker, order: Order) -> Answer:
    """The answer to one order; whatever the client raises becomes Failed."""
    try:
        match order:
            case Load(size):
                worker.load(size)
            case Prepare(case):
                return Done(worker.prepare(case))
            case Run(start_ns, until_ns):
                time.sleep(max(0.0, (start_ns - time.monotonic_ns()) / 1e9))
                return Ran(worker.run(until_ns))
        return Done()
    except Exception as error:  # each library has its own; the benchmark names it beside the system
        text = str(error).partition("\n")[0]
        return Failed(f"{type(error).__name__}: {text[:200]}")


def main() -> None:
    """Connect to one system and serve."""
    from memfaas.bench.peers import SYSTEMS

    system, endpoint, door, pool, index = sys.argv[1:]
    serve(SYSTEMS[system]().connect(endpoint), Path(door), Path(pool), int(index))


if __name__ == "__main__":
    main()
