"""The doctor reads a node right, whatever the node is like."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import click.testing
import pytest

from memfaas import doctor
from memfaas.cli import main
from memfaas.doctor import Check, Node
from memfaas.fabric import devices, loopback
from memfaas.units import GIB, MIB

SHMEM = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
UNLIMITED = resource.RLIM_INFINITY


def node(root: Path, files: dict[str, str], limit: int = UNLIMITED, **what: Any) -> Node:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    what.setdefault("kernel", "6.1.0-18-amd64")
    what.setdefault("which", lambda name: None)
    what.setdefault("has_module", lambda name: False)
    return Node(root=root, limit=lambda _: (limit, limit), **what)


def check(name: str, where: Node) -> Check:
    (found,) = [one for one in doctor.examine(where) if one.name == name]
    return found


CGROUPS = (
    "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
MEMINFO = f"MemTotal:       {16 * GIB // 1024} kB\nSwapTotal:       {4 * GIB // 1024} kB\n"


@pytest.mark.parametrize(
    ("text", "state", "remedy"),
    [
        ("always within_size [advise] never deny force", "ok", None),
        ("[always] within_size advise never deny force", "ok", None),
        ("always within_size advise [never] deny force", "slow", f"echo advise | sudo tee /{SHMEM}"),
        ("always within_size advise never [deny] force", "slow", f"echo advise | sudo tee /{SHMEM}"),
    ],
)
def test_huge_pages(tmp_path: Path, text: str, state: str, remedy: str | None) -> None:
    found = check("huge pages", node(tmp_path, {SHMEM: text + "\n"}))
    assert (found.state, found.remedy) == (state, remedy)
    assert ("50 times" in found.meaning) == (state == "slow")


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    found = check("huge pages", node(tmp_path, {}))
    assert (found.state, found.remedy) == ("slow", None)


@pytest.mark.parametrize(
    ("limit", "capabilities", "state"),
    [
        (8 * MIB, "0000000000000000", "slow"),
        (8 * MIB, "0000000000004000", "ok"),
        (UNLIMITED, "0000000000000000", "ok"),
        (32 * GIB, "0000000000000000", "ok"),
    ],
)
def test_locked_memory(tmp_path: Path, limit: int, capabilities: str, state: str) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\n"}
    found = check("locked memory", node(tmp_path, files, limit))
    assert found.state == state
    if state == "slow":
        assert "8 MiB" in found.found
        assert "limits.d" in (found.remedy or "")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, "no limit"),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, "no limit"),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/a/b/memory.max": f"{4 * GIB}\n",
            },
            "2 GiB by the cgroup, of 16 GiB",
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n9:memory,hugetlb:/job\n0::/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
            },
            "3 GiB by the cgroup, of 16 GiB",
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
            },
            "no limit",
        ),
    ],
)
def test_a_memory_limit_of_any_kind_is_seen(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    assert (
        expected
        in check(
            "memory limit", node(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/mountinfo": CGROUPS, **files})
        ).found
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a\n"}, "MemAvailable"),
        ({"proc/self/cgroup": "0::/a\n", "proc/pressure/memory": "some avg10=0.00"}, "PSI, MemAvailable"),
        (
            {"proc/self/cgroup": "0::/a\n", "proc/pressure/memory": "some", "sys/fs/cgroup/a/memory.pressure": "some"},
            "PSI, PSI of its cgroup (version 2), MemAvailable",
        ),
        (
            {"proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/a/cgroup.event_control": ""},
            "thresholds of its cgroup (version 1), MemAvailable",
        ),
    ],
)
def test_what_tells_a_donor_of_memory_pressure(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    found = check("memory pressure", node(tmp_path, {"proc/self/mountinfo": CGROUPS, **files}))
    assert (found.state, found.found) == ("ok", expected)
    assert found.meaning.startswith("the kernel does not") == (expected == "MemAvailable")


@pytest.mark.parametrize(
    ("kind", "exists", "state"),
    [("ext4", True, "ok"), ("ext4", False, "missing"), ("tmpfs", True, "missing"), ("nfs4", True, "missing")],
)
def test_the_folder_of_a_spill_donor(tmp_path: Path, kind: str, exists: bool, state: str) -> None:
    mounts = f"1 0 8:1 / / rw - xfs a rw\n2 1 8:2 / /scratch rw - {kind} b rw\n3 1 8:3 / /scr rw - proc proc rw\n"
    if exists:
        (tmp_path / "scratch/memfaas").mkdir(parents=True)
    where = node(tmp_path, {"proc/self/mountinfo": mounts}, backing=Path("/scratch/memfaas"))
    found = check("spill folder", where)
    assert found.state == state
    assert (kind if exists else "is no folder") in found.found
    assert (found.remedy is not None) == (not exists)


def test_a_node_without_a_spill_donor_has_no_folder_to_look_at(tmp_path: Path) -> None:
    assert "spill folder" not in [one.name for one in doctor.examine(node(tmp_path, {}))]


@pytest.mark.parametrize(("release", "state"), [("6.1.0", "ok"), ("5.14.0-x", "ok"), ("5.10.0-28-amd64", "missing")])
def test_the_kernel(tmp_path: Path, release: str, state: str) -> None:
    found = check("kernel", node(tmp_path, {}, kernel=release))
    assert (found.state, found.required) == (state, True)


@pytest.mark.parametrize(("limit", "state"), [(1024, "slow"), (1 << 20, "ok"), (UNLIMITED, "ok")])
def test_open_files(tmp_path: Path, limit: int, state: str) -> None:
    assert check("open files", node(tmp_path, {}, limit)).state == state


@pytest.mark.parametrize(("text", "state"), [("128", "slow"), ("4096", "ok")])
def test_the_backlog(tmp_path: Path, text: str, state: str) -> None:
    assert check("backlog", node(tmp_path, {"proc/sys/net/core/somaxconn": text})).state == state


def test_the_file_system_names_all_that_is_lacking(tmp_path: Path) -> None:
    lacking = check("file system", node(tmp_path, {}))
    assert (lacking.state, lacking.required) == ("missing", False)
    assert (lacking.found, lacking.remedy) == ("without /dev/fuse, fusermount3, pyfuse3", "sudo modprobe fuse")
    without = check("file system", node(tmp_path, {"dev/fuse": ""}, has_module=lambda name: name == "pyfuse3"))
    assert (without.found, without.remedy) == ("without fusermount3", "sudo apt-get install fuse3")


@pytest.mark.parametrize(("conf", "allowed"), [(None, False), ("#user_allow_other", False), ("user_allow_other", True)])
def test_the_file_system_says_who_may_let_others_in(tmp_path: Path, conf: str | None, allowed: bool) -> None:
    files = {"dev/fuse": ""} | ({} if conf is None else {"etc/fuse.conf": f"mount_max = 1000\n{conf}\n"})
    found = check("file system", node(tmp_path, files, which=lambda name: name, has_module=lambda name: True))
    assert found.state == "ok"
    assert ("user_allow_other" in found.found) == allowed
    assert ("takes root" in found.meaning) == (not allowed)


def test_a_node_without_rdma_is_no_failure_and_takes_one_line(tmp_path: Path) -> None:
    found = [one for one in doctor.examine(node(tmp_path, {})) if "RDMA" in one.name or "verbs" in one.name]
    assert [(one.name, one.state, one.found, one.remedy) for one in found] == [("RDMA", "ok", "no RDMA device", None)]


def port(state: str, address: str = "fe80::1") -> dict[str, str]:
    base = "sys/class/infiniband/mlx5_0/ports/1"
    return {
        f"{base}/state": state,
        f"{base}/link_layer": "Ethernet",
        f"{base}/gids/0": address,
        f"{base}/gid_attrs/types/0": "RoCE v2",
    }


@pytest.fixture
def devices_in_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried in a loopback; there is no hardware."""
    tried: list[str] = []

    def measure(device: str) -> loopback.Took:
        tried.append(device)
        return loopback.Took(write_us=2.0, read_us=3.0)

    monkeypatch.setattr(loopback, "measure", measure)
    ability = devices.Ability(firmware="20.1", largest_region=GIB, regions=7, queue_pairs=9, reads=16, atomics=True)
    there = [devices.Found(devices.Device("mlx5_0", ()), ability)]
    monkeypatch.setattr(devices, "discover", lambda: there)
    monkeypatch.setattr(devices, "libibverbs_version", lambda: "44.0")
    return tried


def test_an_rdma_device_is_shown_and_tried(tmp_path: Path, devices_in_hand: list[str]) -> None:
    where = node(tmp_path, port("4: ACTIVE"))
    assert check("RDMA mlx5_0:1", where).found == "Ethernet, active; GIDs 0: fe80::1 (RoCE v2)"
    assert "9 queue pairs, 7 memory regions of at most 1 GiB, 16 reads" in check("RDMA mlx5_0", where).found
    assert "rdma-core 44.0" in check("RDMA library", where).found
    assert "written in 2 us and read in 3 us" in check("RDMA loopback", where).found
    assert set(devices_in_hand) == {"mlx5_0:1:0"}


def test_a_port_that_is_down_is_not_tried(tmp_path: Path, devices_in_hand: list[str]) -> None:
    where = node(tmp_path, port("1: DOWN"))
    assert (check("RDMA mlx5_0:1", where).state, check("RDMA loopback", where).state) == ("missing", "missing")
    assert "is down" in check("RDMA loopback", where).found
    assert devices_in_hand == []


def test_a_pinned_device_is_tried(tmp_path: Path, devices_in_hand: list[str]) -> None:
    where = node(tmp_path, port("4: ACTIVE"), device="mlx5_3")
    assert "this node has no RDMA device mlx5_3" in check("RDMA loopback", where).found


def test_pyverbs_that_does_not_match_is_said_with_its_remedy(
    tmp_path: Path, devices_in_hand: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise devices.PyverbsMissing("pyverbs 59.0 does not match", "install another")

    monkeypatch.setattr(devices, "discover", fail)
    found = check("pyverbs", node(tmp_path, port("4: ACTIVE")))
    assert (found.state, found.found, found.remedy) == ("missing", "pyverbs 59.0 does not match", "install another")
    assert not found.required


# --- the command --------------------------------------------------------------------------------------


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["doctor", *arguments])


def test_this_node_has_what_is_required() -> None:
    result = run("--json")
    assert result.exit_code == 0
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert found["native module"]["state"] == "ok"
    assert found["kernel"]["state"] == "ok"
    assert "numpy" in found["versions"]["found"]
    assert {"name", "state", "found", "meaning", "remedy", "required"} == set(found["RDMA"])


def test_the_table_gives_remedies_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "sudo " + "very-long-command " * 20
    monkeypatch.setattr(doctor, "examine", lambda node: [Check("thing", "slow", "what is", "what follows", remedy)])
    result = run()
    assert result.exit_code == 0
    assert remedy.strip() in result.stdout
    assert "slow" in result.stdout


def test_what_is_required_and_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    optional = Check("option", "missing", "", "", None)
    monkeypatch.setattr(doctor, "examine", lambda node: [optional])
    assert run().exit_code == 0
    monkeypatch.setattr(
        doctor, "examine", lambda node: [optional, Check("heart", "missing", "", "", None, required=True)]
    )
    assert run().exit_code == 1
