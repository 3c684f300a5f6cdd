"""The node's RDMA device, as the kernel, pyverbs and the doctor see it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from memfaas.cli import main
from memfaas.errors import FabricUnavailable
from memfaas.fabric import devices, loopback

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]


def test_the_first_address_of_roce_v2_and_ipv4_is_chosen() -> None:
    chosen = devices.chosen_device()
    (device,) = devices.read_kernel()
    gid = next(gid for gid in device.ports[0].gids if f"rxe0:1:{gid.index}" == chosen)
    assert (gid.kind, gid.address) == ("RoCE v2", "::ffff:10.77.0.1".replace("10.77.0.1", "a4d:1"))


def test_pyverbs_sees_what_the_kernel_says() -> None:
    try:
        found = devices.discover()
    except devices.PyverbsMissing as error:
        pytest.skip(str(error))
    assert [one.device for one in found] == devices.read_kernel()
    assert found[0].ability.atomics
    assert found[0].ability.queue_pairs > 0


def test_a_page_goes_through_the_device_and_not_through_one_that_is_not_there() -> None:
    took = loopback.measure(devices.chosen_device())
    assert took.read_us > 0
    with pytest.raises(FabricUnavailable, match="has no address at index 200"):
        loopback.measure("rxe0:1:200")
    with pytest.raises(FabricUnavailable, match="no RDMA device rxe7"):
        loopback.measure("rxe7:1:0")


def test_the_doctor_tries_the_device() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert found["RDMA loopback"]["state"] == "ok"
    assert found["RDMA rxe0:1"]["state"] == "ok"
    pinned = CliRunner().invoke(main, ["doctor", "--json", "--device", "rxe7"])
    (loop,) = [one for one in json.loads(pinned.stdout) if one["name"] == "RDMA loopback"]
    assert loop["state"] == "missing"
    assert "this node has no RDMA device rxe7; it has rxe0" in loop["found"]
