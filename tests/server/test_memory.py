"""The memory of leases: its seals, huge pages, and what a node can spare."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfaas import _native
from memfaas import node as the_node
from memfaas.errors import CapacityError, UsageError
from memfaas.messages import Memory
from memfaas.server import memory, spare
from memfaas.units import GIB, MIB


@pytest.fixture
def descriptors() -> Iterator[tuple[int, int]]:
    made = memory.make("shard", 8 * MIB, "test")
    yield made
    for descriptor in made:
        os.close(descriptor)


# --- seals --------------------------------------------------------------------------------------------


def test_memory_has_the_size_that_the_lease_needs_and_no_pages_yet(descriptors: tuple[int, int]) -> None:
    assert tuple(os.fstat(one).st_size for one in descriptors) == _native.geometry("shard", 8 * MIB)
    assert [memory.populated(one) for one in descriptors] == [0, 0]


def test_nobody_can_make_memory_larger_or_seal_it_further(descriptors: tuple[int, int]) -> None:
    for descriptor in descriptors:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1 << 30)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(PermissionError):
            os.posix_fallocate(descriptor, 1 << 30, 4096)


def test_data_can_be_cut_off_and_then_never_comes_back_but_control_stays(descriptors: tuple[int, int]) -> None:
    data, control = descriptors
    with pytest.raises(PermissionError):
        os.ftruncate(control, 0)
    with mmap.mmap(data, 4096) as mapped:
        mapped[0] = 1
        assert memory.populated(data) > 0
    os.ftruncate(data, 0)
    assert memory.populated(data) == 0
    with pytest.raises(PermissionError):
        os.ftruncate(data, 4096)


def test_memory_that_cannot_be_made_leaves_no_descriptor_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    spare = os.dup(2)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))  # room for one, and two are needed
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            memory.make("region", MIB, "test")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert len(os.listdir("/proc/self/fd")) == before


# --- files --------------------------------------------------------------------------------------------


def close(made: tuple[int, int]) -> None:
    for descriptor in made:
        os.close(descriptor)


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_has_all_its_blocks_and_no_name(tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not nameless:  # as on NFS
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_RDWR)  # EISDIR
    made = memory.make("shard", 8 * MIB, "test", tmp_path)
    try:
        assert list(tmp_path.iterdir()) == []
        assert tuple(os.fstat(one).st_size for one in made) == _native.geometry("shard", 8 * MIB)
        assert memory.populated(made[0]) >= 8 * MIB
        assert os.fstat(made[0]).st_nlink == 0
        assert os.get_inheritable(made[0]) is False
        with pytest.raises(PermissionError):
            os.ftruncate(made[1], 0)
        _native.format_memory(*made, kind="shard", size=8 * MIB, lease=bytes(16), store=bytes(16), shard=0, epoch=1)
        assert _native.Memory(*made).size == 8 * MIB
        os.ftruncate(made[0], 0)
        assert memory.populated(made[0]) == 0
    finally:
        close(made)


def test_a_folder_that_takes_no_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UsageError, match=f"cannot make a file in {wrong}"):
            memory.check_backing(wrong)
    memory.check_backing(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="/dev/shm is on tmpfs, which is memory itself"):
        memory.check_backing(Path("/dev/shm"))


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre"])
def test_a_folder_over_the_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(the_node, "file_system_of", lambda descriptor: kind)
    with pytest.raises(UsageError, match=f"is on {kind}, over the network"):
        memory.check_backing(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "memfaas-test", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_refuses_and_keeps_nothing(small_disk: Path) -> None:
    before = spare.available(backing=small_disk)
    assert before == 16 * MIB
    with pytest.raises(CapacityError, match=r"disk has no room for 34 MiB: No space left"):
        memory.make("shard", 32 * MIB, "test", small_disk)
    assert spare.available(backing=small_disk) == before
    assert list(small_disk.iterdir()) == []
    made = memory.make("shard", 8 * MIB, "test", small_disk)
    assert spare.available(backing=small_disk) == before - memory.populated(made[0])
    close(made)
    assert spare.available(backing=small_disk) == before


def test_a_file_that_is_too_large_for_its_owner_is_refused(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
    try:
        with pytest.raises(CapacityError, match="no room"):
            memory.make("region", 8 * MIB, "test", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what a node can spare ----------------------------------------------------------------------------


class Node:
    """A /proc, and control groups, of files."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.mount = root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        (self.proc / "self/mountinfo").write_text("22 1 0:20 / / rw - ext4 /dev/vda rw\n")
        (self.proc / "self/cgroup").write_text("")
        (self.proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable: {16 * GIB // 1024} kB\n")

    def join_v1(self, path: str, root: str = "/") -> None:
        (self.proc / "self/cgroup").write_text(f"9:name=systemd:/x\n4:memory,hugetlb:{path}\n0::/x\n")
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(f"30 22 0:30 {root} {self.mount} rw,relatime shared:1 - cgroup cgroup rw,memory,hugetlb\n")

    def join_v2(self, path: str, root: str = "/") -> None:
        (self.proc / "self/cgroup").write_text(f"0::{path}\n")
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(f"30 22 0:30 {root} {self.mount} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n")

    def limit_v1(self, folder: str, limit: int, used: int, cache: int = 0) -> None:
        self._write(folder, "memory.limit_in_bytes", limit)
        self._write(folder, "memory.usage_in_bytes", used)
        (self.mount / folder / "memory.stat").write_text(f"cache 5\ninactive_file 7\ntotal_inactive_file {cache}\n")

    def limit_v2(self, folder: str, limit: int | str, used: int, high: int | str = "max") -> None:
        self._write(folder, "memory.max", limit)
        self._write(folder, "memory.high", high)
        self._write(folder, "memory.current", used)
        (self.mount / folder / "memory.stat").write_text("anon 5\ninactive_file 0\n")

    def _write(self, folder: str, name: str, value: int | str) -> None:
        (self.mount / folder).mkdir(parents=True, exist_ok=True)
        (self.mount / folder / name).write_text(f"{value}\n")

    def available(self) -> int:
        return spare.available(self.proc)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_without_limits_it_is_what_the_kernel_says(node: Node) -> None:
    assert node.available() == 16 * GIB
    node.join_v1("/")
    node.limit_v1("", 9223372036854771712, 5 * GIB)
    assert node.available() == 16 * GIB


def test_free_pages_in_the_processors_lists_count(node: Node) -> None:
    (node.proc / "zoneinfo").write_text(
        "Node 0, zone Normal\n  pages free 9\n  pagesets\n    cpu: 0\n              count:    1000\n"
        "              high:     7\n    cpu: 1\n              count:    24\n"
    )
    assert node.available() == 16 * GIB + 1024 * os.sysconf("SC_PAGE_SIZE")


def test_the_tightest_control_group_on_the_path_counts(node: Node) -> None:
    node.join_v1("/jobs/ours")
    node.limit_v1("", 9223372036854771712, 0)
    node.limit_v1("jobs", 8 * GIB, 5 * GIB)
    node.limit_v1("jobs/ours", 6 * GIB, 1 * GIB)
    node.limit_v1("jobs/other", 1 * GIB, 1 * GIB)
    assert node.available() == 3 * GIB


def test_file_cache_of_a_control_group_would_be_given_up(node: Node) -> None:
    node.join_v1("/ours")
    node.limit_v1("ours", 6 * GIB, 5 * GIB, cache=2 * GIB)
    assert node.available() == 3 * GIB


def test_version_2_has_a_hard_and_a_soft_limit(node: Node) -> None:
    node.join_v2("/a/b")
    node.limit_v2("a", 8 * GIB, 1 * GIB, high=6 * GIB)
    node.limit_v2("a/b", "max", 1 * GIB)
    assert node.available() == 5 * GIB


@pytest.mark.parametrize("join", [Node.join_v1, Node.join_v2])
def test_a_container_may_see_only_its_own_group(node: Node, join: Callable[[Node, str, str], None]) -> None:
    join(node, "/docker/123/inner", "/docker/123")
    node.limit_v1("inner", 2 * GIB, 1 * GIB)
    node.limit_v2("inner", 2 * GIB, 1 * GIB)
    assert node.available() == 1 * GIB


def test_a_group_with_less_than_nothing_left_has_nothing(node: Node) -> None:
    node.join_v2("/a")
    node.limit_v2("a", 1 * GIB, 2 * GIB)
    assert node.available() == 0


def test_the_real_node_can_be_asked() -> None:
    assert 0 <= spare.available() < 1 << 60


# --- accounts -----------------------------------------------------------------------------------------


def accounts(**changes: int) -> Memory:
    given = {"offered": 8 * GIB, "leased": 0, "populated": 0, "available": 10 * GIB, "headroom": 2 * GIB}
    return Memory(**{**given, **changes})


def test_a_lease_may_take_all_that_is_offered_and_not_a_byte_more() -> None:
    memory.check_room(accounts(), 8 * GIB, "it")
    with pytest.raises(CapacityError, match=r"it needs 8 GiB, but of the 8 GiB that are lent 1 B are taken"):
        memory.check_room(accounts(leased=1, populated=1), 8 * GIB, "it")


def test_no_lease_cuts_into_the_headroom() -> None:
    memory.check_room(accounts(available=3 * GIB), GIB, "it")
    with pytest.raises(CapacityError, match="2 GiB are its headroom"):
        memory.check_room(accounts(available=3 * GIB), GIB + 1, "it")


def test_what_is_leased_but_not_yet_populated_counts_as_taken() -> None:
    memory.check_room(accounts(leased=2 * GIB, populated=2 * GIB, available=5 * GIB), 3 * GIB, "it")
    memory.check_room(accounts(leased=2 * GIB, populated=GIB, available=6 * GIB), 3 * GIB, "it")
    with pytest.raises(CapacityError):
        memory.check_room(accounts(leased=2 * GIB, populated=0, available=6 * GIB), 3 * GIB, "it")
