"""Which fabric a client takes whose lease is on another node. There is one node here, so it is made to believe it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.units import MIB

pytestmark = [pytest.mark.vm(cpus=2, memory="2G"), pytest.mark.slow]

CLIENT = """
import json, logging, sys
import memfaas
logging.basicConfig(level=logging.WARNING)
try:
    with memfaas.connect(sys.argv[1], fabric=sys.argv[2]) as session:
        store = session.store("chosen")
        store.put("k", b"value")
        assert store.get("k") == b"value"
        with session.lease(4096) as region:
            region.write(0, b"value")
            used = region.fabric
        print(json.dumps({"region": used, "shards": [
            [one.fabric, one.device, one.fallback] for one in store.info().shards]}))
except memfaas.MemfaasError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


@pytest.fixture
def store(cluster: LocalCluster) -> Iterator[memfaas.Store]:
    with memfaas.connect(cluster.address) as session:
        store = session.store("chosen", size=16 * MIB)
        yield store
        store.close()


def on_another_node(
    cluster: LocalCluster, folder: Path, choice: str = "auto", device: str = ""
) -> tuple[dict[str, Any], str]:
    """What a client says there, and what it logs."""
    (folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
    (folder / "client.py").write_text(CLIENT)
    said = subprocess.run(
        [
            "unshare", "--mount", "sh", "-c",
            'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"', "sh",
            folder / "boot_id", sys.executable, "-P", folder / "client.py", cluster.address, choice,
        ],
        env={**os.environ, "MEMFAAS_TIMEOUT": "30", **({"MEMFAAS_DEVICE": device} if device else {})},
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer, said.stderr


@contextmanager
def link_down() -> Iterator[None]:
    subprocess.run(["ip", "link", "set", "rdma0", "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", "rdma0", "up"], check=True)


def test_verbs_is_taken_when_both_nodes_have_it(cluster: LocalCluster, store: memfaas.Store, tmp_path: Path) -> None:
    answer, logged = on_another_node(cluster, tmp_path)
    assert answer["region"] == "verbs"
    assert {tuple(one) for one in answer["shards"]} == {("verbs", "rxe0:1:1", None)}
    assert logged == ""


def test_tcp_is_taken_loudly_when_the_clients_device_is_not_there(
    cluster: LocalCluster, store: memfaas.Store, tmp_path: Path
) -> None:
    answer, logged = on_another_node(cluster, tmp_path, device="rxe7")
    why = "this node has no RDMA device rxe7; it has rxe0"
    assert answer["region"] == "tcp"
    for fabric, device, fallback in answer["shards"]:
        assert (fabric, device) == ("tcp", None)
        assert why in fallback
    assert "could be reached over verbs, but" in logged
    assert why in logged


def test_tcp_is_taken_loudly_when_the_clients_link_is_down(
    cluster: LocalCluster, store: memfaas.Store, tmp_path: Path
) -> None:
    with link_down():
        answer, logged = on_another_node(cluster, tmp_path)
    assert answer["region"] == "tcp"
    for fabric, device, fallback in answer["shards"]:
        assert (fabric, device) == ("tcp", None)
        assert "port 1 of RDMA device rxe0 is" in fallback
    assert "could be reached over verbs, but" in logged


def test_who_demands_verbs_gets_it_or_an_error(cluster: LocalCluster, store: memfaas.Store, tmp_path: Path) -> None:
    answer, _ = on_another_node(cluster, tmp_path, "verbs")
    assert {one[0] for one in answer["shards"]} == {"verbs"}
    answer, _ = on_another_node(cluster, tmp_path, "verbs", device="rxe7")
    assert answer["error"] == "FabricUnavailable"
    assert "this node has no RDMA device rxe7; it has rxe0" in answer["text"]
    with link_down():
        answer, _ = on_another_node(cluster, tmp_path, "verbs")
    assert answer["error"] == "FabricUnavailable"
    assert "port 1 of RDMA device rxe0 is" in answer["text"]
