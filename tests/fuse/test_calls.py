"""The calls of programs on a real mount: what each does, and its errors."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.conftest import Mount, Mounter


@pytest.fixture(scope="module")
def shared(fuse_device: None, cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    from memfaas.client.session import connect

    mounter = Mounter(cluster.address, tmp_path_factory.mktemp("calls"))
    with connect(cluster.address) as session:
        session.store("calls", size=128 << 20)
        yield mounter("calls")
        mounter.end()
        session.delete_store("calls")


@pytest.fixture
def here(shared: Mount, request: pytest.FixtureRequest) -> Path:
    folder = shared / f"t{abs(hash(request.node.nodeid))}"
    folder.mkdir()
    return folder


def fails(code: int, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        call(*arguments, **options)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def test_a_file_is_what_was_written(here: Path) -> None:
    data = os.urandom(3_000_001)
    (here / "f").write_bytes(data)
    assert (here / "f").read_bytes() == data
    assert (here / "f").stat().st_size == len(data)
    assert [entry.name for entry in os.scandir(here)] == ["f"]


@pytest.mark.parametrize(
    "call", [os.stat, os.unlink, os.rmdir, os.readlink, os.listdir, lambda p: os.rename(p, p + "x")]
)
def test_what_is_not_there_is_enoent(here: Path, call: Callable[[str], Any]) -> None:
    fails(errno.ENOENT, call, str(here / "none"))
    fails(errno.ENOENT, call, str(here / "none" / "below"))


@pytest.mark.parametrize("call", [os.mkdir, os.mkfifo, lambda p: os.symlink("x", p), lambda p: os.link(p + "2", p)])
def test_what_is_there_already_is_eexist(here: Path, call: Callable[[str], Any]) -> None:
    (here / "a").touch()
    (here / "a2").touch()
    fails(errno.EEXIST, call, str(here / "a"))
    (here / "d").mkdir()
    (here / "d2").touch()
    fails(errno.EEXIST, call, str(here / "d"))
    fails(errno.EEXIST, os.open, here / "a", os.O_CREAT | os.O_EXCL)


@pytest.mark.parametrize("call", [os.stat, os.mkdir, os.unlink, os.rmdir, lambda p: os.symlink("x", p)])
def test_a_file_is_no_directory(here: Path, call: Callable[[str], Any]) -> None:
    (here / "f").touch()
    fails(errno.ENOTDIR, call, str(here / "f" / "x"))


@pytest.mark.parametrize("call", [os.stat, os.mkdir, os.unlink, os.mkfifo, lambda p: os.symlink("x", p)])
def test_names_have_255_bytes(here: Path, call: Callable[[str], Any]) -> None:
    fails(errno.ENAMETOOLONG, call, str(here / ("x" * 256)))
    (here / ("x" * 255)).touch()
    assert os.listdir(here) == ["x" * 255]


def test_names_are_any_bytes(here: Path) -> None:
    name = bytes(range(1, 47)) + bytes(range(48, 256))
    os.close(os.open(os.path.join(os.fsencode(here), name), os.O_CREAT))
    assert os.listdir(os.fsencode(here)) == [name]


def test_directories_and_files_are_taken_away_differently(here: Path) -> None:
    (here / "d" / "e").mkdir(parents=True)
    (here / "f").touch()
    fails(errno.EISDIR, os.unlink, here / "d")
    fails(errno.ENOTDIR, os.rmdir, here / "f")
    fails(errno.ENOTEMPTY, os.rmdir, here / "d")
    (here / "d" / "e").rmdir()
    (here / "d").rmdir()
    (here / "f").unlink()
    assert os.listdir(here) == []
    fails(errno.EISDIR, os.open, here, os.O_WRONLY)


def test_rename_replaces_what_it_may(here: Path) -> None:
    a, b, d, e = (here / name for name in "abde")
    a.write_text("a")
    b.write_text("b")
    d.mkdir()
    e.mkdir()
    a.rename(b)
    assert b.read_text() == "a"
    assert not a.exists()
    fails(errno.EISDIR, os.rename, b, d)
    fails(errno.ENOTDIR, os.rename, d, b)
    (e / "x").touch()
    fails(errno.ENOTEMPTY, os.rename, d, e)
    (e / "x").unlink()
    d.rename(e)
    assert sorted(os.listdir(here)) == ["b", "e"]
    fails(errno.EINVAL, os.rename, e, e / "below")
    b.rename(b)
    assert b.read_text() == "a"
    os.link(b, a)
    a.rename(b)  # both are the same file: nothing happens
    assert sorted(os.listdir(here)) == ["a", "b", "e"]


def test_links_are_names_of_one_file(here: Path) -> None:
    (here / "a").write_text("1")
    os.link(here / "a", here / "b")
    assert (here / "a").stat().st_nlink == 2
    assert (here / "a").stat().st_ino == (here / "b").stat().st_ino
    (here / "b").write_text("22")
    assert (here / "a").read_text() == "22"
    (here / "a").unlink()
    assert (here / "b").stat().st_nlink == 1
    (here / "d").mkdir()
    fails(errno.EPERM, os.link, here / "d", here / "e")


def test_symbolic_links_lead_where_they_say(here: Path) -> None:
    (here / "f").write_text("1")
    os.symlink("f", here / "l")
    assert os.readlink(here / "l") == "f"
    assert (here / "l").read_text() == "1"
    assert (here / "l").lstat().st_size == 1
    os.symlink("loop", here / "loop")
    fails(errno.ELOOP, os.open, here / "loop", os.O_RDONLY)
    os.symlink("x" * 4095, here / "long")
    assert len(os.readlink(here / "long")) == 4095


def test_other_nodes_keep_what_they_are(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o600)
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
    if os.geteuid() == 0:
        os.mknod(here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        assert (here / "null").stat().st_rdev == os.makedev(1, 3)


def test_attributes_are_kept(here: Path) -> None:
    path = here / "f"
    path.touch()
    path.chmod(0o4751)
    assert stat.S_IMODE(path.stat().st_mode) == 0o4751
    os.utime(path, ns=(123_456_789_012_345_678, 987_654_321_098_765_432))
    assert path.stat().st_atime_ns == 123_456_789_012_345_678
    assert path.stat().st_mtime_ns == 987_654_321_098_765_432
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
        assert (path.stat().st_uid, path.stat().st_gid) == (12, 34)


def test_times_change_when_they_should(here: Path) -> None:
    def times(path: Path) -> tuple[int, int]:
        return path.stat().st_mtime_ns, path.stat().st_ctime_ns

    path = here / "f"
    path.write_text("1")
    before, above = times(path), times(here)
    time.sleep(0.01)
    path.write_text("2")
    assert times(path) > before
    (here / "g").touch()
    assert times(here) > above
    before = times(path)
    time.sleep(0.01)
    path.chmod(0o600)
    assert times(path)[0] == before[0]
    assert times(path)[1] > before[1]


def test_truncate_cuts_and_grows_with_zeros(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"x" * 200_000)
    os.truncate(path, 100_001)
    os.truncate(path, 250_000)
    assert path.read_bytes() == b"x" * 100_001 + bytes(149_999)
    os.truncate(path, 0)
    os.truncate(path, 10)
    assert path.read_bytes() == bytes(10)
    fails(errno.EISDIR, os.truncate, here, 0)
    with path.open("r+b") as file:
        file.write(b"12345")
        file.truncate(3)
        file.flush()
        assert os.fstat(file.fileno()).st_size == 3
    assert path.read_bytes() == b"123"


def test_holes_read_as_zeros_and_take_no_room(here: Path) -> None:
    path = here / "f"
    with path.open("wb") as file:
        file.seek(50 << 20)
        file.write(b"end")
    assert path.stat().st_size == (50 << 20) + 3
    with path.open("rb") as file:
        assert file.read(1 << 20) == bytes(1 << 20)
        file.seek(-5, os.SEEK_END)
        assert file.read() == b"\0\0end"


def test_a_huge_sparse_file_comes_and_goes_at_once(here: Path) -> None:
    os.close(os.open(here / "f", os.O_CREAT))
    os.truncate(here / "f", 1 << 60)
    assert (here / "f").stat().st_size == 1 << 60
    (here / "f").unlink()


def test_data_that_is_far_apart_comes_and_goes_at_once(here: Path) -> None:
    descriptor = os.open(here / "f", os.O_CREAT | os.O_RDWR)
    for offset in (0, 10 << 20, 1 << 61):
        os.pwrite(descriptor, b"data", offset)
    os.fsync(descriptor)
    assert os.fstat(descriptor).st_blocks * 512 == 2 * os.fstat(descriptor).st_blksize + 512
    assert os.pread(descriptor, 10, (1 << 61) - 3) == b"\0\0\0data"
    os.truncate(here / "f", 1 << 60)
    assert os.lseek(descriptor, 1 << 20, os.SEEK_DATA) == 10 << 20
    assert os.lseek(descriptor, 10 << 20, os.SEEK_HOLE) == (10 << 20) + os.fstat(descriptor).st_blksize
    with pytest.raises(OSError, match="No such device or address"):
        os.lseek(descriptor, 11 << 20, os.SEEK_DATA)
    assert os.lseek(descriptor, -1, os.SEEK_END) == (1 << 60) - 1
    os.close(descriptor)
    (here / "f").unlink()


def test_appends_go_to_the_end(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"begin")
    with path.open("ab", buffering=0) as one, path.open("ab", buffering=0) as two:
        one.write(b"1")
        two.write(b"2")
        one.write(b"3")
    assert path.read_bytes() == b"begin123"


def test_open_with_o_trunc_empties(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"x" * 100)
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.read_bytes() == b""


def test_a_file_that_is_deleted_while_open_lives_on(here: Path) -> None:
    path = here / "f"
    with path.open("w+b") as file:
        file.write(b"1" * 100_000)
        file.flush()
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"2")
        file.seek(0)
        assert file.read() == b"1" * 100_000 + b"2"
        path.write_bytes(b"another")
        file.seek(0)
        assert file.read(1) == b"1"
    assert path.read_bytes() == b"another"


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_files_can_be_mapped(here: Path, flags: int) -> None:
    path = here / "f"
    path.write_bytes(bytes(100_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 100_000, flags) as mapped:
        mapped[70_000:70_003] = b"abc"
        if flags == mmap.MAP_SHARED:
            mapped.flush()
    expected = bytes(70_000) + (b"abc" if flags == mmap.MAP_SHARED else bytes(3)) + bytes(29_997)
    assert path.read_bytes() == expected


def test_direct_io_reads_and_writes(here: Path) -> None:
    path = here / "f"
    buffer = mmap.mmap(-1, 1 << 20)
    buffer.write(os.urandom(1 << 20))
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pwritev(descriptor, [buffer], 4096) == 1 << 20
        back = mmap.mmap(-1, 1 << 20)
        assert os.preadv(descriptor, [back], 4096) == 1 << 20
        assert back[:] == buffer[:]
    finally:
        os.close(descriptor)
    assert path.read_bytes() == bytes(4096) + buffer[:]


def test_extended_attributes_are_kept(here: Path) -> None:
    path = here / "f"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "user.b", bytes(1000))
    assert sorted(os.listxattr(path)) == ["user.a", "user.b"]
    assert os.getxattr(path, "user.a") == b"1"
    fails(errno.EEXIST, os.setxattr, path, "user.a", b"2", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, path, "user.c", b"2", os.XATTR_REPLACE)
    os.removexattr(path, "user.a")
    fails(errno.ENODATA, os.removexattr, path, "user.a")
    fails(errno.ENODATA, os.getxattr, path, "user.a")
    assert os.listxattr(path) == ["user.b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file capabilities")
@pytest.mark.parametrize("mode", ["r+b", "wb", "ab"])
def test_who_writes_to_a_program_takes_its_rights(here: Path, mode: str) -> None:
    path = here / "f"
    path.write_bytes(b"program")
    path.chmod(0o4755)
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    with path.open(mode) as file:
        file.write(b"x")
    assert "security.capability" not in os.listxattr(path)
    assert not path.stat().st_mode & stat.S_ISUID


def test_many_names_are_listed_once_each(here: Path) -> None:
    names = {f"name-{number}" for number in range(2000)}
    for name in names:
        os.mknod(here / name)
    assert sorted(os.listdir(here)) == sorted(names)
    listing = os.scandir(here)
    first = next(listing).name
    os.unlink(here / "name-77")
    rest = [entry.name for entry in listing]
    assert sorted({first, *rest}) in (sorted(names), sorted(names - {"name-77"}))
    assert len(rest) == len(set(rest))


def test_the_space_of_the_store_is_told(shared: Mount, here: Path) -> None:
    def free() -> int:
        return os.statvfs(shared.folder).f_bavail * 4096

    status = os.statvfs(shared.folder)
    assert status.f_blocks * status.f_frsize == 128 << 20
    assert status.f_namemax == 255
    time.sleep(2.1)  # it is asked at most so often
    before = free()
    (here / "f").write_bytes(bytes(20 << 20))
    time.sleep(2.1)
    assert (19 << 20) < before - free() < (22 << 20)


def test_a_full_store_is_enospc_and_deleting_helps(shared: Mount, here: Path) -> None:
    def fill() -> None:
        with (here / "f").open("wb", buffering=0) as file:
            for _ in range(200):
                file.write(bytes(1 << 20))
                os.fsync(file.fileno())

    fails(errno.ENOSPC, fill)
    (here / "f").unlink()
    time.sleep(2)
    (here / "g").write_bytes(bytes(20 << 20))
    assert (here / "g").stat().st_size == 20 << 20


@pytest.mark.slow
def test_who_appends_to_a_full_store_has_each_line_once(shared: Mount, here: Path) -> None:
    with (here / "fill").open("wb", buffering=0) as file:
        fails(errno.ENOSPC, lambda: [file.write(bytes(1 << 20)) for _ in range(200)])
        assert file.tell() == os.fstat(file.fileno()).st_size
    written = 0
    with (here / "log").open("ab", buffering=0) as file:

        def append() -> None:
            nonlocal written
            while True:
                written += file.write(b"x" * 100_000)

        fails(errno.ENOSPC, append)
        assert (here / "log").stat().st_size == written
        os.truncate(here / "fill", 0)
        time.sleep(2)
        file.write(b"end")
    assert (here / "log").read_bytes() == b"x" * written + b"end"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_permissions_are_checked(mount: Mounter, store: Any) -> None:
    mounted = mount(store.name, "--allow-other")
    folder = mounted / "private"
    folder.mkdir(0o700)
    (folder / "f").write_text("1")
    (mounted / "public").write_text("1")
    (mounted / "public").chmod(0o644)

    def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", command], user=65534, group=65534, capture_output=True, text=True)

    for above in mounted.folder.parents:  # pytest's folders are private
        if str(above).startswith("/tmp/"):
            above.chmod(0o755)
    assert "Permission denied" in as_nobody(f"cat {folder}/f").stderr
    assert as_nobody(f"cat {mounted / 'public'}").stdout == "1"
    assert "Permission denied" in as_nobody(f"echo 2 > {mounted / 'public'}").stderr
    assert "Permission denied" in as_nobody(f"rm -f {mounted / 'public'}").stderr


def test_a_read_only_mount_refuses_changes(mount: Mounter, store: Any, mounted: Mount) -> None:
    (mounted / "f").write_text("1")
    frozen = mount(store.name, "--read-only")
    assert (frozen / "f").read_text() == "1"
    fails(errno.EROFS, (frozen / "g").touch)
    fails(errno.EROFS, (frozen / "f").unlink)
    fails(errno.EROFS, os.open, frozen / "f", os.O_WRONLY)
