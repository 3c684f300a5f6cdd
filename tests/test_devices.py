"""Which RDMA device is used, of whatever a node has, and what is said when none can be."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest

from memfaas import _accept as accept
from memfaas.errors import FabricUnavailable, UsageError
from memfaas.fabric import devices
from memfaas.fabric.devices import Device, Gid, Port

LINK_LOCAL = "fe80:0000:0000:0000:0202:c9ff:fe00:0001"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0001"
UNSET = "0000:0000:0000:0000:0000:0000:0000:0000"


def make_port(root: Path, device: str, number: int, state: str, layer: str, *gids: tuple[str, str]) -> None:
    port = root / device / "ports" / str(number)
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs/types").mkdir(parents=True)
    (port / "state").write_text(state + "\n")
    (port / "link_layer").write_text(layer + "\n")
    for index, (address, kind) in enumerate(gids):
        (port / "gids" / str(index)).write_text(address + "\n")
        if kind:
            (port / "gid_attrs/types" / str(index)).write_text(kind + "\n")


@pytest.fixture
def node(tmp_path: Path) -> list[Device]:
    """One port that is down, one with RoCE, one with InfiniBand."""
    roce = [(LINK_LOCAL, "IB/RoCE v1"), (LINK_LOCAL, "RoCE v2"), (IPV4, "IB/RoCE v1"), (IPV4, "RoCE v2"), (UNSET, "")]
    make_port(tmp_path, "mlx5_0", 1, "1: DOWN", "Ethernet", (LINK_LOCAL, "RoCE v2"))
    make_port(tmp_path, "mlx5_0", 2, "4: ACTIVE", "Ethernet", *roce)
    make_port(tmp_path, "mlx5_1", 1, "4: ACTIVE", "InfiniBand", (LINK_LOCAL, "IB/RoCE v1"))
    make_port(tmp_path, "old", 1, "4: ACTIVE", "Ethernet", (LINK_LOCAL, "IB/RoCE v1"))
    return devices.read_kernel(tmp_path)


def test_the_kernel_is_read_right(node: list[Device]) -> None:
    assert [device.name for device in node] == ["mlx5_0", "mlx5_1", "old"]
    down, up = node[0].ports
    assert (down.number, down.state, up.number, up.state, up.link_layer) == (1, "down", 2, "active", "Ethernet")
    assert [(gid.index, gid.kind, gid.is_ipv4) for gid in up.gids] == [
        (0, "RoCE v1", False),
        (1, "RoCE v2", False),
        (2, "RoCE v1", True),
        (3, "RoCE v2", True),
    ]
    assert node[1].ports[0].gids == (Gid(0, "fe80::202:c9ff:fe00:1", "InfiniBand"),)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("", "mlx5_0:2:3"),
        ("mlx5_0", "mlx5_0:2:3"),
        ("mlx5_0:2:1", "mlx5_0:2:1"),
        ("mlx5_0:2:0", "mlx5_0:2:0"),  # whoever pins RoCE v1 gets it
        ("mlx5_1", "mlx5_1:1:0"),
    ],
)
def test_the_first_port_that_works_is_chosen_within_what_is_pinned(
    node: list[Device], wanted: str, chosen: str
) -> None:
    assert devices.choose(node, wanted) == chosen


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("mlx5_7", "this node has no RDMA device mlx5_7; it has mlx5_0, mlx5_1, old"),
        ("mlx5_1:2", "RDMA device mlx5_1 has no port 2"),
        ("mlx5_0:1", "port 1 of RDMA device mlx5_0 is down"),
        ("mlx5_0:2:4", "port 2 of RDMA device mlx5_0 has no GID 4"),
        ("old", "port 1 of RDMA device old has no address of RoCE v2 or InfiniBand"),
    ],
)
def test_what_is_pinned_and_cannot_be_used_has_a_reason(node: list[Device], wanted: str, reason: str) -> None:
    with pytest.raises(FabricUnavailable) as caught:
        devices.choose(node, wanted)
    assert str(caught.value) == f"verbs: {reason}"


def test_a_node_without_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.read_kernel(tmp_path / "absent") == []
    with pytest.raises(FabricUnavailable, match=r"this node has no RDMA device$"):
        devices.choose([])
    monkeypatch.setattr(devices, "read_kernel", lambda: [])
    assert devices.local_device() == ""


def test_an_address_that_is_set_while_it_is_read_is_no_error(tmp_path: Path) -> None:
    make_port(tmp_path, "rxe0", 1, "", "Ethernet", ("", ""))
    assert devices.read_kernel(tmp_path) == [Device("rxe0", (Port(1, "gone", "Ethernet", ()),))]


# --- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mlx5_0", "mlx5_0:1", "mlx5_0:12:255", "ibp3s0.2"])
def test_a_device_is_pinned(text: str) -> None:
    assert accept.device(f" {text} ") == text == accept.device(text)


@pytest.mark.parametrize("text", ["", "auto"])
def test_no_device_is_pinned(text: str) -> None:
    assert accept.device(text) == ""


@pytest.mark.parametrize("text", [":1", "mlx5_0:", "mlx5_0:0", "mlx5_0:1:x", "mlx5_0:1:2:3", "a/b", "mlx5 0", 5])
def test_what_is_no_device_is_refused(text: object) -> None:
    with pytest.raises(UsageError):
        accept.device(text)


# --- pyverbs ------------------------------------------------------------------------------------------


def importing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(devices, "libibverbs_version", lambda: "44.0")
    monkeypatch.setattr(devices, "pyverbs_version", lambda: "59.0")


def test_pyverbs_of_another_release_than_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, ImportError("libibverbs.so.1: version `IBVERBS_PRIVATE_59' not found"))
    with pytest.raises(devices.PyverbsMissing) as caught:
        devices.load_pyverbs()
    assert "pyverbs 59.0 does not match the system's rdma-core 44.0" in str(caught.value)
    assert "IBVERBS_PRIVATE_59" in str(caught.value)
    assert caught.value.remedy == "pip uninstall pyverbs; sudo apt-get install python3-pyverbs"


@pytest.mark.parametrize("beside", [False, True])
def test_no_pyverbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside: bool) -> None:
    importing(monkeypatch, ModuleNotFoundError("No module named 'pyverbs'", name="pyverbs"))
    monkeypatch.setattr(devices, "_DISTRIBUTION", tmp_path)
    if beside:
        (tmp_path / "pyverbs").mkdir()
    with pytest.raises(devices.PyverbsMissing, match=r"not installed.*rdma-core 44\.0") as caught:
        devices.load_pyverbs()
    assert caught.value.remedy.startswith(f"ln -s {tmp_path}/pyverbs " if beside else "sudo apt-get install")


def test_an_error_of_pyverbs_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    error = type("PyverbsRDMAError", (Exception,), {"__module__": "pyverbs.pyverbs_error"})

    def fail() -> Any:
        raise error("Failed to get devices list")

    monkeypatch.setattr(devices, "load_pyverbs", lambda: types.SimpleNamespace(get_device_list=fail))
    with pytest.raises(FabricUnavailable, match="Failed to get devices list"):
        devices.discover()


@pytest.mark.parametrize(
    ("name", "release"),
    [("libibverbs.so.1.14.44.0", "44.0"), ("libibverbs.so.1.15.59.0", "59.0"), ("libibverbs.so.1", "unknown")],
)
def test_the_release_is_in_the_name_of_the_library(name: str, release: str) -> None:
    assert devices.release_of(name) == release


def test_a_system_without_libibverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", fail)
    with pytest.raises(FabricUnavailable, match="cannot be loaded"):
        devices.libibverbs_version()
