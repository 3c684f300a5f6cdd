"""Queue pairs end under operations, as when a lease begins to move, and clients come again with fresh ones."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress

import pytest

from memfaas._native import LinkDown, VerbsLink
from memfaas.errors import FabricUnavailable
from memfaas.testing.lease import BareLease
from memfaas.units import MIB
from tests.e2e.scene import until

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]

TIMEOUT_S = 5.0
TOO_LATE_S = 3 * TIMEOUT_S
"""An operation that has not ended by then has no deadline, however slow the machine is."""
NOISE = random.Random(7).randbytes(2 * MIB)


def when_open(lease: BareLease) -> VerbsLink:
    links: list[VerbsLink] = []

    def try_it() -> bool:
        with suppress(FabricUnavailable):  # "a test"
            links.append(lease.verbs_link())
        return bool(links)

    until(try_it)
    return links[0]


def all_grow(counts: list[int], wrong: list[BaseException], before: list[int] | None = None) -> None:
    """Waits until each is more than it was, or something is wrong."""
    was = before or [*counts]
    until(lambda: wrong or all(now > then for now, then in zip(counts, was, strict=True)))


def test_queue_pairs_that_are_destroyed_amid_operations_are_replaced() -> None:
    with BareLease("shard", 24 * MIB, timeout_s=TIMEOUT_S) as lease:
        stores = [lease.store(lease.verbs_link()) for _ in range(2)]
        stores[0].put(b"k", NOISE)
        stop = threading.Event()
        wrong: list[BaseException] = []
        rounds, broken = [0, 0], [0, 0]

        def use(number: int) -> None:
            store = stores[number]
            while not stop.is_set():
                started = time.monotonic()
                try:
                    if number:
                        store.put(b"k", NOISE)
                    assert store.get(b"k") == NOISE
                    rounds[number] += 1
                except LinkDown:
                    broken[number] += 1
                    store._set_link(0, when_open(lease))
                except BaseException as error:
                    wrong.append(error)
                    return
                if time.monotonic() - started > TOO_LATE_S:
                    wrong.append(AssertionError("an operation did not end in time"))
                    return

        threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            all_grow(rounds, wrong)
            before = [*broken]
            lease.server.close_verbs("a test")
            assert not lease.memory.registered()
            lease.server.open_verbs()
            all_grow(broken, wrong, before)
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
