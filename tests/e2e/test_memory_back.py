"""Memory goes back to the kernel when its lease is over, whoever still holds it, and not before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.errors import UnknownStore
from memfaas.fabric import Choice
from memfaas.units import MIB
from tests.e2e.scene import LIMIT_S, backing_of, functions_of, until

pytestmark = pytest.mark.slow
STORE, REGION = 96 * MIB, 64 * MIB
LEASED = STORE + REGION
VALUES = 40
"""Of 1 MiB each, in the store."""
SLACK = 64 * MIB
"""What others may do to the machine's shared memory meanwhile."""
TTL_S = 1.0


def shared_memory() -> int:
    """Bytes of pages of all shared memory on this machine, whoever has it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


@pytest.fixture
def small_cluster() -> Iterator[LocalCluster]:
    """One donor, and leases that end soon after their session."""
    with LocalCluster(donors=1, memory=200 * MIB, lease_ttl=TTL_S) as cluster:
        yield cluster


USER = f"""
import memfaas, sys
address, fabric, persistent = sys.argv[1:]
session = memfaas.connect(address, fabric=fabric)
store = session.store("s", size={STORE}, persistent=persistent == "True")
for number in range({VALUES}):
    store.put(str(number), b"%08d" % number * ({MIB} // 8))
region = session.lease({REGION})
region.write({REGION} - 8, b"the end.")
print("ready", flush=True)
sys.stdin.readline()
for operation in (lambda: store.get("1"), lambda: store.put("1", b""), lambda: region.read(0, 1)):
    try:
        operation()
    except memfaas.MemfaasError as error:
        print(type(error).__name__, flush=True)
    else:
        print("no error", flush=True)
"""


@contextmanager
def user(cluster: LocalCluster, fabric: Choice, persistent: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that has filled a store and a region."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", USER, cluster.address, fabric, str(persistent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


@contextmanager
def kept_open(cluster: LocalCluster) -> Iterator[Callable[[], list[int]]]:
    """Gives the bytes in pages of each lease's memory now, also after all processes have let go of it."""
    descriptors = [os.open(backing_of(pid).path, os.O_RDONLY | os.O_CLOEXEC) for pid in functions_of(cluster).values()]
    try:
        yield lambda: [os.fstat(descriptor).st_blocks * 512 for descriptor in descriptors]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.fixture(params=["shm", "tcp"])
def fabric(request: pytest.FixtureRequest) -> Choice:
    chosen: Choice = request.param
    return chosen


def test_a_session_that_stands_still_cannot_keep_its_memory(small_cluster: LocalCluster, fabric: Choice) -> None:
    """Over shm it has the memory mapped all the time; and somebody holds the descriptors, too."""
    before = shared_memory()
    with user(small_cluster, fabric) as process, kept_open(small_cluster) as backed:
        assert len(backed()) == 2
        until(lambda: sum(backed()) >= LEASED)
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: sum(backed()) == 0)
        until(lambda: shared_memory() < before + SLACK)
        os.kill(process.pid, signal.SIGCONT)
        said, _ = process.communicate("\n", timeout=LIMIT_S)
        assert said.split() == ["ValueLost", "ValueLost", "LeaseLost"]
        assert process.returncode == 0
    until(lambda: functions_of(small_cluster) == {})
    with memfaas.connect(small_cluster.address) as session, session.lease(LEASED) as region:
        assert region.read(REGION - 8, 8) == bytes(8)


def test_a_persistent_store_is_there_until_it_is_deleted(small_cluster: LocalCluster) -> None:
    before = shared_memory()

    def check() -> None:
        with memfaas.connect(small_cluster.address) as session:
            store = session.store("s")
            assert store.spec.persistent
            assert len(store) == VALUES
            assert all(store.get(key) == b"%08d" % int(key) * (MIB // 8) for key in store)

    with user(small_cluster, "shm", persistent=True) as process:
        process.kill()
    with kept_open(small_cluster) as backed:
        until(lambda: len(functions_of(small_cluster)) == 1)  # the region is gone
        time.sleep(2 * TTL_S)
        check()
        small_cluster.kill_broker()
        small_cluster.restart_broker()
        check()
        small_cluster.kill_donor(0)
        small_cluster.restart_donor(0)
        check()
        small_cluster.kill_broker()
        small_cluster.kill_donor(0)
        small_cluster.restart_broker()
        small_cluster.restart_donor(0)
        check()
        time.sleep(2 * TTL_S)
        check()
        assert shared_memory() > before + STORE - SLACK
        with memfaas.connect(small_cluster.address) as session:
            session.delete_store("s")
            with pytest.raises(UnknownStore):
                session.store("s")
        until(lambda: sum(backed()) == 0)
        until(lambda: shared_memory() < before + SLACK)
    small_cluster.kill_broker()
    small_cluster.restart_broker()
    with memfaas.connect(small_cluster.address) as session:
        with pytest.raises(UnknownStore):
            session.store("s")
        assert session.stores() == []
