"""Memory that is no memory of ours is refused, memory that is taken away is an exception, and a
forked child cannot use what is its parent's.

What may end a process runs in one of its own.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from memfaas._native import (
    BROKEN,
    MIN_SHARD,
    REVOKED,
    LinkDown,
    Memory,
    ShmLink,
    format_memory,
    geometry,
    part_size,
)
from memfaas.errors import ProtocolError, UsageError
from memfaas.testing import fsck
from memfaas.testing.lease import BareLease, BareStore, Fabric, Kind, make_memory

HEADER = 120
FREE = [*range(16, 64)]
"""Bytes of the header that may be anything: lease, store, epoch, shard."""
SIZE_AT = 64
MIB = 1 << 20
LIMIT_S = 60
"""For what a test waits for: far more than it takes, so that only a hang is a failure."""

PREAMBLE = """
import faulthandler, os, signal, sys, threading
from memfaas._native import *
from memfaas.testing.lease import *
"""


@pytest.fixture(params=["shard", "region"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture(name="lease")
def shard_lease() -> Iterator[BareLease]:
    with BareLease("shard", MIN_SHARD) as lease:
        yield lease


def run(script: str, *arguments: object, descriptors: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own; the arguments are in sys.argv."""
    return subprocess.run(
        [sys.executable, "-P", "-c", PREAMBLE + script, *map(str, arguments)],
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


# --- what is mapped -------------------------------------------------------------------------------


def unsealed(kind: Kind, size: int) -> tuple[int, int]:
    descriptors = (os.memfd_create("memfaas-test-data"), os.memfd_create("memfaas-test-control"))
    for descriptor, length in zip(descriptors, geometry(kind, size), strict=True):
        os.ftruncate(descriptor, length)
    format_memory(*descriptors, kind=kind, size=size, lease=b"L" * 16, store=b"S" * 16, shard=3, epoch=4)
    return descriptors


def assert_refused(data: int, control: int) -> None:
    with pytest.raises(ValueError, match="do not hold a memory"):
        Memory(data, control)
    with pytest.raises(ProtocolError):
        ShmLink(data, control, 1, 1.0)


headers = st.one_of(
    st.binary(min_size=HEADER, max_size=HEADER),
    st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.integers(8, 14).map(lambda word: word * 8), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=3
    ),
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=headers)
@example(change=[(8, 0)])
@example(change=[(12, 3)])
def test_a_first_page_that_is_not_right_is_refused(
    kind: Kind, change: bytes | list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, control = unsealed(kind, 5 * MIB)
    try:
        right = os.pread(data, HEADER, 0)
        page = bytearray(change) if isinstance(change, bytes) else bytearray(right)
        for at, value in () if isinstance(change, bytes) else change:
            size = 1 if value < 256 and at % 8 else 8
            page[at : at + size] = value.to_bytes(size, "little")
        del page[HEADER:]
        assume(kind == "shard" or page[SIZE_AT : SIZE_AT + 8] == right[SIZE_AT : SIZE_AT + 8])  # another size may fit
        os.pwrite(data, page, 0)
        if all(page[at] == right[at] for at in range(HEADER) if at not in FREE):
            Memory(data, control).close()
        else:
            assert_refused(data, control)
    finally:
        os.close(data)
        os.close(control)


@pytest.mark.parametrize("which", ["data", "control"])
@pytest.mark.parametrize("delta", [-(2 * MIB), -4096, -1, 1, 4096, 1 << 40])
def test_files_of_another_size_are_refused(kind: Kind, which: str, delta: int) -> None:
    data, control = unsealed(kind, 5 * MIB)
    changed = data if which == "data" else control
    os.ftruncate(changed, max(os.fstat(changed).st_size + delta, 0))
    assert_refused(data, control)
    os.close(data)
    os.close(control)


def test_a_header_that_fits_no_file_is_refused(kind: Kind) -> None:
    """All that it says is consistent, but the file is smaller."""
    small, control = unsealed(kind, 5 * MIB)
    large, large_control = unsealed(kind, 64 * MIB)
    os.pwrite(small, os.pread(large, HEADER, 0), 0)
    assert_refused(small, control)
    assert_refused(small, large_control)
    for descriptor in (small, control, large, large_control):
        os.close(descriptor)


def test_descriptors_of_something_else_are_refused(kind: Kind) -> None:
    data, control = unsealed(kind, 5 * MIB)
    reader, writer = os.pipe()
    empty = os.memfd_create("memfaas-test-empty")
    with tempfile.TemporaryFile() as file:
        file.write(b"text" * 10000)
        file.flush()
        for wrong in ((control, data), (data, data), (control, control), (data, empty), (empty, control),
                      (data, file.fileno()), (file.fileno(), control)):  # fmt: skip
            assert_refused(*wrong)
    for pair in ((reader, control), (data, reader), (-1, control), (data, -1)):
        with pytest.raises((ValueError, OSError)):
            Memory(*pair)
    for descriptor in (data, control, reader, writer, empty):
        os.close(descriptor)


def test_a_control_memory_of_another_format_is_refused(kind: Kind) -> None:
    data, control = unsealed(kind, 5 * MIB)
    os.pwrite(control, b"\xff", 8)
    assert_refused(data, control)
    os.close(data)
    os.close(control)


def test_only_memory_of_the_right_size_is_formatted(kind: Kind) -> None:
    data, control = unsealed(kind, 5 * MIB)
    for changed in (data, control):
        size = os.fstat(changed).st_size
        for wrong in (0, size - 1, size + 4096):
            os.ftruncate(changed, wrong)
            with pytest.raises(OSError, match="Invalid argument"):
                format_memory(
                    data, control, kind=kind, size=5 * MIB, lease=b"L" * 16, store=b"S" * 16, shard=0, epoch=1
                )
        os.ftruncate(changed, size)
    for names in (("", "S" * 16), ("L" * 16, "S" * 17)):
        lease, store = (name.encode() for name in names)
        with pytest.raises(UsageError):
            format_memory(data, control, kind=kind, size=5 * MIB, lease=lease, store=store, shard=0, epoch=1)
    os.close(data)
    os.close(control)


def test_the_sizes_add_up(kind: Kind) -> None:
    for size in (0, 1, MIN_SHARD, MIN_SHARD + 1, 100 * MIB, 100 << 30):
        data, control = geometry(kind, size)
        assert data % (2 * MIB) == 0
        assert data >= size
        assert control < data / 10 + MIB
    assert part_size(MIN_SHARD) == MIN_SHARD // 8
    assert part_size(1 << 40) == 16 * MIB


def test_what_was_formatted_can_be_read_back(kind: Kind) -> None:
    data, control = unsealed(kind, 5 * MIB)
    memory = Memory(data, control)
    assert (memory.kind, memory.lease, memory.epoch) == (kind, b"L" * 16, 4)
    assert memory.size == 5 * MIB
    assert memory.data_bytes == os.fstat(data).st_size
    memory.close()
    for use in (memory.stats, memory.participants, memory.revoke, lambda: memory.attach(1, 1)):
        with pytest.raises(ValueError, match="closed"):
            use()
    os.close(data)
    os.close(control)


# --- populating ------------------------------------------------------------------------------------


def test_populated_memory_is_there_before_it_is_touched(lease: BareLease) -> None:
    total = lease.memory.data_bytes
    assert os.fstat(lease.data_fd).st_blocks * 512 < total // 2
    done = 0
    while done < total:
        more = lease.memory.populate(MIB)
        assert done < more <= done + MIB
        done = more
    assert os.fstat(lease.data_fd).st_blocks * 512 >= total
    assert lease.memory.populate(MIB) == total


def test_memory_that_may_not_be_locked_is_populated_all_the_same() -> None:
    data, control = make_memory("shard", MIN_SHARD)
    done = run(
        """
import resource
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.getuid() == 0:
    os.setuid(65534)  # root may lock what it likes
memory = Memory(int(sys.argv[1]), int(sys.argv[2]))
try:
    memory.populate(1 << 20)
except PermissionError as error:
    print("RLIMIT_MEMLOCK" in str(error))
print(memory.populate(1 << 30) == memory.data_bytes)
""",
        data,
        control,
        descriptors=(data, control),
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert os.fstat(data).st_blocks * 512 >= os.fstat(data).st_size
    os.close(data)
    os.close(control)


# --- participants ----------------------------------------------------------------------------------


def test_places_for_participants_are_limited_and_come_back(lease: BareLease) -> None:
    numbers = [lease.memory.attach(pid, 7) for pid in range(1023)]
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        lease.memory.attach(1023, 7)
    assert lease.memory.participants() == [(number, pid, 7) for pid, number in enumerate(numbers)]
    assert lease.memory.stats()["participants"] == len(numbers) == 1023
    for number in numbers[10:20]:
        lease.memory.reap(number)
    assert sorted(lease.memory.attach(1, 1) for _ in range(10)) == numbers[10:20]
    for number in numbers:
        lease.memory.reap(number)
    assert lease.memory.put_right(LIMIT_S)
    assert lease.memory.participants() == []
    for wrong in (1024, 65535, 1 << 31):
        with pytest.raises(ValueError, match="participant"):
            lease.memory.reap(wrong)
        with pytest.raises(ProtocolError):
            ShmLink(lease.data_fd, lease.control_fd, wrong, 1.0)


# --- memory that is taken away -------------------------------------------------------------------------


def reason_of(use: Callable[[], object]) -> int:
    with pytest.raises(LinkDown) as caught:
        use()
    reason: int = caught.value.args[0]
    return reason


def all_uses(store: BareStore) -> list[Callable[[], object]]:
    value = bytes(200_000)
    return [
        lambda: store.get(b"small"), lambda: store.get(b"large"), lambda: store.get(b"absent"),
        lambda: store.get_into(b"large", bytearray(300_000)), lambda: b"small" in store,
        lambda: store.put(b"small", b"v"), lambda: store.put(b"large", value), lambda: store.put(b"new", value),
        lambda: store.delete(b"small"), lambda: store.delete(b"absent"), lambda: store.scan(0),
        lambda: store.get_many([b"small", b"large"]), lambda: store.put_many({b"a": b"1", b"b": b"2"}),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [False, True], ids=["kept", "cut"])
def test_every_operation_on_revoked_memory_says_so(lease: BareLease, fabric: Fabric, cut: bool) -> None:
    store = lease.store(lease.link(fabric))
    store.put(b"small", b"v")
    store.put(b"large", bytes(200_000))
    lease.memory.revoke()
    if cut:
        os.ftruncate(lease.data_fd, 0)
    for use in all_uses(store):
        assert reason_of(use) == REVOKED
    lease.hang_up()
    assert fsck.held(lease.control_fd, "shard", MIN_SHARD) == {}


def test_memory_that_is_cut_without_a_word_is_revoked_too(lease: BareLease, fabric: Fabric) -> None:
    """As a hostile client of the same lease could do."""
    store = lease.store(lease.link(fabric))
    store.put(b"small", b"v")
    store.put(b"large", bytes(200_000))
    os.ftruncate(lease.data_fd, 0)
    for use in all_uses(store):
        assert reason_of(use) in ((REVOKED,) if fabric == "shm" else (REVOKED, BROKEN))
        if fabric == "tcp":
            store._set_link(0, lease.tcp_link())
    lease.hang_up()
    assert fsck.held(lease.control_fd, "shard", MIN_SHARD) == {}


@pytest.mark.parametrize("cut", [False, True], ids=["kept", "cut"])
def test_every_operation_on_a_revoked_region_says_so(fabric: Fabric, cut: bool) -> None:
    with BareLease("region", 5 * MIB) as lease:
        region = lease.region(lease.link(fabric))
        region.write(0, b"before")
        lease.memory.revoke()
        if cut:
            os.ftruncate(lease.data_fd, 0)
        uses: list[Callable[[], Any]] = [
            lambda: region.read(0, MIB), lambda: region.write(0, bytes(MIB)), lambda: region.fetch_add(0, 1),
            lambda: region.compare_swap(0, 0, 1), lambda: region.read_into(0, bytearray(5)),
        ]  # fmt: skip
        for use in uses:
            assert reason_of(use) == REVOKED


RACE = """
data, control, first, seed = map(int, sys.argv[1:])
import random

def work(number):
    random_ = random.Random(seed * 100 + number)
    store = BareStore(part)
    store._set_link(0, ShmLink(data, control, first + number, 30.0))
    values = [bytes(n) for n in (10, 1000, 60_000, 100_000, 500_000)]
    buffer = bytearray(500_000)
    while True:
        key = b"%d" % random_.randrange(8)
        try:
            use = random_.randrange(4)
            if use == 0:
                store.put(key, random_.choice(values))
            elif use == 1:
                store.delete(key)
            elif use == 2:
                store.get(key)
            else:
                store.get_into(key, buffer)
        except LinkDown as down:
            reasons.add(down.args[0])
            return
        except KeyError:
            pass

memory = Memory(data, control)
part = memory.part_size
reasons = set()
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
print("ready", flush=True)
for thread in threads:
    thread.join()
try:
    memory.stats()
except OSError:
    print(*reasons)
"""


def use_until_it_is_down(store: BareStore, choose: random.Random, reasons: set[int]) -> None:
    while True:
        key = b"%d" % choose.randrange(8)
        try:
            if choose.randrange(2):
                store.put(key, bytes(choose.choice((10, 60_000, 500_000))))
            else:
                store.get(key)
        except LinkDown as down:
            reasons.add(down.args[0])
            return
        except KeyError:
            pass


@pytest.fixture
def roomy() -> Iterator[BareLease]:
    with BareLease("shard", 32 * MIB) as lease:
        yield lease


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False], ids=["revoked", "cut-only"])
@pytest.mark.parametrize("seed", range(4))
def test_memory_can_be_cut_under_running_operations(roomy: BareLease, told: bool, seed: int) -> None:
    """Threads of two processes and tcp clients are at work; none of them dies, all learn the reason."""
    lease = roomy
    choose = random.Random(seed)
    processes = []
    for number in range(2):
        numbers = [lease.memory.attach(os.getpid(), 1) for _ in range(3)]
        assert numbers == list(range(numbers[0], numbers[0] + 3))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-P", "-c", PREAMBLE + RACE,
                 *map(str, (lease.data_fd, lease.control_fd, numbers[0], seed * 2 + number))],
                pass_fds=(lease.data_fd, lease.control_fd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    reasons: set[int] = set()
    threads = [
        threading.Thread(
            target=use_until_it_is_down, args=(lease.store(lease.tcp_link()), random.Random(number), reasons)
        )
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    epoch = lease.memory.stats()["keys"]
    while choose.random() < 0.999:  # some thousand looks at it: long enough for all to be at work
        epoch += lease.memory.stats()["keys"]
    if told:
        lease.memory.revoke()
    os.ftruncate(lease.data_fd, 0)
    for process in processes:
        output, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, errors
        assert output.split() == [str(REVOKED)]
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert reasons <= {REVOKED, BROKEN}
    lease.hang_up()
    assert fsck.held(lease.control_fd, "shard", 32 * MIB) == {}


# --- other faults ------------------------------------------------------------------------------------

FAULTS = {
    "a foreign mapping": """
import mmap
file = os.memfd_create("memfaas-test-foreign")
os.ftruncate(file, 4096)
mapping = mmap.mmap(file, 4096)
os.ftruncate(file, 0)
mapping[0]
""",
    "a signal": "os.kill(os.getpid(), signal.SIGBUS)\n",
}


@pytest.mark.parametrize("handlers", ["none", "before", "after", "between"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bus_error_that_is_not_ours_ends_the_process(fault: str, handlers: str) -> None:
    script = {
        "none": "a = BareLease('shard', 1)\n",
        "before": "faulthandler.enable()\na = BareLease('shard', 1)\n",
        "after": "a = BareLease('shard', 1)\nfaulthandler.enable()\n",
        "between": "a = BareLease('shard', 1)\nfaulthandler.enable()\nb = BareLease('shard', 1)\n",
    }[handlers]
    done = run(script + FAULTS[fault] + "print('went on')\n")
    assert done.stdout == ""
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error" in done.stderr) == (handlers != "none")


def test_our_guard_stands_after_somebody_else_asked_for_the_signal() -> None:
    """It is put up again with each mapping."""
    done = run("""
a = BareLease("shard", 1)
faulthandler.enable()
b = BareLease("shard", 1)
for lease in (a, b):
    store = lease.store(lease.shm_link())
    store.put(b"k", bytes(100_000))
    os.ftruncate(lease.data_fd, 0)
    try:
        store.get(b"k")
    except LinkDown as down:
        print(down.args[0])
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(REVOKED)] * 2


# --- fork ---------------------------------------------------------------------------------------------


def test_a_forked_child_cannot_use_its_parents_links_but_can_open_its_own() -> None:
    done = run("""
lease = BareLease("shard", 1)
links = [lease.shm_link(), lease.tcp_link(connections=2)]
stores = [lease.store(link) for link in links]
stores[0].put(b"k", b"parent's")
own = lease.memory.attach(1, 1)
child = os.fork()
if child == 0:
    for store, link in zip(stores, links):
        uses = [lambda: store.get(b"k"), lambda: store.put(b"k", b"child's"), lambda: store.delete(b"k"),
                lambda: b"k" in store, lambda: store.scan(0), lambda: store.get_many([b"k"]), link.stats,
                lambda: store.put_many({b"k": b"child's"}), lambda: store.get_into(b"k", bytearray(10))]
        for use in uses:
            try:
                use()
                print("used")
            except LinkDown as down:
                assert down.args[0] == STALE, down
    stores[0]._set_link(0, ShmLink(lease.data_fd, lease.control_fd, own, 5.0))
    assert stores[0].get(b"k") == b"parent's"
    stores[0].put(b"c", b"child's")
    links.clear(), stores.clear()
    os._exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
print(*[store.get(key).decode() for store in stores for key in ("k", "c")])
""")
    assert done.stdout.split("\n") == ["7", "parent's child's parent's child's", ""], done.stderr


@pytest.mark.slow
def test_a_fork_while_threads_use_a_link_leaves_the_child_free_to_drop_it() -> None:
    """Whatever lock a thread of the parent held at that moment, the child does not wait for it."""
    done = run("""
lease = BareLease("shard", 1)
links = [lease.tcp_link(connections=2), lease.shm_link()]
stores = [lease.store(link) for link in links]
stop = threading.Event()
def work(store):
    while not stop.is_set():
        store.put(b"k", b"v")
        store.get(b"k")
threads = [threading.Thread(target=work, args=(store,)) for store in stores * 2]
for thread in threads:
    thread.start()
for _ in range(150):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for link in links:
            link.close()
        links.clear(), stores.clear(), threads.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
lease.hang_up()
print("done")
""")
    assert done.stdout == "done\n", done.stderr
