"""Two mounts of one file system, by two processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memfaas.client.store import Store
from memfaas.fs.check import check
from tests.fuse.conftest import Mount, Mounter, eventually


@pytest.fixture
def usual(mount: Mounter, store: Store) -> tuple[Mount, Mount]:
    """With names and attributes kept for a second, as they are if nothing else is said."""
    return mount(store.name), mount(store.name)


def test_what_was_closed_is_seen_by_who_opens_it(usual: tuple[Mount, Mount]) -> None:
    one, two = usual
    for number in range(20):
        (one / "f").write_bytes(b"%03d" % number * 50_000)
        assert (two / "f").read_bytes() == b"%03d" % number * 50_000
        (two / "f").write_bytes(b"x" * number)
        assert (one / "f").read_bytes() == b"x" * number


def test_what_was_synced_is_seen_while_it_is_still_open(usual: tuple[Mount, Mount]) -> None:
    one, two = usual
    with (one / "f").open("wb", buffering=0) as file:
        for number in range(5):
            file.write(b"%d" % number * 1000)
            os.fsync(file.fileno())
            assert (two / "f").read_bytes()[-1000:] == b"%d" % number * 1000


def test_a_file_that_is_replaced_is_seen_at_once(usual: tuple[Mount, Mount]) -> None:
    """As programs publish a new version: written under another name, and renamed."""
    one, two = usual
    for number in range(20):
        (one / "draft").write_text(str(number))
        (one / "draft").rename(one / "f")
        assert (two / "f").read_text() == str(number)


def test_kept_data_is_not_shown_when_it_is_old(usual: tuple[Mount, Mount]) -> None:
    one, two = usual
    (one / "f").write_bytes(bytes(1 << 20))
    assert (two / "f").read_bytes() == bytes(1 << 20)  # two's kernel has it now
    with (one / "f").open("r+b") as file:
        file.seek(500_000)
        file.write(b"new")
    with (two / "f").open("rb") as file:
        file.seek(500_000)
        assert file.read(3) == b"new"


def test_what_was_closed_is_seen_although_size_and_times_are_as_before(usual: tuple[Mount, Mount]) -> None:
    one, two = usual
    for number in range(5):
        (one / "f").write_bytes(b"%d" % number * 100_000)
        os.utime(one / "f", ns=(1, 1))
        assert (two / "f").read_bytes() == b"%d" % number * 100_000


def test_what_another_wrote_is_seen_by_who_wrote_to_the_same_file_meanwhile(usual: tuple[Mount, Mount]) -> None:
    one, two = usual
    (one / "f").write_bytes(bytes(200_000))
    with (two / "f").open("r+b", buffering=0) as file:
        assert file.read() == bytes(200_000)  # two's kernel has all of it
        with (one / "f").open("r+b") as other:
            other.write(b"one")
        file.seek(150_000)
        file.write(b"two")
    with (two / "f").open("rb") as file:
        assert file.read(3) == b"one"


def test_names_that_one_makes_the_other_has(pair: tuple[Mount, Mount]) -> None:
    one, two = pair
    (one / "d").mkdir()
    (two / "d" / "f").write_text("1")
    assert os.listdir(one / "d") == ["f"]
    (one / "d" / "f").rename(one / "g")
    assert os.listdir(two / "d") == []
    (two / "d").rmdir()
    assert not (one / "d").exists()
    assert sorted(os.listdir(one.folder)) == ["g"]
    with pytest.raises(FileExistsError):
        os.open(two / "g", os.O_CREAT | os.O_EXCL)


def test_a_mount_may_be_far_from_the_memory(mount: Mounter, store: Store) -> None:
    """Over tcp, as on another node."""
    far, near = mount(store.name, "--fabric", "tcp"), mount(store.name)
    data = os.urandom(5_000_000)
    (far / "d").mkdir()
    (far / "d" / "f").write_bytes(data)
    assert (near / "d" / "f").read_bytes() == data
    (near / "d" / "f").rename(near / "g")
    time.sleep(2.5)  # by then it knows that chunks are better asked for together
    with (far / "g").open("rb") as file:
        assert file.read() == data
        assert os.pread(file.fileno(), 100_000, 1_234_567) == data[1_234_567:1_334_567]
    for number in range(300):
        (far / "d" / str(number)).touch()
    assert len(os.listdir(near / "d")) == 300
    (far / "g").unlink()


def test_appends_of_both_are_all_there(usual: tuple[Mount, Mount]) -> None:
    def append(mount: Mount, letter: bytes) -> None:
        with (mount / "log").open("ab", buffering=0) as file:
            for number in range(200):
                file.write(b"%b%d\n" % (letter, number))

    threads = [threading.Thread(target=append, args=pair) for pair in zip(usual, (b"a", b"b"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (usual[0] / "log").read_bytes().splitlines()
    assert sorted(lines) == sorted(b"%b%d" % (letter, number) for letter in (b"a", b"b") for number in range(200))
    for letter in (b"a", b"b"):
        assert [line for line in lines if line[:1] == letter] == [b"%b%d" % (letter, n) for n in range(200)]


def test_parts_of_one_chunk_may_be_written_by_both(usual: tuple[Mount, Mount]) -> None:
    one, two = usual
    (one / "f").write_bytes(bytes(64 << 10))

    def write(mount: Mount, first: int) -> None:
        with (mount / "f").open("r+b", buffering=0) as file:
            for at in range(first, 64, 2):
                os.pwrite(file.fileno(), bytes([at]) * 1024, at * 1024)
                os.fsync(file.fileno())

    threads = [threading.Thread(target=write, args=(mount, first)) for first, mount in enumerate((one, two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (one / "f").read_bytes() == b"".join(bytes([at]) * 1024 for at in range(64))


def test_a_file_that_one_deletes_lives_on_in_the_other(pair: tuple[Mount, Mount], store: Store) -> None:
    one, two = pair
    (one / "f").write_bytes(b"x" * 200_000)
    with (two / "f").open("rb") as file:
        (one / "f").unlink()
        assert not (two / "f").exists()
        assert not eventually(lambda: all(key[:1] != b"c" for key in store), within_s=8)
        assert file.read() == b"x" * 200_000
    assert eventually(lambda: all(key[:1] != b"c" for key in store)), "and then its memory is free"


_WORK = """
import os, random, sys
folder, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
for _ in range(300):
    one, two = (os.path.join(folder, str(chance.randrange(12))) for _ in range(2))
    try:
        match chance.randrange(6):
            case 0: os.close(os.open(one, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            case 1: os.unlink(one)
            case 2: os.rename(one, two)
            case 3: os.link(one, two)
            case 4: os.mkdir(one)
            case 5: os.rmdir(one)
    except OSError:
        pass
"""


@pytest.mark.slow
def test_both_may_work_in_one_directory(pair: tuple[Mount, Mount], store: Store) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _WORK, str(mount.folder), str(seed)])
        for seed, mount in enumerate((*pair, *pair))
    ]
    assert [process.wait() for process in processes] == [0] * 4
    assert sorted(os.listdir(pair[0].folder)) == sorted(os.listdir(pair[1].folder))
    for mount in pair:
        mount.unmount()
    findings = check(store)
    assert findings.wrong == []
    assert findings.leaked == set()


# --- kill -9 --------------------------------------------------------------------------------------------------


def test_a_killed_mount_loses_nothing_that_was_synced(mount: Mounter, store: Store) -> None:
    victim = mount(store.name)
    (victim / "closed").write_bytes(b"c" * 300_000)
    descriptor = os.open(victim / "synced", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"s" * 300_000)
    os.fsync(descriptor)
    os.write(descriptor, b"late" * 10)
    victim.kill()
    with pytest.raises(OSError, match="not connected"):
        os.close(descriptor)
    again = mount(store.name)
    assert (again / "closed").read_bytes() == b"c" * 300_000
    assert (again / "synced").read_bytes()[:300_000] == b"s" * 300_000
    (again / "closed").unlink()
    (again / "synced").write_text("goes on")


_BURST = """
import os, random, sys
folder, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
number = 0
while True:
    name = os.path.join(folder, str(number % 50))
    with open(name + ".draft", "wb") as file:
        file.write(b"%d " % number * chance.randrange(1, 30_000))
        file.flush()
        os.fsync(file.fileno())
    os.rename(name + ".draft", name)
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_mount_that_is_killed_in_a_burst_leaves_whole_files(mount: Mounter, store: Store, seed: int) -> None:
    """Each file was written, synced and renamed; each that the program knew of must be there, whole."""
    survivor, victim = mount(store.name, "--cache", "0s"), mount(store.name)
    command = [sys.executable, "-c", _BURST, str(victim.folder), str(seed)]
    count = random.Random(seed).randrange(20, 120)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        for _ in range(count):
            program.stdout.readline()
        victim.kill()
        last = max([count - 1, *(int(line) for line in program.stdout)])
    _check_burst(survivor.folder, last)
    (survivor / "new").write_text("the survivor goes on")
    survivor.unmount()
    findings = check(store)
    assert findings.wrong == []
    assert len(findings.leaked) <= 1, "at most the inode that was being made"


def _check_burst(folder: Path, last: int) -> None:
    for number in range(max(0, last - 49), last + 1):
        name = folder / str(number % 50)
        found = name.read_bytes().split()
        assert len(set(found)) == 1
        assert int(found[0]) in (number, last + 1 if (last + 1) % 50 == number % 50 else number)


_IN_PLACE = """
import os, random, sys
folder, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
files = [os.open(os.path.join(folder, str(number)), os.O_CREAT | os.O_RDWR) for number in range(3)]
fill = 0
while True:
    fill = fill % 255 + 1
    file = chance.randrange(3)
    offset, length = chance.randrange(6 << 20), chance.choice((100, 5000, 70_000, 300_000))
    print("write", file, offset, length, fill, flush=True)
    os.pwrite(files[file], bytes([fill]) * length, offset)
    if chance.random() < 0.3:
        os.fsync(files[file])
        print("synced", file, 0, 0, 0, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_mount_that_is_killed_in_a_burst_has_all_that_was_synced(mount: Mounter, store: Store, seed: int) -> None:
    """Writes in place, all over some files: each byte is as it was synced, or as a later write would have it."""
    survivor, victim = mount(store.name, "--cache", "0s"), mount(store.name)
    command = [sys.executable, "-c", _IN_PLACE, str(victim.folder), str(seed)]
    lines: list[bytes] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        for _ in range(random.Random(seed).randrange(30, 150)):
            lines.append(program.stdout.readline())
        victim.kill()
        lines += program.stdout
    synced = [np.zeros(7 << 20, np.uint8) for _ in range(3)]
    later: list[list[tuple[int, int, int]]] = [[] for _ in range(3)]
    for line in lines:
        what, *numbers = line.split()
        file, offset, length, fill = map(int, numbers)
        if what == b"write":
            later[file].append((offset, offset + length, fill))
            continue
        for start, end, value in later[file]:
            synced[file][start:end] = value
        later[file].clear()
    assert sum(model.any() for model in synced) > 0
    for file in range(3):
        raw = (survivor / str(file)).read_bytes()
        found = np.zeros(7 << 20, np.uint8)
        found[: len(raw)] = np.frombuffer(raw, np.uint8)
        right = found == synced[file]
        for start, end, value in later[file]:
            right[start:end] |= found[start:end] == value
        assert right.all(), f"file {file}, from byte {np.argmin(right)}"
        (survivor / str(file)).write_bytes(b"the survivor goes on")
    survivor.unmount()
    assert check(store).wrong == []
