"""A lease over verbs, with a device in software: the client reaches the memory, and nothing else."""

from __future__ import annotations

import os
import random

import pytest

from memfaas.testing.lease import BareLease

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
