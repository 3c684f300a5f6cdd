"""What holds of shards and regions over shm and tcp holds of them over verbs, with clients of tcp beside."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from memfaas.errors import FabricUnavailable
from tests.native.test_region import TOP, RegionMachine, values, words
from tests.native.test_shard_model import ShardMachine

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]


class OverVerbs(ShardMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stores["shm"] = self.lease.store(self.lease.verbs_link())


class RegionOverVerbs(RegionMachine):
    def __init__(self) -> None:
        super().__init__()
        self.regions["shm"] = self.lease.region(self.lease.verbs_link())
        assert self.regions["shm"].fetch_add(0, 0) == 0  # its words are the device's from now on

    @rule(offset=words, guess=st.booleans(), expected=values, new=values)
    def compare_swap(self, offset: int, guess: bool, expected: int, new: int) -> None:
        super().compare_swap(link="shm", offset=offset, guess=guess, expected=expected, new=new)

    @rule(offset=words, amount=st.integers(-TOP, TOP))
    def fetch_add(self, offset: int, amount: int) -> None:
        super().fetch_add(link="shm", offset=offset, amount=amount)

    @rule(offset=words)
    def words_are_changed_by_one_side_only(self, offset: int) -> None:
        with pytest.raises(FabricUnavailable, match="by network devices"):
            self.regions["tcp"].fetch_add(offset, 1)


few = settings(
    deadline=None,
    derandomize=True,
    max_examples=12,
    stateful_step_count=30,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
TestShardOverVerbs = OverVerbs.TestCase
TestShardOverVerbs.settings = few
TestRegionOverVerbs = RegionOverVerbs.TestCase
TestRegionOverVerbs.settings = few
