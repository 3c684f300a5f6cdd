"""What holds of shards and regions over shm and tcp holds of them over verbs, with clients of tcp beside."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.native.test_region import RegionMachine
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
