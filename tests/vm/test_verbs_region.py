"""What is tested of a region over shm and tcp is tested over verbs, too, and atomics of the device besides."""

from __future__ import annotations

import pytest

from memfaas.testing.lease import Fabric
from tests.native import test_region as suite

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]


@pytest.fixture(params=["verbs"])
def fabric(request: pytest.FixtureRequest) -> Fabric:
    chosen: Fabric = request.param
    return chosen


@pytest.fixture
def together() -> tuple[Fabric, ...]:
    """A word is changed by devices or by CPUs, not by both."""
    return ("verbs", "verbs", "verbs")


lease = suite.lease
test_the_last_byte_is_there = suite.test_the_last_byte_is_there
test_arguments_that_make_no_sense_are_refused = suite.test_arguments_that_make_no_sense_are_refused
test_words_change_atomically_on_all_fabrics_at_once = suite.test_words_change_atomically_on_all_fabrics_at_once
