"""Everything at once for a while, and then nothing may be wrong, held, leaked or left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.fabric import Choice
from memfaas.testing import fsck
from memfaas.units import MIB
from tests.e2e.scene import LIMIT_S, functions_of, idle_functions_of, memory_of, processes_of, until
from tests.e2e.soak_load import Work, value_of

_LOAD = Path(__file__).with_name("soak_load.py")
SECONDS = 6.0
FABRICS: tuple[Choice, ...] = ("shm", "tcp", "shm", "tcp")
"""Of each process."""
THREADS = 3
STORES = ("plain", "packed")


def faults(cluster: LocalCluster) -> dict[str, object]:
    """What is wrong with the memory of each lease, or held in it, when nobody uses it."""
    found: dict[str, object] = {}
    for name, pid in functions_of(cluster).items():
        with ExitStack() as stack:
            descriptors = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in memory_of(pid)]
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            wrong = fsck.faults(*descriptors)
        if wrong:
            found[name] = wrong
    return found


def descriptors_of(cluster: LocalCluster) -> dict[int, int]:
    """Open files of the broker and the agents."""
    pids = [cluster.broker_pid, *(cluster.donor_pid(donor) for donor in range(2))]
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}


def work(address: str) -> list[dict[str, object]]:
    """Runs all processes to their end; what each has to say."""
    processes = []
    with ExitStack() as stack:
        for number, fabric in enumerate(FABRICS):
            task = Work(
                address=address, fabric=fabric, stores=list(STORES), process=number, processes=len(FABRICS),
                threads=THREADS, seconds=SECONDS, seed=1,
            )  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-P", str(_LOAD), json.dumps(asdict(task))],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        said = []
        for process in processes:
            output, errors = process.communicate(timeout=SECONDS + LIMIT_S)
            assert process.returncode == 0, errors
            assert errors == ""
            said.append(json.loads(output))
    return said


@pytest.mark.slow
def test_everything_at_once_for_a_while() -> None:
    with LocalCluster(donors=2, memory=160 * MIB) as cluster, memfaas.connect(cluster.address) as session:
        idle = 2 * 2
        until(lambda: idle_functions_of(cluster) == idle)
        before = len(processes_of(cluster))
        with memfaas.connect(cluster.address) as maker:
            maker.store("plain", size="64MiB", persistent=True)
            maker.store("packed", size="64MiB", persistent=True, compression="lz4")
        until(lambda: idle_functions_of(cluster) == idle)  # the pools are filled again
        opened = descriptors_of(cluster)

        said = work(cluster.address)
        operations = sum(int(str(one["operations"])) for one in said)
        print(f"{operations} operations in {SECONDS:g} s")
        assert operations > 500

        until(lambda: not any(lease.links for lease in session.status().leases))
        until(lambda: faults(cluster) == {})
        choices: tuple[Choice, ...] = ("shm", "tcp")
        for name in STORES:
            expected = {
                key.encode(): version
                for one in said
                for key, version in one["left"][name].items()  # type: ignore[index]
            }
            for choice in choices:
                with memfaas.connect(cluster.address, fabric=choice) as reader:
                    store = reader.store(name)
                    assert sorted(store.keys()) == sorted(expected)
                    assert len(store) == len(expected)
                    for key, version in expected.items():
                        assert store.get(key) == value_of(key, version), key
        for name in STORES:
            store = session.store(name)
            store.clear()
            assert (len(store), store.info().used) == (0, 0)
            assert all(store._stats(shard)["parts"] == 0 for shard in range(store.spec.shards))
            store.close()
        until(lambda: faults(cluster) == {})
        until(lambda: descriptors_of(cluster) == opened)
        for name in STORES:
            session.delete_store(name)
        until(lambda: functions_of(cluster) == {})
        until(lambda: len(processes_of(cluster)) == before)
        assert session.status().leases == []
