"""Local clusters of real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memfaas.client.local import LocalCluster
from memfaas.units import MIB


@pytest.fixture(scope="package")
def calm_cluster() -> Iterator[LocalCluster]:
    """For tests that kill nothing and leave it as they found it."""
    with LocalCluster(donors=2, memory=256 * MIB) as cluster:
        yield cluster


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """For one test, which may do with it what it likes."""
    with LocalCluster(donors=2, memory=128 * MIB) as cluster:
        yield cluster
