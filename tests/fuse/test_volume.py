"""Names and inodes: what each operation does, also when its process is killed, and when others do it at once."""

from __future__ import annotations

import errno
import itertools
import random
import stat
import threading
from collections.abc import Callable
from typing import Any

import pytest

from memfaas.client.store import Store
from memfaas.fs import members
from memfaas.fs.cells import Cell
from memfaas.fs.check import check
from memfaas.fs.directory import Leaf
from memfaas.fs.files import OpenFile
from memfaas.fs.records import ROOT
from memfaas.fs.volume import RENAME_EXCHANGE, RENAME_NOREPLACE, Attributes, Volume
from tests.fuse.test_cells import Killed, Mortal

FILE, DIR = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def make(volume: Volume, name: bytes, mode: int = FILE, parent: int = ROOT) -> int:
    return volume.make(parent, name, mode, 1, 2)[0]


def listed(volume: Volume, ino: int = ROOT) -> list[bytes]:
    return sorted(entry.name for entry in volume.entries(ino))


def fails(code: int, operation: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        operation(*arguments)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def test_a_directory_grows_through_all_its_forms(volume: Volume, store: Store) -> None:
    names = sorted(b"name-%d-" % number + b"x" * (number % 200) for number in range(3000))
    for name in names:
        make(volume, name)
    assert listed(volume) == names
    assert listed(Volume(store)) == names, "another mount sees them"
    for name in names[::2]:
        volume.unlink(ROOT, name)
    assert listed(volume) == names[1::2]
    assert all(volume.lookup(ROOT, name) for name in names[1::2])
    fails(errno.ENOENT, volume.lookup, ROOT, names[0])


def test_a_large_directory_is_taken_away_when_it_is_empty(volume: Volume, store: Store) -> None:
    parent = make(volume, b"d", DIR)
    names = [b"%0200d" % number for number in range(200)]
    for name in names:
        make(volume, name, parent=parent)
    for name in names[1:]:
        volume.unlink(parent, name)
    fails(errno.ENOTEMPTY, volume.rmdir, ROOT, b"d")
    volume.unlink(parent, names[0])
    volume.rmdir(ROOT, b"d")
    fails(errno.ENOENT, volume.make, parent, b"late", FILE, 1, 2)
    volume.free()
    assert check(store).wrong == []
    assert not [key for key in store if key[:1] == b"d" and key[8] != ROOT]


def test_what_is_deleted_leaves_nothing_in_the_store(store: Store) -> None:
    volume = Volume(store)
    before = set(store.keys())
    parent = make(volume, b"d", DIR)
    ino = make(volume, b"f", parent=parent)
    file = volume.files.open(ino)
    volume.files.write(file, 0, bytes(1_000_000))
    volume.files.close(file)
    volume.set_xattr(ino, b"user.a", b"1")
    volume.link(ino, ROOT, b"g")
    volume.unlink(parent, b"f")
    volume.rename(ROOT, b"g", parent, b"h")
    volume.unlink(parent, b"h")
    volume.rmdir(ROOT, b"d")
    volume.close()
    assert set(store.keys()) - before == {b"n"}


def test_names_that_make_no_sense_are_refused(volume: Volume) -> None:
    for name in (b"", b".", b"..", b"a/b", b"a\0b"):
        fails(errno.EINVAL, volume.make, ROOT, name, FILE, 0, 0)
    fails(errno.ENAMETOOLONG, volume.make, ROOT, b"x" * 256, FILE, 0, 0)
    fails(errno.ENAMETOOLONG, volume.lookup, ROOT, b"x" * 256)
    name = bytes(range(1, 47)) + bytes(range(48, 256))
    make(volume, name)
    assert listed(volume) == [name]


# --- kill -9 ----------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Volume, dict[str, int]], object]] = {
    "create": lambda volume, ino: volume.make(ino["d"], b"new", FILE, 1, 2),
    "mkdir": lambda volume, ino: volume.make(ino["d"], b"new", DIR, 1, 2),
    "create-in-full": lambda volume, ino: volume.make(ino["full"], b"new", FILE, 1, 2),
    "unlink": lambda volume, ino: volume.unlink(ROOT, b"f"),
    "unlink-one-of-two": lambda volume, ino: volume.unlink(ROOT, b"two"),
    "link": lambda volume, ino: volume.link(ino["f"], ino["d"], b"link"),
    "rmdir": lambda volume, ino: volume.rmdir(ROOT, b"e"),
    "rename": lambda volume, ino: volume.rename(ROOT, b"f", ROOT, b"new"),
    "rename-to-directory": lambda volume, ino: volume.rename(ROOT, b"f", ino["d"], b"new"),
    "rename-over-file": lambda volume, ino: volume.rename(ROOT, b"f", ROOT, b"g"),
    "rename-over-directory": lambda volume, ino: volume.rename(ROOT, b"d", ROOT, b"e"),
    "move-directory": lambda volume, ino: volume.rename(ROOT, b"d", ino["e"], b"d"),
    "exchange": lambda volume, ino: volume.rename(ROOT, b"f", ROOT, b"d", RENAME_EXCHANGE),
    "xattr": lambda volume, ino: volume.set_xattr(ino["f"], b"user.a", b"1"),
}


def stage(store: Store) -> dict[str, int]:
    store.clear()
    volume = Volume(store)
    ino = {name: make(volume, name.encode(), DIR) for name in ("d", "e", "full")}
    ino |= {name: make(volume, name.encode()) for name in ("f", "g", "two")}
    volume.link(ino["two"], ROOT, b"two2")
    while len(volume.dirs.leaf(ino["full"], b"new").entries) <= 6 << 10:
        make(volume, random.randbytes(100).hex().encode(), parent=ino["full"])
    return ino


def names_of(volume: Volume, ino: int = ROOT, above: bytes = b"") -> set[tuple[bytes, int]]:
    found = set()
    for entry in volume.entries(ino):
        path = above + b"/" + entry.name
        if stat.S_ISDIR(entry.type):
            found.add((path, 0))
            found |= names_of(volume, entry.ino, path)
        elif len(entry.name) < 100:  # those that only fill a directory are others each time
            found.add((path, volume.inode(entry.ino).nlink + 10 * len(volume.xattrs(entry.ino))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_whose_process_is_killed_is_done_or_not(store: Store, operation: str) -> None:
    ino = stage(store)
    before = names_of(Volume(store))
    OPERATIONS[operation](Volume(store), ino)
    after = names_of(Volume(store))
    outcomes = []
    for killed_at in itertools.count():
        ino = stage(store)
        mortal: Any = Mortal(store, 1_000_000)
        victim = Volume(mortal)
        mortal._left = killed_at
        try:
            OPERATIONS[operation](victim, ino)
            break
        except Killed:
            pass
        survivor = Volume(store)
        names = names_of(survivor)
        assert names in (before, after), f"killed at step {killed_at}"
        outcomes.append(names == after)
        findings = check(store)
        assert findings.wrong == [], f"killed at step {killed_at}"
        assert len(findings.leaked) <= (operation in ("create", "mkdir", "create-in-full"))
        assert names_of(Volume(store)) == names, "what was seen stays"
        make(survivor, b"another", parent=ROOT)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}, "it has a moment at which it takes effect"


# --- at once ------------------------------------------------------------------------------------------------


def crowd(store: Store, count: int, work: Callable[[Volume, random.Random], None]) -> None:
    """Several mounts at once."""
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            work(Volume(store), random.Random(seed))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.slow
def test_mounts_that_work_in_one_directory_never_corrupt_it(store: Store) -> None:
    names = [b"%d" % number for number in range(8)]
    allowed = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.EINVAL}
    Volume(store)

    def work(volume: Volume, chance: random.Random) -> None:
        for _ in range(150):
            one, two = chance.choices(names, k=2)
            where = [ROOT]
            try:
                where += [entry.ino for entry in volume.entries(ROOT) if stat.S_ISDIR(entry.type)]
                here, there = chance.choices(where, k=2)
                match chance.randrange(7):
                    case 0 | 1:
                        volume.make(here, one, FILE, 1, 2)
                    case 2:
                        volume.make(here, one, DIR, 1, 2)
                    case 3:
                        volume.unlink(here, one)
                    case 4:
                        volume.rmdir(here, one)
                    case 5:
                        volume.rename(here, one, there, two, chance.choice((0, RENAME_NOREPLACE, RENAME_EXCHANGE)))
                    case _:
                        volume.link(volume.lookup(here, one)[0], there, two)
            except OSError as error:
                if error.errno not in allowed:
                    raise

    crowd(store, 4, work)
    findings = check(store)
    assert findings.wrong == []
    assert findings.leaked == set()
    assert all(key[:1] != b"t" for key in store)


@pytest.mark.slow
def test_of_many_mounts_that_make_one_name_one_succeeds(store: Store) -> None:
    Volume(store)
    made: list[bytes] = []

    def work(volume: Volume, chance: random.Random) -> None:
        for number in range(100):
            try:
                volume.make(ROOT, b"%d" % number, FILE, 1, 2)
                made.append(b"%d" % number)
            except FileExistsError:
                pass

    crowd(store, 4, work)
    assert sorted(made) == sorted(b"%d" % number for number in range(100))
    assert check(store).leaked == set()


def test_two_moves_at_once_close_no_loop(volume: Volume, store: Store) -> None:
    """Each alone is fine: a into b/, and b into a/."""
    x, y = make(volume, b"x", DIR), make(volume, b"y", DIR)
    a, b = make(volume, b"a", DIR, x), make(volume, b"b", DIR, y)
    other = Volume(store)
    first, *_ = volume._renaming(x, b"a", b, b"a", 0)
    second, *_ = other._renaming(y, b"b", a, b"b", 0)
    assert other.cells.commit(second)
    assert not volume.cells.commit(first)
    fails(errno.EINVAL, volume.rename, x, b"a", b, b"a")
    assert check(store).wrong == []


def test_a_rename_within_a_leaf_sees_what_another_has_just_made(volume: Volume, store: Store) -> None:
    """Between its two looks at the leaf."""
    other = Volume(store)
    make(volume, b"a")
    look = volume.dirs.roomy_leaf

    def look_and_wait(ino: int, name: bytes) -> Leaf:
        leaf = look(ino, name)
        volume.dirs.roomy_leaf = look  # type: ignore[method-assign]
        make(other, b"new")
        return leaf

    volume.dirs.roomy_leaf = look_and_wait  # type: ignore[method-assign]
    volume.rename(ROOT, b"new", ROOT, b"newer")
    assert listed(volume) == [b"a", b"newer"]


def once_large(volume: Volume, count: int) -> int:
    """An empty directory that had so many names."""
    parent = make(volume, b"d", DIR)
    names = [b"%0200d" % number for number in range(count)]
    for name in names:
        make(volume, name, parent=parent)
    for name in names:
        volume.unlink(parent, name)
    return parent


def test_a_large_directory_is_taken_away_although_others_work_in_it(store: Store, volume: Volume) -> None:
    """It is empty most of the time, and never unchanged for as long as all of it takes."""
    other = Volume(store)
    parent = once_large(volume, 600)
    load, count = volume.cells.load, 0

    def load_and_wait(key: bytes) -> Cell:
        nonlocal count
        cell = load(key)
        count += 1
        if count % 40 == 0:
            name = b"x%d" % count
            try:
                make(other, name, parent=parent)
                other.unlink(parent, name)
            except FileNotFoundError:
                pass  # gone
        return cell

    volume.cells.load = load_and_wait  # type: ignore[method-assign]
    volume.rmdir(ROOT, b"d")
    assert count < 2000
    fails(errno.ENOENT, other.make, parent, b"late", FILE, 1, 2)
    assert check(store).wrong == []
    assert not [key for key in store if key[:1] == b"d" and key[8] != ROOT]


def test_who_remembers_how_a_directory_was_finds_its_way_when_it_changed(store: Store, volume: Volume) -> None:
    """Its branches become leaves again when another mount wants to take it away, and then they are used again."""
    other = Volume(store)
    parent = once_large(volume, 200)
    other.dirs.removal(parent)
    make(other, b"one", parent=parent)
    assert volume.lookup(parent, b"one")
    make(volume, b"two", parent=parent)
    assert listed(other, parent) == listed(volume, parent) == [b"one", b"two"]


# --- deleted, but open ----------------------------------------------------------------------------------------


def test_a_file_that_is_open_here_lives_until_it_is_closed(volume: Volume, store: Store) -> None:
    file = volume.files.open(make(volume, b"f"))
    volume.files.write(file, 0, b"kept")
    volume.files.flush(file)
    volume.unlink(ROOT, b"f")
    volume.tick()
    assert volume.files.read(file, 0, 10) == b"kept"
    volume.files.close(file)
    volume.tick()
    assert not [key for key in store if key[:1] in b"cg"]


def test_a_file_that_another_mount_has_open_lives_until_it_is_closed(store: Store) -> None:
    one, two = Volume(store), Volume(store)
    ino = make(one, b"f")
    file = two.files.open(ino)
    two.files.write(file, 0, b"kept")
    two.files.flush(file)
    one.unlink(ROOT, b"f")
    for _ in range(3):
        one.tick()
        two.tick()
    assert two.files.read(file, 0, 10) == b"kept"
    fails(errno.ESTALE, one.files.open, ino)
    two.files.close(file)
    for _ in range(3):
        two.tick()
        one.tick()
    fails(errno.ESTALE, one.inode, ino)
    assert not [key for key in store if key[:1] in b"cg"]


def test_what_a_killed_mount_had_deleted_is_freed_by_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Volume(store), Volume(store)
    ino = make(one, b"f")
    file = one.files.open(ino)
    one.files.write(file, 0, b"data")
    one.files.flush(file)
    one.unlink(ROOT, b"f")
    two.tick()
    assert two.inode(ino).nlink == 0
    monkeypatch.setattr(members, "DEAD_S", 0.0)
    two.tick()  # one is dead
    two.tick()
    fails(errno.ESTALE, two.inode, ino)
    assert len(two.members.others()) == 0
    one.tick()  # it was only stopped
    assert len(two.members.others()) == 1


# --- files that are cut -----------------------------------------------------------------------------------------


def test_data_that_comes_late_is_not_behind_the_end_of_a_file_that_was_cut(store: Store) -> None:
    """One writes a chunk, and before it is there, the other empties the file."""
    other = Volume(store)
    ino = make(other, b"f")

    class Slow:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if name == "_save_if" and args[0][:1] == b"c":
                    other.files.truncate(ino, 0, 0)
                return getattr(store, name)(*args)

            return call

    volume = Volume(Slow())
    file = volume.files.open(ino)
    volume.files.write(file, 0, b"late")
    volume.files.flush(file)
    other.files.truncate(ino, 10, 0)
    assert volume.files.read(volume.files.open(ino), 0, 10) == bytes(10)


def test_who_is_killed_while_it_cuts_a_file_leaves_nothing_behind_its_end(store: Store) -> None:
    for killed_at in itertools.count():
        store.clear()
        mortal: Any = Mortal(store, 1_000_000)
        volume, other = Volume(mortal), Volume(store)
        ino = make(volume, b"f")
        file = volume.files.open(ino)
        volume.files.write(file, 0, b"x" * 150_000)
        volume.files.flush(file)
        mortal._left = killed_at
        try:
            volume.files.truncate(ino, 10, 0)
            break
        except Killed:
            pass
        size = other.inode(ino).size
        assert size in (10, 150_000)
        grown = other.files.open(ino)
        if killed_at % 2:
            other.files.truncate(ino, 200_000, 0)
        else:
            other.files.write(grown, 199_999, b"\0")
            other.files.flush(grown)
        assert other.files.read(grown, 0, 200_000) == b"x" * size + bytes(200_000 - size)


def test_each_change_of_the_data_is_another_version(store: Store) -> None:
    """Also when time and size stay. Who reads while it is written has none that counts later."""
    other = Volume(store)
    ino = make(other, b"f")
    seen: list[int] = []

    class Slow:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if name in ("_save", "_save_if") and args[0][:1] == b"c":
                    seen.append(other.inode(ino).version)
                return getattr(store, name)(*args)

            return call

    volume = Volume(Slow())

    def changes(change: Callable[[OpenFile], object]) -> None:
        before = volume.inode(ino).version
        file = volume.files.open(ino)
        change(file)
        volume.files.close(file)
        volume.set_attributes(ino, Attributes(mtime=1))
        after = other.inode(ino).version
        assert after > max(seen, default=before)
        assert after > before

    changes(lambda file: volume.files.write(file, 0, b"small"))
    changes(lambda file: volume.files.write(file, 0, b"Small"))
    changes(lambda file: volume.files.write(file, 0, b"x" * 200_000))
    changes(lambda file: volume.files.write(file, 0, b"X" * 200_000))
    changes(lambda file: volume.files.append(file, b"end"))
    changes(lambda file: volume.files.punch(file, 0, 100_000))
    changes(lambda file: volume.files.truncate(ino, 10, 0))
    assert len(seen) >= 8


# --- attributes -------------------------------------------------------------------------------------------------


def test_who_gives_a_file_away_takes_its_privileges(volume: Volume) -> None:
    ino = make(volume, b"f", stat.S_IFREG | 0o6755)
    assert volume.set_attributes(ino, Attributes(uid=7)).mode == stat.S_IFREG | 0o755
    volume.set_attributes(ino, Attributes(mode=0o4755))
    file = volume.files.open(ino)
    volume.files.write(file, 0, b"x")
    volume.files.close(file)
    assert volume.inode(ino).mode == stat.S_IFREG | 0o755


def test_a_directory_may_give_its_group_to_what_is_made_in_it(volume: Volume) -> None:
    parent = make(volume, b"d", stat.S_IFDIR | 0o2755)
    volume.set_attributes(parent, Attributes(gid=9))
    volume.set_attributes(parent, Attributes(mode=0o2755))
    assert volume.inode(make(volume, b"f", parent=parent)).gid == 9
    below = volume.inode(make(volume, b"e", DIR, parent=parent))
    assert (below.gid, bool(below.mode & stat.S_ISGID)) == (9, True)
