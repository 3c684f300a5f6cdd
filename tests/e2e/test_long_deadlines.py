"""A reclaim that may take as long as it likes."""

from __future__ import annotations

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.units import MIB
from tests.e2e import moves

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("deadline_s", [1e10, 1e300])
def test_a_deadline_beyond_all_clocks_is_as_good_as_a_long_one(calm_cluster: LocalCluster, deadline_s: float) -> None:
    with memfaas.connect(calm_cluster.address) as session, moves.operator(calm_cluster.address) as operator:
        kept = moves.Ledger(session.store("s", size=32 * MIB), 20, 10_000)
        try:
            with moves.Asked(calm_cluster.address, "donor0", moves.EVERYTHING, deadline_s) as asked:
                reclaimed = asked.result()
            assert reclaimed.in_time
            assert moves.freed(reclaimed, "migrated") > 0
        finally:
            operator.lend("donor0", "job")
        assert kept.missing(session.store("s")) == []
        moves.check_quiet(calm_cluster, session)
