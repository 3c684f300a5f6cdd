"""A lease over verbs, with a device in software: the client reaches the memory, and nothing else."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from threading import Thread

import pytest

from memfaas._native import BROKEN, LinkDown, VerbsLink
from memfaas.errors import FabricUnavailable, ProtocolError
from memfaas.testing.lease import Arrival, BareLease, any_device, move, tcp_pair
from tests.e2e.scene import until

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]

NOISE = random.Random(5).randbytes(20 << 20)


def test_a_region_has_its_four_operations() -> None:
    size = 70 << 20  # two chunks
    with BareLease("region", size, timeout_s=10) as lease:
        region, other = lease.region(lease.verbs_link()), lease.region(lease.tcp_link())
        for offset, length in ((0, 1), (5, 4096), ((64 << 20) - 4100, 8200), (size - 3_000_000, 3_000_000)):
            data = os.urandom(length)
            region.write(offset, data)
            assert other.read(offset, length) == data
            assert region.read(offset, length) == data
        other.write(8, (7).to_bytes(8, "little"))
        assert region.fetch_add(8, 5) == 7
        assert region.compare_swap(8, 12, 1 << 63) == 12
        assert region.compare_swap(8, 12, 0) == 1 << 63
        assert other.read(8, 8) == (1 << 63).to_bytes(8, "little")


def test_a_store_gets_what_any_fabric_put() -> None:
    with BareLease("shard", 150 << 20, timeout_s=10) as lease:
        stores = [lease.store(link) for link in (lease.verbs_link(), lease.tcp_link(), lease.shm_link())]
        for size in (0, 1, 100, 900, 4096, 60_000, 65_000, 100_000, 300_000, 1 << 20, (4 << 20) + 17, 16 << 20):
            for number, writer in enumerate(stores):
                key, value = b"%d-%d" % (size, number), NOISE[number : number + size]
                writer.put(key, value)
                for reader in stores:
                    assert reader.get(key) == value
            for number, writer in enumerate(stores):
                key = b"%d-%d" % (size, number)
                assert stores[number - 1].delete(key)
                assert all(key not in reader for reader in stores)
                assert not writer.delete(key)
        assert stores[0].scan(0) == {}


def test_a_batch_gets_and_puts_what_single_operations_do() -> None:
    with BareLease("shard", 64 << 20, timeout_s=10) as lease:
        store, other = lease.store(lease.verbs_link()), lease.store(lease.tcp_link())
        items = {b"%d" % number: NOISE[number : number + number * number % 40_000] for number in range(300)}
        items[b""] = b"no key"
        store.put_many(items)
        assert {key: other.get(key) for key in items} == items
        large = NOISE[: 1 << 20]
        other.put(b"7", large)
        items[b"7"] = large
        for _ in range(2):  # the second time their places are known
            assert store.get_many([*items, b"absent"]) == [*items.values(), None]


# --- revocation -------------------------------------------------------------------------------------------


def test_what_is_closed_is_reached_by_nobody_and_says_why() -> None:
    with BareLease("shard", 16 << 20, timeout_s=10) as lease:
        store = lease.store(lease.verbs_link())
        store.put(b"k", NOISE[: 1 << 20])
        assert lease.memory.registered()
        assert lease.server.verbs_connections() == 1
        lease.server.close_verbs("the lease is moving")
        assert not lease.memory.registered()
        assert lease.server.verbs_connections() == 0
        with pytest.raises(LinkDown, match=str(BROKEN)):
            store.get(b"k")
        with pytest.raises(FabricUnavailable, match="the lease is moving"):
            lease.verbs_link()
        lease.server.open_verbs()
        assert lease.store(lease.verbs_link()).get(b"k") == NOISE[: 1 << 20]


def test_memory_that_was_given_back_is_not_registered() -> None:
    with BareLease("shard", 16 << 20, timeout_s=10) as lease:
        lease.memory.punch(lease.data_fd, 4 << 20, 1)
        with pytest.raises(FabricUnavailable, match="given back"):
            lease.verbs_link()
        lease.memory.unpunch()
        lease.store(lease.verbs_link()).put(b"k", b"v")


def test_what_devices_wrote_moves_along() -> None:
    with BareLease("region", 3 << 20, timeout_s=10) as lease, BareLease("shard", 16 << 20, timeout_s=10) as shard:
        lease.region(lease.verbs_link()).write(1 << 20, NOISE[: 1 << 20])
        shard.store(shard.verbs_link()).put(b"k", NOISE[: 1 << 20])
        for one in (lease, shard):
            one.server.close_verbs("the lease is moving")
        with move(lease.memory, Arrival("region", 3 << 20)) as there:
            assert there.region(there.verbs_link()).read(1 << 20, 1 << 20) == NOISE[: 1 << 20]
        with move(shard.memory, Arrival("shard", 16 << 20)) as there:
            assert there.store(there.verbs_link()).get(b"k") == NOISE[: 1 << 20]


# --- tenants ----------------------------------------------------------------------------------------------

WELCOME = struct.Struct("<32s5Q2I")
"""Address, generation, kind, size, data, landing area, key of that, key of the first chunk."""


def forged(lease: BareLease, **wrong: int) -> None:
    """Connects as if the function had said something else, and reads where that says the memory is."""
    link = VerbsLink(any_device(), 5)
    pair = link.queue_pair()
    end = lease.server.verbs_end(any_device(), pair.address)
    near, far = tcp_pair()
    lease.server.serve(far.detach(), end)
    names = ("address", "generation", "kind", "size", "data", "landing", "landing_key", "first_key")
    said = dict(zip(names, WELCOME.unpack(end.welcome), strict=True)) | wrong
    with near:
        link.add(near.fileno(), pair, WELCOME.pack(*(said[name] for name in names)), 5)
        near.detach()


def place_of(lease: BareLease) -> dict[str, int]:
    link = VerbsLink(any_device(), 5)
    end = lease.server.verbs_end(any_device(), link.queue_pair().address)
    *_, data, _, _, key = WELCOME.unpack(end.welcome)
    return {"data": data, "first_key": key}


def test_a_client_reaches_its_own_lease_and_nothing_else() -> None:
    with BareLease("region", 1 << 20) as lease, BareLease("region", 1 << 20) as other:
        mine, theirs = place_of(lease), place_of(other)
        forged(lease, **mine)  # nothing is wrong about it
        for wrong in (
            {"first_key": mine["first_key"] ^ 1},
            {"data": mine["data"] - 4096},
            {"data": mine["data"] + (2 << 20) - 8},
            theirs,
            {"data": theirs["data"]},
            {"first_key": theirs["first_key"]},
        ):
            with pytest.raises(FabricUnavailable, match="does not answer"):
                forged(lease, **wrong)
        other.server.close_verbs("it is over")
        with pytest.raises(FabricUnavailable):
            forged(lease, **theirs)


def test_addresses_that_make_no_sense_are_refused() -> None:
    with BareLease("region", 1 << 20) as lease:
        good = VerbsLink(any_device(), 5).queue_pair().address
        for address in (b"", good[:-1], bytes(32), b"\xff" * 32):
            with pytest.raises((FabricUnavailable, ProtocolError)):
                lease.server.verbs_end(any_device(), address)
        chance = random.Random(3)
        for _ in range(100):
            broken = bytearray(good)
            broken[chance.randrange(32)] ^= 1 << chance.randrange(8)
            try:
                lease.server.verbs_end(any_device(), bytes(broken))
            except (FabricUnavailable, ProtocolError):
                pass
        assert lease.server.verbs_connections() == 0
        lease.region(lease.verbs_link()).write(0, b"it goes on")


# --- atomics of one side ----------------------------------------------------------------------------------


def test_words_are_changed_by_one_side_only() -> None:
    with BareLease("region", 4096, timeout_s=10) as lease:
        link = lease.verbs_link()
        near, far = lease.region(lease.tcp_link()), lease.region(link)
        assert far.fetch_add(0, 1) == 0
        with pytest.raises(FabricUnavailable, match="over verbs"):
            near.fetch_add(0, 1)
        with pytest.raises(FabricUnavailable, match="over verbs"):
            lease.region(lease.shm_link()).compare_swap(0, 1, 2)
        assert near.read(0, 8) == (1).to_bytes(8, "little")
        link.close()
        until(lambda: lease.server.verbs_connections() == 0)
        assert near.fetch_add(0, 1) == 1
        far = lease.region(lease.verbs_link())  # the CPUs have them now: the function does it
        assert far.fetch_add(0, 1) == 2
        assert lease.region(lease.shm_link()).fetch_add(0, 1) == 3


def test_threads_count_together() -> None:
    with BareLease("region", 4096, timeout_s=30) as lease:
        regions = [lease.region(lease.verbs_link()) for _ in range(4)]
        threads = [Thread(target=lambda one: [one.fetch_add(8, 1) for _ in range(100)], args=(one,)) for one in regions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert regions[0].fetch_add(8, 0) == 400


# --- leaks ------------------------------------------------------------------------------------------------

CYCLES = 1000


def resources() -> tuple[int, str]:
    """Descriptors of this process, which has both ends; and what all hold of devices: queue pairs, memory, ..."""
    told = subprocess.run(["rdma", "resource"], capture_output=True, text=True, check=True).stdout
    return len(os.listdir("/proc/self/fd")), told


def test_links_leave_nothing_behind() -> None:
    with BareLease("region", 4096, timeout_s=10) as lease:
        lease.region(lease.verbs_link()).write(0, b"kept")
        until(lambda: lease.server.connections() == 0)
        before = resources()
        for _ in range(CYCLES):
            assert lease.region(lease.verbs_link()).read(0, 4) == b"kept"
        until(lambda: lease.server.connections() == 0)
        assert resources() == before
