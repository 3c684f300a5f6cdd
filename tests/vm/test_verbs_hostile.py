"""Clients over verbs that keep no rules: the function goes on, for the others, and gives nothing away."""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Thread

import pytest

from memfaas._native import LinkDown, VerbsLink
from memfaas.errors import FabricUnavailable, MemfaasError
from memfaas.testing import fsck
from memfaas.testing.lease import BareLease, BareStore, any_device
from tests.e2e.scene import until
from tests.vm.hostile import ADD, COMMIT, DELETE, PUT, RESERVE, SEND, WRITE, WRITE_WITH_NUMBER, Hostile, request

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]

NOISE = random.Random(7).randbytes(4 << 20)
SLOTS = 40
"""Messages that a function waits for at the same time."""
LANDING = 384 << 10
PLACES = 256
PAGE = 4096


@pytest.fixture
def lease() -> Iterator[BareLease]:
    with BareLease("shard", 16 << 20, timeout_s=30) as lease:
        yield lease


def goes_on(lease: BareLease) -> None:
    """It serves others, nobody else is there any more, and nothing of the shard is held or lost."""
    until(lambda: lease.server.verbs_connections() == 0)
    store = lease.store(lease.verbs_link())
    store.put(b"it", b"goes on")
    assert store.get(b"it") == b"goes on"
    store.delete(b"it")
    store._set_link(0, None)
    until(lambda: lease.server.connections() == 0)
    assert fsck.faults(lease.data_fd, lease.control_fd) == {}


# --- messages ---------------------------------------------------------------------------------------------


def test_random_messages_end_their_own_connection_at_most(lease: BareLease) -> None:
    chance = random.Random(1)
    lengths = [0, 1, 77, 1024, 65536, 65537, 300_000, LANDING, LANDING + 1, 16 << 20, 1 << 31, (1 << 32) - 1]
    for _ in range(60):
        with Hostile(lease) as client:
            client.expect_replies(SLOTS)
            to = client.welcome.landing + chance.randrange(LANDING - 4096)
            client.post(WRITE, chance.randbytes(4096), to=to, key=client.welcome.landing_key)
            for number in range(1, chance.randrange(2, 6)):
                message = request(
                    chance.choice([PUT, DELETE, RESERVE, COMMIT, chance.randrange(256)]),
                    chance.randbytes(chance.choice([0, 0, 1, 500, 976, 2000])),
                    key=chance.choice(lengths),
                    meta=chance.choice([0, 0, *lengths]),
                    landing=chance.choice([0, *lengths]),
                    value=chance.choice(lengths),
                    number=number,
                )
                client.post(SEND, message[: chance.choice([0, 47, 48, len(message)])])
            client.wait()
    goes_on(lease)


def test_a_write_with_a_number_is_not_taken_for_the_message_that_was_in_the_slot_before(lease: BareLease) -> None:
    other = lease.store(lease.tcp_link())
    with Hostile(lease) as client:
        for number in range(1, SLOTS + 1):
            assert client.ask(request(DELETE, b"k", key=1, number=number))
        other.put(b"k", b"there again")
        client.post(
            WRITE_WITH_NUMBER,
            length=len(request(DELETE, b"k")),
            to=client.welcome.landing,
            key=client.welcome.landing_key,
        )
        until(lambda: lease.server.verbs_connections() == 0)
        assert other.get(b"k") == b"there again"
    other._set_link(0, None)
    goes_on(lease)


def test_one_that_takes_no_answers_holds_up_nobody(lease: BareLease) -> None:
    other = lease.store(lease.verbs_link())
    with Hostile(lease) as client:
        for number in range(1, 300):
            client.post(SEND, request(DELETE, b"k", key=1, number=number))
        for number in range(50):
            other.put(b"%d" % number, b"value")
            assert other.get(b"%d" % number) == b"value"
    other._set_link(0, None)
    goes_on(lease)


def test_those_who_never_stop_hold_up_neither_others_nor_a_close(lease: BareLease) -> None:
    over = Event()

    def flood(client: Hostile) -> None:
        number = 0
        with suppress(AssertionError):  # it is cut off
            while not over.is_set():
                number += 1
                client.expect_replies(1)
                client.post(SEND, request(DELETE, b"k", key=1, number=number))
                while number > SLOTS / 2 and client.wait() != (0, True):
                    pass

    clients = [Hostile(lease) for _ in range(3)]
    threads = [Thread(target=flood, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        other = lease.store(lease.verbs_link())
        for number in range(20):
            other.put(b"%d" % number, b"value")
            assert other.get(b"%d" % number) == b"value"
        lease.server.close_verbs("it is closed")
        assert lease.server.verbs_connections() == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
    lease.server.open_verbs()
    other._set_link(0, None)
    goes_on(lease)


# --- what is held --------------------------------------------------------------------------------------------


def free_spans(lease: BareLease) -> int:
    return lease.memory.stats()["free_spans"]


def test_what_was_reserved_is_free_again_when_its_client_leaves_or_stalls(lease: BareLease) -> None:
    before = free_spans(lease)
    with Hostile(lease) as client:
        for number in range(1, 4):  # each gives up the one before
            assert client.ask(request(RESERVE, value=2 << 20, number=number))
            assert free_spans(lease) == before - 8
    until(lambda: free_spans(lease) == before)
    with Hostile(lease) as client:
        assert client.ask(request(RESERVE, value=2 << 20))
        until(lambda: free_spans(lease) == before)  # although it is still there
    goes_on(lease)


def test_a_commit_of_what_was_not_reserved_ends_the_connection(lease: BareLease) -> None:
    for reserved, committed in ((0, 1 << 20), (1 << 20, 2 << 20), (1 << 20, (1 << 20) + 1)):
        with Hostile(lease) as client:
            if reserved:
                assert client.ask(request(RESERVE, value=reserved))
            client.post(SEND, request(COMMIT, value=committed, number=2))
            until(lambda: lease.server.verbs_connections() == 0)
    goes_on(lease)


def test_places_are_bounded_and_free_again(lease: BareLease) -> None:
    address = VerbsLink(any_device(), 5).queue_pair().address
    ends = [lease.server.verbs_end(any_device(), address) for _ in range(PLACES)]
    with pytest.raises(FabricUnavailable, match="places are taken"):
        lease.server.verbs_end(any_device(), address)
    ends.pop()
    ends.append(lease.server.verbs_end(any_device(), address))
    ends.clear()
    goes_on(lease)


def test_a_thousand_that_come_and_leave_leave_nothing_behind(lease: BareLease) -> None:
    address = VerbsLink(any_device(), 5).queue_pair().address
    goes_on(lease)

    def resources() -> tuple[int, str]:
        told = subprocess.run(["rdma", "resource"], capture_output=True, text=True, check=True).stdout
        return len(os.listdir("/proc/self/fd")), told

    before = resources()
    for _ in range(1000):
        lease.server.verbs_end(any_device(), address)
    assert resources() == before
    goes_on(lease)


_STRIPES, _STRIPE, _COUNT = 192, 64, 256
_PARTICIPANT = 900
_WAITERS = 1 << 31


def test_a_stopped_client_over_shm_that_holds_locks_holds_up_only_its_keys(lease: BareLease) -> None:
    stopped, other = lease.store(lease.verbs_link()), lease.store(lease.verbs_link())
    other.put(b"k", b"before")
    failures: list[BaseException] = []

    def put() -> None:
        try:
            stopped.put(b"k", b"after")
        except BaseException as error:
            failures.append(error)

    with mmap.mmap(lease.control_fd, os.fstat(lease.control_fd).st_size) as control:
        locks = [_STRIPES + _STRIPE * number for number in range(_COUNT)]
        for at in locks:
            struct.pack_into("<I", control, at, _PARTICIPANT + 1)
        thread = Thread(target=put)
        thread.start()
        until(lambda: any(struct.unpack_from("<I", control, at)[0] & _WAITERS for at in locks))
        time.sleep(0.05)  # if it is the thread of all queue pairs that waits there, nobody gets past it now
        assert lease.store(lease.verbs_link()).get(b"k") == b"before"
        lease.server.verbs_end(any_device(), VerbsLink(any_device(), 5).queue_pair().address)
        assert thread.is_alive()
    lease.memory.reap(_PARTICIPANT)
    thread.join()
    assert failures == []
    assert other.get(b"k") == b"after"


# --- the lease's own memory, which its clients may write ---------------------------------------------------


def use_all(store: BareStore, keys: int) -> None:
    for number in range(keys):
        for use in (store.get, store.delete, lambda key: store.put(key, NOISE[: len(key) * 40_000])):
            with suppress(MemfaasError, LinkDown):
                use(b"%d" % number)
    with suppress(MemfaasError, LinkDown):
        store.scan(0)


def test_an_index_and_heap_of_nonsense_harm_nobody_but_their_owner() -> None:
    chance = random.Random(4)
    with BareLease("shard", 8 << 20, timeout_s=10) as neighbour:
        other = neighbour.store(neighbour.verbs_link())
        other.put(b"k", NOISE[:300_000])
        for round_ in range(8):
            with BareLease("shard", 8 << 20, timeout_s=2) as lease, Hostile(lease) as client:
                store = lease.store(lease.tcp_link())
                for number in range(40):
                    store.put(b"%d" % number, NOISE[number : number + number * number * 90])
                size = os.fstat(lease.data_fd).st_size
                whole = os.pread(lease.data_fd, size, 0)
                heap = size - (8 << 20)
                slots = [whole[at : at + 8] for at in range(PAGE, heap, 8)]
                chance.shuffle(slots)
                index = b"".join(slots) if round_ % 2 else chance.randbytes(heap - PAGE)
                for at in range(0, len(index), 256 << 10):
                    piece = index[at : at + (256 << 10)]
                    assert client.done(WRITE, piece, to=client.welcome.data + PAGE + at, key=client.welcome.first_key)
                for _ in range(300):
                    at = client.welcome.data + chance.choice([chance.randrange(heap), heap + chance.randrange(4 << 20)])
                    assert client.done(WRITE, chance.randbytes(16), to=at, key=client.welcome.first_key)
                use_all(store, 40)
                verbs = lease.store(lease.verbs_link())
                use_all(verbs, 40)
        assert other.get(b"k") == NOISE[:300_000]
        other._set_link(0, None)
        goes_on(neighbour)


def test_devices_refuse_what_is_not_of_the_lease_and_change_nothing() -> None:
    with BareLease("region", 1 << 20) as lease, BareLease("region", 1 << 20) as other:
        with Hostile(other) as there:
            theirs = there.welcome
            assert there.done(WRITE, b"12345678", to=theirs.data + PAGE, key=theirs.first_key)
            size = os.fstat(lease.data_fd).st_size
            for opcode in (WRITE, ADD):
                for change in ("key", "before", "behind", "across", "their key", "all theirs", "their landing area"):
                    if opcode == ADD and change == "across":  # one's own device does not take it
                        continue
                    with Hostile(lease) as client:
                        mine = client.welcome
                        to, key = {
                            "key": (mine.data + PAGE, mine.first_key ^ 1),
                            "before": (mine.data - 8, mine.first_key),
                            "behind": (mine.data + size, mine.first_key),
                            "across": (mine.data + size - 4, mine.first_key),
                            "their key": (mine.data + PAGE, theirs.first_key),
                            "all theirs": (theirs.data + PAGE, theirs.first_key),
                            "their landing area": (theirs.landing, theirs.landing_key),
                        }[change]
                        assert not client.done(opcode, b"8 bytes.", to=to, key=key), change
            with Hostile(lease) as client:
                mine = client.welcome
                assert client.done(WRITE, b"8 bytes.", to=mine.data + PAGE, key=mine.first_key)
                assert not client.done(ADD, b"8 bytes.", to=mine.landing, key=mine.landing_key)
        for lent, expected in ((lease, b"8 bytes."), (other, b"12345678")):
            data = os.pread(lent.data_fd, os.fstat(lent.data_fd).st_size, PAGE)
            assert data == expected + bytes(len(data) - 8)


def test_what_has_ended_is_not_reached_with_keys_that_were_good() -> None:
    with BareLease("region", 1 << 20) as lease, Hostile(lease) as client:
        mine = client.welcome
        assert client.done(WRITE, b"8 bytes.", to=mine.data + PAGE, key=mine.first_key)
        lease.server.close_verbs("the lease is over")
        assert not client.done(WRITE, b"too late", to=mine.data + PAGE, key=mine.first_key)
        assert os.pread(lease.data_fd, 8, PAGE) == b"8 bytes."


# --- ends in the midst of it -----------------------------------------------------------------------------------


def test_a_close_in_the_midst_of_large_puts_loses_none_that_was_acknowledged(lease: BareLease) -> None:
    over = Event()
    acknowledged: dict[bytes, int] = {}

    def put(key: bytes) -> None:
        number = 0
        while not over.is_set():
            with suppress(LinkDown, FabricUnavailable):
                store = lease.store(lease.verbs_link())
                while not over.is_set():
                    number += 1
                    store.put(key, NOISE[number : number + 900_000])
                    acknowledged[key] = number

    keys = [b"one", b"two"]
    threads = [Thread(target=put, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for _ in range(15):
        time.sleep(0.3)
        lease.server.close_verbs("it is closed for a while")
        lease.server.open_verbs()
    until(lambda: len(acknowledged) == 2)
    over.set()
    for thread in threads:
        thread.join()
    store = lease.store(lease.tcp_link())
    for key in keys:
        value, number = store.get(key), acknowledged[key]
        assert value in (NOISE[number : number + 900_000], NOISE[number + 1 : number + 900_001])
        store.delete(key)
    store._set_link(0, None)
    goes_on(lease)
