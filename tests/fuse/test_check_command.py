"""`memfaas fs check` as a program."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from memfaas.cli import main
from memfaas.client.local import LocalCluster
from memfaas.client.store import Store
from memfaas.fs import FileSystem
from memfaas.fs.records import inode_key


def check(cluster: LocalCluster, store: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["fs", "check", store, "--broker", cluster.address, *options])


def test_a_file_system_is_in_order(cluster: LocalCluster, store: Store) -> None:
    with FileSystem(store) as files:
        files.mkdir("/d")
        files.write_bytes("/d/f", bytes(200_000))
    found = check(cluster, store.name)
    assert (found.exit_code, found.output) == (0, "everything is as it should be\n")
    found = check(cluster, store.name, "--json")
    assert found.exit_code == 0
    assert json.loads(found.output) == {"store": store.name, "wrong": [], "leaked": []}


def test_what_is_wrong_is_said(cluster: LocalCluster, store: Store) -> None:
    with FileSystem(store) as files:
        files.write_bytes("/f", bytes(100))
        ((entry, _),) = files.scan("/")
    ino = entry.ino
    store.delete(inode_key(ino))
    found = check(cluster, store.name)
    assert found.exit_code == 1
    assert f"b'f' in directory 1 leads to inode {ino}: not there" in found.output
    assert f"data of inode {ino}, which is not there" in found.output
    assert found.output.endswith("2 things are wrong\n")
    found = check(cluster, store.name, "--json")
    assert found.exit_code == 1
    assert len(json.loads(found.output)["wrong"]) == 2


def test_what_cannot_be_checked_is_said(cluster: LocalCluster, store: Store) -> None:
    found = check(cluster, "none")
    assert (found.exit_code, "no store" in found.output) == (5, True)
    store.put("key", b"value")
    found = check(cluster, store.name)
    assert (found.exit_code, "no file system in store" in found.output) == (2, True)
