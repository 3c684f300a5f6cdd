"""A store of which nothing is left."""

from __future__ import annotations

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.errors import KeyAbsent, UnknownStore, ValueLost
from memfaas.units import MIB
from tests.e2e import moves

pytestmark = pytest.mark.slow


def test_all_that_was_in_it_is_lost_for_everybody_until_it_is_deleted() -> None:
    with LocalCluster(donors=1, memory=128 * MIB) as cluster, moves.operator(cluster.address) as operator:
        with memfaas.connect(cluster.address) as maker:
            maker.store("big", size=32 * MIB, persistent=True).put(b"key", b"value")
        assert moves.lost(operator.reclaim("donor0", moves.EVERYTHING, 0.1, "job")) != []
        operator.lend("donor0", "job")
        with memfaas.connect(cluster.address) as another:
            assert [(one.spec.name, one.lost_shards) for one in another.stores()] == [("big", [0])]
            store = another.store("big")
            with pytest.raises(ValueLost):
                store.get(b"key")
            with pytest.raises(ValueLost):
                store.put(b"key", b"value")
            another.delete_store("big")
            with pytest.raises(UnknownStore):
                another.store("big")
            with pytest.raises(KeyAbsent):
                another.store("big", size=32 * MIB).get(b"key")
