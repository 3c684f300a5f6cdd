"""A donor, or one function of it, stands still while it is to take a lease: others that have room take it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.units import MIB
from tests.e2e import moves

pytestmark = pytest.mark.slow


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_hung_donor_with_the_most_room_costs_nothing_where_another_has_room() -> None:
    with (
        LocalCluster(donors=1, memory=128 * MIB) as cluster,
        memfaas.connect(cluster.address) as session,
        moves.operator(cluster.address) as operator,
    ):
        store = session.store("s", size=32 * MIB)
        kept = moves.Ledger(store, 50, 100_000)
        moves.add_donor(cluster, "hung", 512 * MIB)
        moves.add_donor(cluster, "other", 256 * MIB)
        with stopped([cluster._processes["hung"].pid]):
            reclaimed = operator.reclaim("donor0", moves.EVERYTHING, 2.4, "job")
        assert moves.lost(reclaimed) == []
        # What was asked of the hung donor reaches it now, and so does that nobody wants it any more.
        moves.check_quiet(cluster, session)
        assert [one.donor for one in moves.functions_of(cluster)] == ["other"]
        assert kept.missing(store) == []


def test_a_target_that_stands_still_midway_costs_nothing_where_another_has_room() -> None:
    with (
        LocalCluster(donors=1, memory=192 * MIB) as cluster,
        memfaas.connect(cluster.address) as session,
    ):
        store = session.store("s", size=128 * MIB)
        kept = moves.Ledger(store, 100, MIB)
        moves.add_donor(cluster, "slow", 512 * MIB)
        moves.add_donor(cluster, "other", 256 * MIB)
        with moves.Asked(cluster.address, "donor0", moves.EVERYTHING, 12.0) as asked:
            target = moves.copying(cluster, asked, "donor0", MIB)
            assert target.donor == "slow"
            with stopped([target.pid]):
                reclaimed = asked.result()
        assert moves.lost(reclaimed) == []
        assert kept.missing(store) == []
        moves.check_quiet(cluster, session)
        assert [one.donor for one in moves.functions_of(cluster)] == ["other"]
