"""What is tested of a shard over shm and tcp is tested over verbs, too: the same tests, on another fabric."""

from __future__ import annotations

import os

import pytest

from memfaas._native import BROKEN, MAX_KEY, MIN_SHARD, NEED_CONNECTION, REVOKED
from memfaas.testing import fsck
from memfaas.testing.lease import BareLease, BareStore, Fabric
from tests.native import test_shard_model as suite
from tests.native.test_memory import all_uses, reason_of

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]


@pytest.fixture(params=["verbs"])
def fabric(request: pytest.FixtureRequest) -> Fabric:
    chosen: Fabric = request.param
    return chosen


@pytest.fixture(params=[0, 65, MAX_KEY])
def key_length(request: pytest.FixtureRequest) -> int:
    length: int = request.param
    return length


shard_lease = suite.shard_lease
test_values_of_every_edge_length_come_back = suite.test_values_of_every_edge_length_come_back
test_a_key_that_is_too_long_is_refused = suite.test_a_key_that_is_too_long_is_refused
test_a_value_that_is_too_large_is_refused = suite.test_a_value_that_is_too_large_is_refused


@pytest.mark.parametrize("cut", [False, True], ids=["kept", "cut"])
def test_every_operation_on_revoked_memory_says_so(cut: bool) -> None:
    """As a function does it: no device can reach the memory any more when it is revoked."""
    with BareLease("shard", MIN_SHARD) as lease:
        store = lease.store(lease.verbs_link())
        store.put(b"small", b"v")
        store.put(b"large", bytes(200_000))
        links = [lease.verbs_link() for _ in all_uses(store)]
        lease.server.close_verbs("it is over")
        lease.memory.revoke()
        if cut:
            os.ftruncate(lease.data_fd, 0)
        left = BareStore(lease.memory.part_size)  # which connects to nothing anew
        for link, use in zip(links, all_uses(left), strict=True):
            left._set_link(0, link)
            assert reason_of(use) in (BROKEN, NEED_CONNECTION)  # the latter of what is tried again singly
        store._set_link(0, lease.tcp_link())
        for use in all_uses(store):
            assert reason_of(use) == REVOKED
        lease.hang_up()
        assert fsck.held(lease.control_fd, "shard", MIN_SHARD) == {}
