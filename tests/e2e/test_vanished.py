"""A donor is gone for good: what lay on it in part, and how its leases' users go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.errors import LeaseLost, MemfaasError, ValueLost
from memfaas.fabric import Choice
from memfaas.units import MIB
from tests.e2e.scene import functions_of, kill, until

pytestmark = pytest.mark.slow


def vanish(cluster: LocalCluster, session: memfaas.Session, index: int) -> None:
    """The agent and its functions; then an agent without memory comes, so that all know that it is lost."""
    serving = functions_of(cluster)
    donor = cluster.donor_name(index)
    lost = [serving[one.lease.hex()[:8]] for one in session.status().leases if one.donor == donor]
    assert lost
    cluster.kill_donor(index)  # first: it would start the functions again
    for pid in lost:
        kill(pid)
    cluster.restart_donor(index)


def outcome_of(operation: Callable[[], object]) -> MemfaasError | None:
    try:
        operation()
    except MemfaasError as error:
        return error
    return None


@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_all_that_needs_it_is_lost_and_all_else_goes_on(cluster: LocalCluster, fabric: Choice) -> None:
    with memfaas.connect(cluster.address, fabric=fabric, timeout=3) as session:
        store = session.store("s", size="64MiB")
        donors = [keeper.place.donor for keeper in store.keepers]
        survivor = donors.index("donor1")
        regions = [session.lease("8MiB") for _ in range(4)]
        assert {*donors} == {region.donor for region in regions} == {"donor0", "donor1"}
        by_donor: dict[str, list[bytes]] = {donor: [] for donor in donors}
        for number in range(400):
            key = b"%d" % number
            by_donor[donors[store._shard_of(key, 0)]].append(key)
        gone, (*safe, large) = by_donor["donor0"], by_donor["donor1"]
        batch = {key: key * 100 for key in (*safe, *gone)}
        store.put_many(batch)
        store.put(large, os.urandom(20 * MIB))  # its manifest stays, but not all of its parts
        for region in regions:
            region.write(0, b"abc")

        vanish(cluster, session, 0)
        until(lambda: isinstance(outcome_of(lambda: store.get(gone[0])), LeaseLost))

        needs_it: list[Callable[[], object]] = [
            lambda: store.get(large),
            lambda: store.put(safe[0], bytes(20 * MIB)),
            lambda: store.put(gone[0], b""),
            lambda: store.delete(gone[0]),
            lambda: gone[0] in store,
            lambda: store.get_many(batch),
            lambda: store.put_many(batch),
            store.keys,
            lambda: len(store),
        ]
        assert {type(outcome_of(operation)) for operation in needs_it} == {ValueLost}
        assert store.get_many(safe) == [batch[key] for key in safe]
        assert all(store.get(key) == batch[key] for key in safe)
        for region in regions:
            if region.donor == "donor0":
                assert isinstance(outcome_of(partial(region.read, 0, 3)), LeaseLost)
                assert isinstance(outcome_of(partial(region.fetch_add, 8, 1)), LeaseLost)
            else:
                assert region.read(0, 3) == b"abc"
                assert region.fetch_add(8, 1) == 0
        # Neither the puts that failed nor the value that is lost in part keep memory of the other donor.
        assert store.delete(large)
        assert store._stats(survivor)["parts"] == 0
        for key in safe:
            store.put(key, b"new")
        assert store.get_many(safe) == [b"new"] * len(safe)

        # What is new is spread over both again, beside what is left.
        with session.lease("8MiB") as one, session.lease("8MiB") as two, session.lease("8MiB") as three:
            assert "donor0" in {one.donor, two.donor, three.donor}
        session.delete_store("s")
        again = session.store("s", size="64MiB")
        assert {keeper.place.donor for keeper in again.keepers} == {"donor0", "donor1"}
        assert again.keys() == []
        again.put(large, bytes(20 * MIB))
        assert again.get(large) == bytes(20 * MIB)
