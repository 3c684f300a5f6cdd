"""A local cluster starts whole, and leaves nothing behind, however its owner ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import memfaas
from memfaas.client.local import LocalCluster, _processes_with
from memfaas.errors import TransportError, UsageError


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(cluster: LocalCluster) -> list[int]:
    return _processes_with(f"MEMFAAS_LOCAL_CLUSTER={cluster._token}")


OWNER = """
import memfaas, os, sys, time
cluster = memfaas.LocalCluster(donors=1, memory="32MiB")
session = memfaas.connect(cluster.address)
session.store("s", size="8MiB").put("a", b"1")
print(cluster._token, cluster.folder, flush=True)
"""


@pytest.fixture
def start_owner() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], str, Path]]]:
    with ExitStack() as owners:

        def start(then: str) -> tuple[subprocess.Popen[str], str, Path]:
            owner = owners.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", OWNER + then], stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            )
            owners.callback(owner.kill)
            assert owner.stdout is not None
            token, folder = owner.stdout.readline().split()
            return owner, token, Path(folder)

        yield start


def ended(owner: subprocess.Popen[str], token: str, folder: Path) -> bool:
    return not _processes_with(f"MEMFAAS_LOCAL_CLUSTER={token}") and not folder.exists()


@pytest.mark.slow
def test_what_is_started_is_stopped() -> None:
    with LocalCluster(donors=2, memory="32MiB") as cluster:
        assert cluster.address.startswith("memfaas://127.0.0.1:")
        with memfaas.connect(cluster.address) as session:
            assert [donor.donor for donor in session.status().donors] == ["donor0", "donor1"]
        assert {cluster.broker_pid, cluster.donor_pid(0), cluster.donor_pid(1)} <= set(processes(cluster))
        assert "2 donors" in repr(cluster)
    assert processes(cluster) == []
    assert not cluster.folder.exists()
    cluster.stop()


@pytest.mark.slow
def test_a_donor_of_the_disk_takes_what_memory_has_no_room_for_and_leaves_no_file() -> None:
    with (
        LocalCluster(donors=1, memory="12MiB", spill="128MiB") as cluster,
        memfaas.connect(cluster.address) as session,
    ):
        donors = {donor.donor: donor for donor in session.status().donors}
        assert [donors[name].spill for name in ("donor0", "spill")] == [False, True]
        near, far = session.store("near", size="8MiB"), session.store("far", size="64MiB")
        assert {shard.donor for shard in near.info().shards} == {"donor0"}
        assert {shard.donor for shard in far.info().shards} == {"spill"}
        far.put("k", os.urandom(30 << 20))
        cluster.kill_donor("spill")
        assert len(far.get("k")) == 30 << 20
        cluster.restart_donor("spill")
        assert len(far.get("k")) == 30 << 20
        assert list(Path("/var/tmp").glob(".memfaas-*")) == []
        assert cluster.donor_pid("spill") in processes(cluster)
    assert not cluster.folder.exists()


@pytest.mark.slow
def test_what_was_killed_is_cleaned_up_too() -> None:
    def body() -> None:
        with LocalCluster(donors=1, memory="32MiB") as cluster:
            clusters.append(cluster)
            with memfaas.connect(cluster.address) as session:
                session.store("s", size="8MiB", persistent=True).put("a", b"1")
            cluster.kill_donor(0)
            cluster.kill_broker()
            assert processes(cluster)
            raise ZeroDivisionError

    clusters: list[LocalCluster] = []
    with pytest.raises(ZeroDivisionError):
        body()
    (cluster,) = clusters
    assert processes(cluster) == []
    assert not cluster.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "then",
    ["", "raise SystemExit(3)", "os.kill(os.getpid(), 9)", "cluster.kill_broker(); os.kill(os.getpid(), 9)"],
    ids=["exits", "fails", "is killed", "is killed after its broker"],
)
def test_nothing_outlives_the_owner(start_owner: Callable[..., Any], then: str) -> None:
    owner, token, folder = start_owner(then)
    owner.wait(30)
    if "kill_broker" in then:  # it is the broker that removes the files
        until(lambda: not _processes_with(f"MEMFAAS_LOCAL_CLUSTER={token}"))
        shutil.rmtree(folder)
    else:
        until(lambda: ended(owner, token, folder))


@pytest.mark.slow
def test_ctrl_c_stops_everything(start_owner: Callable[..., Any]) -> None:
    owner, token, folder = start_owner("time.sleep(60)\n")
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.wait(30) == -signal.SIGINT
    assert ended(owner, token, folder)


@pytest.mark.slow
def test_a_forked_child_neither_stops_the_cluster_nor_keeps_it(start_owner: Callable[..., Any]) -> None:
    child = (
        "pid = os.fork()\nif pid == 0:\n    cluster.stop()\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    )
    owner, token, folder = start_owner(child + "time.sleep(60)\n")
    grandchild = int(owner.stdout.readline())
    try:
        assert len(_processes_with(f"MEMFAAS_LOCAL_CLUSTER={token}")) > 2
        owner.kill()
        owner.wait()
        until(lambda: ended(owner, token, folder))
    finally:
        os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize("settings", [{"memory": "1KiB"}, {"memory": "much"}, {"donors": -1}, {"lease_ttl": "soon"}])
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LocalCluster(**settings)


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TransportError, match="broker did not start"):
        LocalCluster()


def test_the_settings_of_the_caller_do_not_leak_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "memfaas.toml"
    config.write_text('[broker]\nlisten_host = "192.0.2.1"\n')
    monkeypatch.setenv("MEMFAAS_CONFIG", str(config))
    monkeypatch.setenv("MEMFAAS_BROKER_LEASE_TTL", "nonsense")
    with LocalCluster(donors=0) as cluster, memfaas.connect(cluster.address, secret_file=None) as session:
        assert session.status().donors == []
