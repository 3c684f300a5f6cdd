"""What sessions do over shm and tcp they do over verbs: the same tests, on another fabric.

Who is killed or away meanwhile is in test_verbs_cluster.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.fabric import Choice
from tests.client import test_session as suite
from tests.e2e import test_bad_days as bad_days

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]


@pytest.fixture(params=["verbs"])
def choice(request: pytest.FixtureRequest) -> Choice:
    chosen: Choice = request.param
    return chosen


@pytest.fixture
def session(cluster: LocalCluster) -> Iterator[memfaas.Session]:
    with memfaas.connect(cluster.address) as session:
        yield session


@pytest.fixture
def calm_cluster(cluster: LocalCluster) -> LocalCluster:
    return cluster


test_a_store_over_each_fabric = suite.test_a_store_over_each_fabric
test_what_is_free_takes_values_of_other_sizes = suite.test_what_is_free_takes_values_of_other_sizes
test_the_last_of_several_values_for_one_key_stays = suite.test_the_last_of_several_values_for_one_key_stays
test_a_forged_ticket_opens_nothing = suite.test_a_forged_ticket_opens_nothing
test_a_forked_child_has_links_and_a_session_of_its_own = suite.test_a_forked_child_has_links_and_a_session_of_its_own
test_a_region_is_raw_memory = suite.test_a_region_is_raw_memory

test_a_full_store_keeps_what_it_has_and_takes_more_after_deletes = (
    bad_days.test_a_full_store_keeps_what_it_has_and_takes_more_after_deletes
)
test_a_value_that_the_store_cannot_hold_leaves_nothing = bad_days.test_a_value_that_the_store_cannot_hold_leaves_nothing
