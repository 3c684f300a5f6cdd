"""Over which fabrics the native core is tested; tests/vm has the same tests over verbs."""

from __future__ import annotations

import pytest

from memfaas.testing.lease import Fabric


@pytest.fixture(params=["shm", "tcp"])
def fabric(request: pytest.FixtureRequest) -> Fabric:
    chosen: Fabric = request.param
    return chosen
