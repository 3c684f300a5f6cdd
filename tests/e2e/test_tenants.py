"""Two tenants, each with nothing but a key file, on one cluster: neither gets at what is the other's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import memfaas
from memfaas import fabric, messages
from memfaas.addresses import Address, parse_address
from memfaas.client.local import LocalCluster
from memfaas.errors import AccessError, FabricUnavailable, UnknownStore
from memfaas.units import MIB
from tests.e2e.scene import backing_of, functions_of, until

pytestmark = pytest.mark.slow
FABRICS: tuple[fabric.Choice, ...] = ("shm", "tcp")
SECRET = b"secret! " * (MIB // 8)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, str, dict[str, Path]]]:
    """A donor with little memory, the address without the cluster's secret, and each tenant's key file."""
    with LocalCluster(donors=1, memory=64 * MIB) as cluster:
        address = parse_address(cluster.address)
        folder = tmp_path_factory.mktemp("keys")
        keys = {name: folder / f"{name}.key" for name in ("alice", "bob")}
        for name, path in keys.items():
            subprocess.run(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "memfaas.cli",
                    "tenant",
                    f"--secret-file={address.secret_file}",
                    name,
                    str(path),
                ],
                check=True,
                capture_output=True,
            )
        yield cluster, str(Address(address.host, address.port)), keys


class Pair:
    """Both tenants: sessions with nothing but the tenant's key file."""

    def __init__(self, address: str, keys: dict[str, Path]) -> None:
        self._address = address
        self._keys = keys

    def connect(self, name: str, choice: fabric.Choice = "auto") -> memfaas.Session:
        return memfaas.connect(self._address, secret_file=self._keys[name], fabric=choice, timeout=5)


@pytest.fixture
def pair(tenants: tuple[LocalCluster, str, dict[str, Path]]) -> Pair:
    return Pair(*tenants[1:])


@pytest.fixture
def alice(pair: Pair) -> Iterator[memfaas.Session]:
    with pair.connect("alice") as session:
        yield session


@pytest.fixture
def bob(pair: Pair) -> Iterator[memfaas.Session]:
    with pair.connect("bob") as session:
        yield session


def test_a_key_file_is_for_one_tenant(pair: Pair, tenants: tuple[LocalCluster, str, dict[str, Path]]) -> None:
    _, address, keys = tenants
    with pair.connect("alice") as session:
        assert session.tenant == "alice"
    for other in ("bob", "operator"):
        with pytest.raises(AccessError):
            memfaas.connect(address, secret_file=keys["alice"], tenant=other)


def test_two_stores_of_one_name_are_two(alice: memfaas.Session, bob: memfaas.Session) -> None:
    hers, his = (session.store("same", size="8MiB", persistent=True) for session in (alice, bob))
    assert hers.spec.store != his.spec.store
    hers.put("a", b"hers")
    assert "a" not in his
    assert his.keys() == []
    his.put("a", b"his")
    assert not his.delete("b")
    his.clear()
    assert hers.get("a") == b"hers"
    his.put("a", b"his")
    bob.delete_store("same")
    assert hers.get("a") == b"hers"
    with pytest.raises(UnknownStore):
        bob.delete_store("same")
    alice.delete_store("same")


def test_neither_sees_opens_or_ends_what_is_the_others(alice: memfaas.Session, bob: memfaas.Session) -> None:
    store = alice.store("private", size="8MiB", persistent=True)
    store.put("a", b"1")
    region = alice.lease("1MiB")
    region.write(0, b"abc")
    assert (len(alice.stores()), len(alice.status().leases)) == (1, 2)

    status = bob.status()
    assert (status.stores, status.leases, bob.stores()) == ([], [], [])
    assert {one.tenant for one in status.sessions} == {"bob"}
    with pytest.raises(UnknownStore):
        bob.store("private")
    with pytest.raises(UnknownStore):
        bob.delete_store("private")
    with pytest.raises(UnknownStore):
        bob._request(messages.CloseStore(store=store.spec.store), messages.Done)
    for lease in (store.keepers[0].place.lease, region.lease):
        with pytest.raises(AccessError):
            bob.locate(lease, 5)
        with pytest.raises(AccessError):
            bob._request(messages.ReleaseLease(lease=lease), messages.Done)

    assert (store.get("a"), region.read(0, 3)) == (b"1", b"abc")
    assert region.fetch_add(8, 1) == 0
    alice.delete_store("private")
    region.release()


@pytest.mark.parametrize("choice", FABRICS)
def test_a_door_opens_only_for_its_own_tenants_ticket(
    alice: memfaas.Session, bob: memfaas.Session, choice: fabric.Choice
) -> None:
    """Bob knows where Alice's memory is served, and has a good ticket, but for his own."""
    with alice.lease("1MiB") as hers, bob.lease("1MiB") as his:
        there = hers.keeper.place
        stolen = msgspec.structs.replace(his.keeper.place, endpoint=there.endpoint)
        pretended = msgspec.structs.replace(stolen, lease=there.lease, donor=there.donor, epoch=there.epoch)
        no_proof = msgspec.structs.replace(there, proof_key=his.keeper.place.proof_key)
        for forged in (stolen, pretended, no_proof):
            with pytest.raises(AccessError) as caught:
                fabric.open_link(forged, choice, time.monotonic() + 5, 5.0)
            assert not isinstance(caught.value, FabricUnavailable)
        hers.write(0, b"abc")
        assert his.read(0, 3) == bytes(3)


# --- memory that was another tenant's ---------------------------------------------------------------------


def zero(region: memfaas.Region) -> bool:
    return all(not any(region.read(offset, min(MIB, region.size - offset))) for offset in range(0, region.size, MIB))


@pytest.mark.parametrize("reads", FABRICS)
@pytest.mark.parametrize("writes", FABRICS)
def test_a_new_lease_is_zero_where_another_tenants_region_was(
    pair: Pair, writes: fabric.Choice, reads: fabric.Choice
) -> None:
    size = 40 * MIB  # more than half of what the donor has: one must go before the other can be
    with pair.connect("alice", writes) as alice, pair.connect("bob", reads) as bob:
        region = alice.lease(size)
        for offset in range(0, size, MIB):
            region.write(offset, SECRET)
        assert (region.fabric, region.read(size - 8, 8)) == (writes, b"secret! ")
        with pytest.raises(memfaas.CapacityError):
            bob.lease(size)
        region.release()
        with bob.lease(size) as fresh:
            assert zero(fresh)
            assert fresh.fabric == reads
            assert fresh.compare_swap(size - 8, 0, 1) == 0


@pytest.mark.parametrize("reads", FABRICS)
def test_a_new_lease_is_zero_where_another_tenants_store_was(pair: Pair, reads: fabric.Choice) -> None:
    with pair.connect("alice") as alice, pair.connect("bob", reads) as bob:
        store = alice.store("s", size=40 * MIB)
        for number in range(30):
            store.put(f"secret-{number}", SECRET)
        alice.delete_store("s")
        with bob.lease(40 * MIB) as fresh:
            assert zero(fresh)


def test_who_keeps_the_memory_of_an_ended_lease_has_nothing_of_the_next(
    pair: Pair, tenants: tuple[LocalCluster, str, dict[str, Path]]
) -> None:
    """A client has the descriptor itself over shm, and may keep it for as long as it likes."""
    cluster = tenants[0]
    size = 40 * MIB
    with pair.connect("alice", "shm") as alice, pair.connect("bob", "tcp") as bob:
        region = alice.lease(size)
        region.write(0, SECRET)
        before = backing_of(functions_of(cluster)[region.lease.hex()[:8]])
        kept = os.open(before.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            assert os.pread(kept, 8, 4096) == b"secret! "
            region.release()
            with bob.lease(size) as fresh:
                fresh.write(0, SECRET)
                until(lambda: os.fstat(kept).st_blocks == 0)
                assert os.fstat(kept).st_size == 0
                assert os.pread(kept, 8, 0) == b""
                with pytest.raises(PermissionError):
                    os.ftruncate(kept, size)
                with pytest.raises(PermissionError):
                    os.pwrite(kept, b"mallory", 0)
                assert backing_of(functions_of(cluster)[fresh.lease.hex()[:8]]).inode != before.inode
                assert fresh.read(0, MIB) == SECRET
        finally:
            os.close(kept)
