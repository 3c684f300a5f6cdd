"""What a function registers for its device, when, and what it has to do afterwards: nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from memfaas._native import LinkDown
from memfaas.testing.lease import Arrival, BareLease, BareRegion, BareStore, move
from memfaas.units import MIB
from tests.e2e.scene import kill, until
from tests.vm.hostile import FunctionProcess

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]

CHUNK = 64 * MIB
NOISE = random.Random(8).randbytes(1 << 20)


def pinned() -> int:
    """Bytes of this process that devices may reach."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPin:"))


def test_all_is_registered_ahead_while_there_are_clients_and_none_of_it_afterwards() -> None:
    with BareLease("region", 3 * CHUNK + MIB, timeout_s=10) as lease:
        server = lease.server
        assert not server.begin_registering()  # there is nobody
        before = pinned()
        region = lease.region(lease.verbs_link())
        assert CHUNK <= pinned() - before < 2 * CHUNK
        assert server.begin_registering()
        assert not server.begin_registering()  # somebody does it already
        assert [server.register_more() for _ in range(4)] == [True, True, True, False]
        assert pinned() - before > 3 * CHUNK
        assert not server.begin_registering()  # it is done
        region.write(3 * CHUNK, b"the last chunk")
        assert os.pread(lease.data_fd, 14, 4096 + 3 * CHUNK) == b"the last chunk"
        server.close_verbs("it is closed")
        assert pinned() - before < CHUNK  # what is the client's own
        server.open_verbs()
        assert not server.begin_registering()  # nobody came back
        again = lease.region(lease.verbs_link())
        assert server.begin_registering()
        assert again.read(0, 1)
        server.close_verbs("it is closed")
        assert not server.register_more()
        assert not lease.memory.registered()


def test_a_lease_of_100_gib_is_used_as_soon_as_a_small_one() -> None:
    """What nobody reaches is registered in the background."""
    with BareLease("region", 100 << 30, timeout_s=30) as lease:
        before = pinned()
        region = lease.region(lease.verbs_link())
        region.write(99 << 30, b"far away")
        assert region.read(99 << 30, 8) == b"far away"
        assert pinned() - before < 3 * CHUNK


def test_it_ends_when_the_last_client_leaves_and_begins_anew_with_the_next() -> None:
    with BareLease("region", 2 * CHUNK, timeout_s=10) as lease:
        link = lease.verbs_link()
        assert lease.server.begin_registering()
        link.close()
        until(lambda: lease.server.verbs_connections() == 0)
        assert not lease.server.register_more()
        lease.verbs_link()
        link = lease.verbs_link()
        assert lease.server.begin_registering()
        assert lease.server.register_more()


def test_clients_and_closes_come_through_while_it_goes_on() -> None:
    with BareLease("region", 6 * CHUNK, timeout_s=20) as lease:
        region = lease.region(lease.verbs_link())
        assert lease.server.begin_registering()

        def register() -> None:
            while lease.server.register_more():
                pass

        thread = Thread(target=register)
        thread.start()
        region.write(5 * CHUNK, b"8 bytes.")
        lease.server.close_verbs("it is closed")
        thread.join()
        assert not lease.memory.registered()


def test_what_was_only_registered_ahead_is_not_copied_when_the_lease_moves() -> None:
    size = 3 * CHUNK
    with BareLease("region", size, timeout_s=60) as lease:
        region = lease.region(lease.verbs_link())
        assert lease.server.begin_registering()
        while lease.server.register_more():
            pass
        region.write(2 * CHUNK - 4096, NOISE[:4096])
        lease.server.close_verbs("the lease is moving")
        to = Arrival("region", size)
        lease.memory.copy_all()
        sent = lease.memory.copy_written(to.fileno(), 60)
        assert sent <= 2 * CHUNK
        with move(lease.memory, to, rounds=0) as there:
            assert there.region(there.tcp_link()).read(2 * CHUNK - 4096, 4096) == NOISE[:4096]


def of_user(limit: int, script: str) -> str:
    """What a program prints that may lock so many bytes, as users have it; what it raises fails the test.

    A process of its own, as uverbs files serve nobody whose rights have changed since.
    """
    command = 'ulimit -l "$1" && exec setpriv --bounding-set=-ipc_lock "$2" -c "$3"'
    arguments = ["sh", "-c", command, "sh", str(limit >> 10), sys.executable, f"{_IMPORTS}\n{script}"]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=100).stdout


_IMPORTS = """
from memfaas._native import LinkDown, VerbsLink
from memfaas.errors import FabricUnavailable
from memfaas.testing.lease import BareLease, any_device

MIB = 1 << 20

def error_of(kind, do):
    try:
        do()
    except kind as error:
        return error
    raise SystemExit("it is not refused")
"""


def test_a_limit_of_locked_memory_ends_it_and_is_named() -> None:
    told = of_user(
        2 * CHUNK,
        """
with BareLease("region", 256 * MIB, timeout_s=10) as lease:
    region = lease.region(lease.verbs_link())
    assert lease.server.begin_registering()
    print(error_of(FabricUnavailable, lease.server.register_more))
    assert not lease.server.begin_registering()
    region.write(0, b"the first chunk is served on")
    error_of(LinkDown, lambda: region.write(128 * MIB, b"x"))
    print(error_of(FabricUnavailable, lease.verbs_link))
    lease.region(lease.tcp_link()).write(128 * MIB, b"x")
""",
    )
    first, then = told.splitlines()
    assert re.search(r"64 of \d+ MiB are registered.*limit of locked memory \(131072 KiB\)", first)
    assert "limit of locked memory" in then  # so it comes over tcp


def test_a_limit_below_one_chunk_is_named_too() -> None:
    told = of_user(
        8 * MIB,
        """
with BareLease("region", 64 * MIB) as lease:
    address = VerbsLink(any_device(), 5).queue_pair().address
    print(error_of(FabricUnavailable, lambda: lease.server.verbs_end(any_device(), address)))
""",
    )
    assert "limit of locked memory" in told


# --- the function's part in reads ----------------------------------------------------------------------------

KEYS = 200
SINGLE = 20_000
ALL = 100_000
IDLE_S = 3


def test_a_function_has_no_part_in_100_000_gets_and_may_even_be_stopped() -> None:
    with FunctionProcess("shard", 16 * MIB) as function:
        store = BareStore(2 * MIB)
        store._set_link(0, function.link(60))
        items = {b"%d" % number: NOISE[number : number + 100 + 20 * number] for number in range(KEYS)}
        for key, value in items.items():
            store.put(key, value)
        keys = list(items)
        before = function.cpu_ticks()
        for turn in range(SINGLE):
            key = keys[turn % KEYS]
            assert store.get(key) == items[key]
        for _ in range((ALL - SINGLE) // KEYS):  # the rest in batches, which are faster where a CPU is emulated
            assert store.get_many(keys) == list(items.values())
        assert function.cpu_ticks() - before <= 1
        os.kill(function.pid, signal.SIGSTOP)
        try:
            for key, value in items.items():
                assert store.get(key) == value
            assert store.get_many([*keys, b"absent"]) == [*items.values(), None]
            assert b"absent" not in store
        finally:
            os.kill(function.pid, signal.SIGCONT)
        store.put(keys[0], b"new")
        assert store.get(keys[0]) == b"new"


def test_a_stopped_function_of_another_process_serves_regions() -> None:
    with FunctionProcess("region", 70 * MIB) as function, BareLease("region", MIB, timeout_s=30) as lease:
        region = lease.region(lease.verbs_link())
        region._set_link(function.link(30))
        region.write(0, NOISE)
        assert region.fetch_add(0, 0) == int.from_bytes(NOISE[:8], "little")
        os.kill(function.pid, signal.SIGSTOP)
        try:
            assert region.read(0, len(NOISE)) == NOISE
            region.write(100, b"written")
            assert region.read(100, 7) == b"written"
            assert region.fetch_add(0, 1) == int.from_bytes(NOISE[:8], "little")
        finally:
            os.kill(function.pid, signal.SIGCONT)


def test_a_function_whose_clients_are_idle_uses_no_processor() -> None:
    with FunctionProcess("shard", 16 * MIB) as function:
        links = [function.link(30) for _ in range(20)]
        store = BareStore(2 * MIB)
        store._set_link(0, links[0])
        store.put(b"k", b"v")
        before = function.cpu_ticks()
        time.sleep(IDLE_S)
        assert function.cpu_ticks() - before <= 1
        assert store.get(b"k") == b"v"


def test_a_read_of_a_function_that_is_killed_meanwhile_ends_with_an_error() -> None:
    with FunctionProcess("region", 70 * MIB) as function:
        region = BareRegion(70 * MIB)
        region._set_link(function.link(20))
        content = NOISE * 16
        region.write(0, content)
        rounds = 0

        def read() -> None:
            nonlocal rounds
            while True:
                assert region.read(0, len(content)) == content
                rounds += 1

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(read)
            until(lambda: rounds > 2 or done.done())
            kill(function.pid)
            with pytest.raises(LinkDown):
                done.result()
