"""Who is a mount of a file system, who is taken for dead, and what becomes of what it had."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfaas.client.local import LocalCluster
from memfaas.client.session import Session
from memfaas.client.store import Store
from memfaas.errors import DeadlineExceeded, UsageError, ValueLost
from memfaas.fs import FileSystem, members, pulse
from memfaas.fs.check import check
from memfaas.fs.locks import FLOCK, POSIX
from memfaas.fs.pulse import Pulse
from memfaas.fs.records import ROOT, inode_key
from memfaas.fs.volume import Volume
from tests.client.test_session import in_child
from tests.fuse.conftest import Mount, Mounter, eventually
from tests.fuse.test_volume import fails, listed, make


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gave no sign since it was looked at last is dead."""
    monkeypatch.setattr(members, "DEAD_S", 0.0)


def bury(volume: Volume, name: bytes) -> int:
    """A deleted file with data."""
    ino = make(volume, name)
    file = volume.files.open(ino)
    volume.files.write(file, 0, b"data")
    volume.files.close(file)
    volume.unlink(ROOT, name)
    return ino


def kill(dead: Volume, alive: Volume) -> None:
    """`alive` takes the other one for dead."""
    alive.tick()
    alive.tick()
    assert dead.members.id not in alive.members.others()


# --- signs of life ----------------------------------------------------------------------------------------------


def test_a_member_lives_while_its_operation_takes_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "DEAD_S", 0.5)
    monkeypatch.setattr(pulse, "BEAT_S", 0.02)
    busy, other = Volume(store), Volume(store)
    with Pulse(store, busy.members):
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:  # `busy` comes to nothing else meanwhile
            other.tick()
            assert other.members.others() == [busy.members.id]
            time.sleep(0.01)

    def is_alone() -> bool:
        other.tick()
        return other.members.others() == []

    assert eventually(is_alone), "then it was killed"


def test_a_sign_of_life_does_not_say_that_an_operation_has_ended(store: Store) -> None:
    """It does so for deleted files: one that is being opened could be freed."""
    one, two = Volume(store), Volume(store)
    ino = bury(one, b"f")
    for _ in range(3):
        one.tick()
        two.members.pulse(two.cells)
    assert one.inode(ino).nlink == 0, "two has not said that it has it not open"
    for _ in range(3):
        two.tick()
        one.tick()
    fails(errno.ESTALE, one.inode, ino)


def test_who_was_taken_for_dead_is_a_new_member(store: Store, hasty: None) -> None:
    ghost, other = Volume(store), Volume(store)
    name = ghost.members.id
    kill(ghost, other)
    with pytest.raises(members.Gone):
        ghost.members.pulse(ghost.cells)
    assert b"m" + name not in store, "nobody but who joins makes a sign"
    ghost.tick()
    assert other.members.others() == [ghost.members.id] != [name]


def test_a_ghost_frees_nothing_that_others_have_taken_over(store: Store, hasty: None) -> None:
    ghost, other = Volume(store), Volume(store)
    ino = make(ghost, b"f")
    file = other.files.open(ino)
    other.files.write(file, 0, b"kept")
    other.files.flush(file)
    ghost.unlink(ROOT, b"f")
    kill(ghost, other)
    ghost.free()
    ghost.free()
    assert other.files.read(file, 0, 10) == b"kept"
    other.files.close(file)
    for _ in range(3):
        ghost.tick()
        other.free()
    assert not [key for key in store if key[:1] in b"cg"]


def test_what_a_ghost_deletes_is_freed(store: Store, hasty: None) -> None:
    ghost, other = Volume(store), Volume(store)
    kill(ghost, other)
    ino = bury(ghost, b"f")
    ghost.tick()
    ghost.close()
    other.close()
    assert inode_key(ino) not in store
    assert not [key for key in store if key[:1] in b"cg"]


# --- locks that are lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [POSIX, FLOCK])
def test_who_lost_a_lock_can_not_use_what_it_had_opened(store: Store, hasty: None, kind: int) -> None:
    ghost, other = Volume(store), Volume(store)
    ino = make(ghost, b"f")
    assert ghost.locks.take(ino, kind, 1, exclusive=True)
    term = ghost.members.term
    ghost.locks.check(ino, term)
    kill(ghost, other)
    assert other.locks.take(ino, kind, 1, exclusive=True)
    fails(errno.EIO, ghost.locks.check, ino, term)
    ghost.locks.check(ino, ghost.members.term)
    ghost.locks.check(ino + 1, term)
    assert not ghost.locks.take(ino, kind, 1, exclusive=True)
    ghost.locks.give(ino, kind, 1)
    assert not ghost.locks.take(ino, kind, 1, exclusive=True), "it has nothing to give up"


def test_what_was_written_under_a_lock_that_is_lost_is_not_stored(store: Store, hasty: None) -> None:
    ghost, other = Volume(store, cache_s=0.0), Volume(store, cache_s=0.0)
    ino = make(ghost, b"f")
    assert ghost.locks.take(ino, FLOCK, 1, exclusive=True)
    file = ghost.files.open(ino)
    ghost.files.write(file, 0, b"old")
    kill(ghost, other)
    assert other.locks.take(ino, FLOCK, 1, exclusive=True)
    new = other.files.open(ino)
    other.files.write(new, 0, b"new")
    other.files.close(new)
    ghost.tick()
    fails(errno.EIO, ghost.flush_under_lock, ino)
    ghost.files.close(file)
    assert other.files.read(other.files.open(ino), 0, 10) == b"new"


class Failing:
    """A store that fails, once it is told for what."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fails: Callable[[str, bytes], Exception | None] = lambda name, key: None

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            keys = [] if not args else [args[0]] if isinstance(args[0], bytes) else args[0]
            for key in keys:
                error = self.fails(name, key)
                if error is not None:
                    raise error
            return getattr(self._store, name)(*args)

        return call

    def lose(self, *lost: bytes) -> None:
        """Keys, or how they begin."""
        self.fails = lambda name, key: ValueLost("gone with its donor") if key.startswith(lost) else None

    def interrupt(self, *keys: bytes) -> None:
        self.fails = lambda name, key: DeadlineExceeded("too late") if key.startswith(keys) else None

    def mend(self) -> None:
        self.fails = lambda name, key: None


def test_a_lock_that_could_not_be_given_up_is_given_up_later(store: Store) -> None:
    failing = Failing(store)
    one, two = Volume(failing), Volume(store)
    assert one.locks.take(7, FLOCK, 1, exclusive=True)
    failing.interrupt(b"l")
    with pytest.raises(DeadlineExceeded):
        one.locks.give(7, FLOCK, 1)
    failing.mend()
    assert not two.locks.take(7, FLOCK, 1, exclusive=True)
    one.tick()
    assert two.locks.take(7, FLOCK, 1, exclusive=True)


# --- operations that are done ---------------------------------------------------------------------------------------


def after_commit(failing: Failing, volume: Volume, operation: Callable[[], object]) -> None:
    """Runs an operation on a store that fails from the moment at which it takes effect."""
    commit = volume.cells.commit
    swap = volume.cells.swap

    def fail_after(call: Callable[..., bool]) -> Callable[..., bool]:
        def called(*args: Any) -> bool:
            done = call(*args)
            key = args[0].key if not isinstance(args[0], list) else b"d"
            if done and key[:1] == b"d":
                failing.fails = lambda name, key: DeadlineExceeded("too late")
            return done

        return called

    volume.cells.commit = fail_after(commit)  # type: ignore[method-assign]
    volume.cells.swap = fail_after(swap)  # type: ignore[method-assign]
    try:
        operation()
    finally:
        failing.mend()
        volume.cells.commit, volume.cells.swap = commit, swap  # type: ignore[method-assign]


def test_an_operation_that_is_done_does_not_fail_afterwards(store: Store) -> None:
    failing = Failing(store)
    volume = Volume(failing)
    make(volume, b"a")
    make(volume, b"b")
    ino = volume.lookup(ROOT, b"a")[0]
    after_commit(failing, volume, lambda: make(volume, b"new"))
    after_commit(failing, volume, lambda: volume.link(ino, ROOT, b"link"))
    after_commit(failing, volume, lambda: volume.rename(ROOT, b"a", ROOT, b"b"))
    after_commit(failing, volume, lambda: volume.unlink(ROOT, b"new"))
    make(volume, b"d", stat.S_IFDIR | 0o755)
    after_commit(failing, volume, lambda: volume.rmdir(ROOT, b"d"))
    assert listed(volume) == [b"b", b"link"]
    volume.tick()
    volume.tick()
    findings = check(store)
    assert (findings.wrong, findings.leaked) == ([], set())
    assert not [key for key in store if key[:1] == b"g"], "and what was deleted is freed"


def test_a_name_that_comes_late_leads_to_its_inode(store: Store) -> None:
    """The request that puts it was given up, but it is on its way."""
    failing = Failing(store)
    volume = Volume(failing)
    late: list[tuple[Any, ...]] = []

    def given_up(cell: Any, value: bytes | None) -> bool:
        if cell.key[:1] == b"d":
            late.append((cell, value))
            raise DeadlineExceeded("too late")
        return swap(cell, value)

    swap = volume.cells.swap
    volume.cells.swap = given_up  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        make(volume, b"f")
    volume.cells.swap = swap  # type: ignore[method-assign]
    assert swap(*late[0])
    assert volume.lookup(ROOT, b"f")[1].nlink == 1
    assert check(store).wrong == []


# --- what is lost ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(store: Store) -> tuple[Volume, Failing]:
    """A file, a directory, and what is lost of them; others that are whole."""
    failing = Failing(store)
    volume = Volume(failing)
    lost = [make(volume, b"lost"), make(volume, b"lost-dir", stat.S_IFDIR | 0o755)]
    for name in (b"a", b"b"):
        make(volume, name)
    failing.lose(*map(inode_key, lost))
    return volume, failing


def test_a_lost_inode_hides_no_other_name(broken: tuple[Volume, Failing]) -> None:
    volume, _ = broken
    entries = volume.entries(ROOT)
    found = {entry.name: inode for entry, inode in zip(entries, volume.inodes(entries), strict=True)}
    assert sorted(name for name, inode in found.items() if inode is not None) == [b"a", b"b", b"lost", b"lost-dir"]
    assert sorted(name for name, inode in found.items() if inode is not None and inode.is_lost) == [
        b"lost",
        b"lost-dir",
    ]
    fails(errno.EIO, volume.lookup, ROOT, b"lost")


def test_the_name_of_a_lost_inode_can_be_removed(
    broken: tuple[Volume, Failing], caplog: pytest.LogCaptureFixture
) -> None:
    volume, _ = broken
    volume.unlink(ROOT, b"lost")
    volume.rmdir(ROOT, b"lost-dir")
    assert listed(volume) == [b"a", b"b"]
    assert len([one for one in caplog.records if "is lost" in one.message and "'lost'" in one.message]) == 1


def test_a_file_may_be_renamed_over_a_lost_one(broken: tuple[Volume, Failing]) -> None:
    volume, _ = broken
    ino = volume.lookup(ROOT, b"a")[0]
    volume.rename(ROOT, b"a", ROOT, b"lost")
    assert volume.lookup(ROOT, b"lost")[0] == ino


def test_what_is_lost_keeps_nothing_else_from_being_freed(store: Store) -> None:
    failing = Failing(store)
    volume = Volume(failing)
    inodes = [bury(volume, b"%d" % number) for number in range(3)]
    failing.lose(inode_key(inodes[0]))
    volume.free()
    assert [inode_key(ino) in store for ino in inodes] == [True, False, False]
    failing.mend()
    assert not [key for key in store if key[:1] == b"g"]
    assert {key[1:9] for key in store if key[:1] == b"c"} == {inode_key(inodes[0])[1:]}


def test_what_cannot_be_freed_now_is_freed_later(store: Store) -> None:
    failing = Failing(store)
    volume = Volume(failing)
    inodes = [bury(volume, b"%d" % number) for number in range(3)]
    failing.interrupt(inode_key(inodes[0]))
    with pytest.raises(DeadlineExceeded):
        volume.free()
    assert [inode_key(ino) in store for ino in inodes] == [True, False, False]
    failing.mend()
    volume.free()
    assert inode_key(inodes[0]) not in store


def test_a_member_whose_sign_is_lost_takes_another_name(store: Store) -> None:
    failing = Failing(store)
    volume, other = Volume(failing), Volume(store)
    name = volume.members.id
    failing.lose(b"m" + name, b"g" + name)
    volume.tick()
    assert volume.members.id != name
    bury(volume, b"f")
    assert other.members.others() == [volume.members.id]


# --- stores that are none for files ---------------------------------------------------------------------------------


def test_a_store_that_drops_values_holds_no_files(session: Session) -> None:
    cache = session.store("a-cache", size="4MiB", on_reclaim="drop")
    try:
        with pytest.raises(UsageError, match="cannot hold a file system"):
            FileSystem(cache)
        assert cache.keys() == []
    finally:
        session.delete_store("a-cache")


def test_a_program_that_ends_after_its_store_says_what_that_means_in_one_line(cluster: LocalCluster) -> None:
    code = f"""
import memfaas
from memfaas.fs import FileSystem
session = memfaas.connect({cluster.address!r})
files = FileSystem(session.store("gone", size="4MiB"))
files.open("/f", "wb").write(b"waits")
session.delete_store("gone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "not all that was written last to files is in the store" in done.stderr
    assert "Traceback" not in done.stderr


# --- fork -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_a_mount_of_its_own(files: FileSystem, store: Store) -> None:
    files.write_bytes("/before", b"1")
    file = files.open("/open", "wb")
    file.write(b"of the parent")
    file.flush()

    parent = files._volume.members.id

    def work() -> None:
        for number in range(5):
            files.write_bytes(f"/child{number}", b"%d" % number)
        assert files._volume.members.others() == [parent]
        with files.open("/open", "ab") as again:
            again.write(b"!")
        files.close()

    in_child(work)
    for number in range(5):
        files.write_bytes(f"/parent{number}", b"parent %d" % number)
    file.close()
    assert [files.read_bytes(f"/child{number}") for number in range(5)] == [b"%d" % number for number in range(5)]
    inodes = [inode for _, inode in files.scan("/")]
    assert len(inodes) == 12
    assert len({entry.ino for entry, _ in files.scan("/")}) == 12, "no number is given twice"
    files.remove("/before")
    assert check(store).wrong == []


# --- through the kernel ----------------------------------------------------------------------------------------------


def stop(mount: Mount, store: Store) -> None:
    """As a machine that sleeps: another mount takes it for dead."""
    mount.process.send_signal(signal.SIGSTOP)
    try:
        other = Volume(store)
        before = members.DEAD_S
        members.DEAD_S = 0.0
        try:
            for _ in range(3):
                other.tick()
            assert other.members.others() == []
            other.close()
        finally:
            members.DEAD_S = before
    finally:
        mount.process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_program_whose_lock_is_lost_hears_of_it(mounted: Mount, store: Store) -> None:
    path: Path = mounted / "f"
    path.write_bytes(b"content")
    with path.open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"C")
        stop(mounted, store)
        time.sleep(3)  # its next sign says that it was taken for dead
        with pytest.raises(OSError, match="Input/output") as caught:
            os.pwrite(file.fileno(), b"late", 0)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            file.close()
    with path.open("r+b") as again:
        fcntl.flock(again, fcntl.LOCK_EX)
        assert again.read()[1:] == b"ontent"


def test_both_may_make_the_same_file_at_once(mount: Mounter, store: Store) -> None:
    """Who loses the race opens what the other has made."""
    mounts = [mount(store.name) for _ in range(2)]
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def work(folder: Path) -> None:
        try:
            for number in range(60):
                start.wait()
                os.close(os.open(folder / str(number), os.O_CREAT | os.O_RDWR))
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(one.folder,)) for one in mounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(os.listdir(mounts[0].folder)) == 60
