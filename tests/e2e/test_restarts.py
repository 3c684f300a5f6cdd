"""Broker, agents, memory functions and clients are killed while clients are at work, and none notices.

Several processes with several threads each use one store over both fabrics. None may see an error, and
what all of them saw, written down with its times, must be linearizable for each key.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import memfaas
from memfaas.client.local import LocalCluster
from memfaas.fabric import Choice
from tests.e2e.crew import Crew
from tests.e2e.scene import backing_of, functions_of, kill, until

pytestmark = pytest.mark.slow


@pytest.fixture
def session(cluster: LocalCluster) -> Iterator[memfaas.Session]:
    with memfaas.connect(cluster.address) as session:
        session.store("s", size="64MiB")
        yield session


@pytest.fixture
def crew(cluster: LocalCluster, session: memfaas.Session, tmp_path: Path) -> Iterator[Crew]:
    with Crew(cluster.address, tmp_path) as crew:
        crew.join("shm")
        crew.join("tcp")
        yield crew


def test_while_the_broker_is_dead_all_go_on_and_who_needs_it_waits(
    cluster: LocalCluster, session: memfaas.Session, crew: Crew
) -> None:
    crew.join("shm", threads=1, only_reads=True)
    crew.join("tcp", threads=1, only_reads=True)
    opened: list[memfaas.Store | memfaas.Region] = []
    crew.goes_on()
    cluster.kill_broker()
    waiters = [
        threading.Thread(target=lambda: opened.append(session.store("new", size="8MiB"))),
        threading.Thread(target=lambda: opened.append(session.lease("1MiB"))),
    ]
    for waiter in waiters:
        waiter.start()
    crew.goes_on()
    crew.goes_on()
    assert opened == []
    cluster.restart_broker()
    for waiter in waiters:
        waiter.join()
    assert len(opened) == 2
    crew.goes_on()
    for one in opened:
        if isinstance(one, memfaas.Region):
            assert one.fetch_add(0, 1) == 0
        else:
            one.put("a", b"1")
            assert one.get("a") == b"1"
    crew.finish()


def test_a_killed_function_is_back_on_the_same_memory(cluster: LocalCluster, crew: Crew) -> None:
    times: dict[Choice, list[float]] = {"shm": [], "tcp": []}
    before = {name: backing_of(pid).inode for name, pid in functions_of(cluster).items()}
    assert len(before) == 2
    for _ in range(2):
        for fabric, taken in times.items():
            crew.goes_on()
            # Which of the shards a key is in does not matter: both are killed at once.
            pids = functions_of(cluster)
            for pid in pids.values():
                kill(pid)
            killed = time.monotonic()
            with memfaas.connect(cluster.address, fabric=fabric) as newcomer:
                store = newcomer.store("s")
                for shard in range(store.spec.shards):
                    key = next(b"%d" % n for n in range(1000) if store._shard_of(b"%d" % n, 0) == shard)
                    assert key not in store
            taken.append(time.monotonic() - killed)
            crew.goes_on()
            now = functions_of(cluster)
            assert now.keys() == pids.keys()
            assert not set(now.values()) & set(pids.values())
            assert {name: backing_of(pid).inode for name, pid in now.items()} == before
    crew.finish()
    for fabric, taken in times.items():
        shown = ", ".join(f"{seconds * 1000:.0f} ms" for seconds in taken)
        print(f"from the kill of both functions until a newcomer had used both again over {fabric}: {shown}")


def test_a_killed_agent_finds_its_functions_and_their_leases(
    cluster: LocalCluster, session: memfaas.Session, crew: Crew
) -> None:
    region = session.lease("1MiB")
    region.write(0, b"kept")
    pids = functions_of(cluster)
    leases = {lease.lease: lease.donor for lease in session.status().leases}
    for donor in (0, 1):
        crew.goes_on()
        cluster.kill_donor(donor)
        crew.goes_on()
        cluster.restart_donor(donor)
        crew.goes_on()
    assert functions_of(cluster) == pids
    assert {lease.lease: lease.donor for lease in session.status().leases} == leases
    for pid in pids.values():
        kill(pid)  # the new agents look after them
    crew.goes_on()
    until(lambda: functions_of(cluster).keys() == pids.keys())
    assert region.read(0, 4) == b"kept"
    session.store("new", size="16MiB").put("a", b"1")
    crew.finish()


@pytest.mark.parametrize("seed", [1, 2])
def test_all_of_them_die_in_any_order(cluster: LocalCluster, session: memfaas.Session, crew: Crew, seed: int) -> None:
    choose = random.Random(seed)
    region = session.lease("1MiB")

    def pause() -> None:
        time.sleep(choose.choice((0.0, 0.02, 0.1)))

    def kill_functions_of(donor: int) -> None:
        held = {lease.lease.hex()[:8] for lease in leases if lease.donor == cluster.donor_name(donor)}
        for name, pid in functions_of(cluster).items():
            if name in held:
                kill(pid)

    for round_ in range(3):
        leases = session.status().leases
        # Memory is lost when a function and its agent are dead at once, so they are of different donors.
        agent = choose.randrange(2)
        deaths: list[Callable[[], None]] = [
            cluster.kill_broker,
            partial(cluster.kill_donor, agent),
            partial(kill_functions_of, 1 - agent),
            lambda: crew.kill(choose.choice(crew.running())),
        ]
        choose.shuffle(deaths)
        for death in deaths:
            death()
            pause()
        returns = [
            threading.Thread(target=back) for back in (cluster.restart_broker, partial(cluster.restart_donor, agent))
        ]
        choose.shuffle(returns)
        for back in returns:
            back.start()
            pause()
        for back in returns:
            back.join()
        crew.join(choose.choice(("shm", "tcp")))
        crew.goes_on()
        assert region.fetch_add(8, 1) == round_
        until(lambda: functions_of(cluster).keys() == {lease.lease.hex()[:8] for lease in session.status().leases})
        with memfaas.connect(cluster.address) as newcomer:
            assert {shard.trouble for shard in newcomer.store("s").info().shards} == {None}
    assert {lease.lease for lease in session.status().leases} == {lease.lease for lease in leases}
    crew.finish()
