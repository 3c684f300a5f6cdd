"""Leases move between two nodes, over a network that is slow, loses packets, stalls, or is cut.

The nodes are network namespaces. They share a kernel, so clients could reach the memory by shm; all of
them are told to use tcp.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import memfaas
from memfaas import auth
from memfaas.client.local import _Process, _processes_with
from memfaas.errors import ValueLost
from memfaas.units import MIB
from tests.e2e import moves, nets
from tests.e2e.crew import Crew
from tests.e2e.moves import EVERYTHING, PATIENT_S, Asked, Function, Ledger, operator
from tests.e2e.nets import FAR, NEAR, Node, Wire, join_by_cable
from tests.e2e.scene import until

pytestmark = pytest.mark.slow

STOP_S = 10.0
STORE = 64 * MIB
KEPT, LENGTH = 180, 256 * 1024


class Spread:
    """A broker and the donor `one` near, and the donor `two` far; the store of one shard is near at first."""

    def __init__(self, near: Node, far: Node, folder: Path) -> None:
        self._mark = secrets.token_hex(8)
        self._folder = folder
        self._processes: list[_Process] = []
        auth.create_secret(folder / "secret")
        try:
            facts = self._start(near, "broker", listen_host=NEAR, listen_port=0, secret_file=folder / "secret")
            self.address = f"memfaas://{facts['address']}?secret={folder / 'secret'}"
            for node, name, host in ((near, "one", NEAR), (far, "two", FAR)):
                self._start(
                    node, "donor", broker=self.address, name=name, memory="96MiB", headroom="64MiB",
                    listen_host=host, runtime_dir=folder / "run",
                )  # fmt: skip
        except BaseException:
            self.stop()
            raise

    def _start(self, node: Node, role: str, **settings: object) -> dict[str, Any]:
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-P", "-m", "memfaas.cli", "--config", os.devnull, "-v", role, "--until-eof", *flags]
        log = self._folder / f"{settings.get('name', role)}.log"
        with node.entered():
            process = _Process(role, command, {**os.environ, "SPREAD": self._mark}, log)
        self._processes.append(process)
        return process.wait_ready()

    def functions(self) -> list[Function]:
        return moves.functions_in(_processes_with(f"SPREAD={self._mark}"))

    def donors(self) -> list[str]:
        return [one.donor for one in self.functions()]

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.stop(STOP_S)
        left = {path.name for path in (self._folder / "run").rglob("*") if not path.is_dir()}
        assert left <= {"lock", "reclaimed.json"}, "a donor left something behind"  # what was reclaimed outlasts it
        shutil.rmtree(self._folder / "run", ignore_errors=True)
        for path in self._folder.iterdir():
            path.unlink()


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    nets.skip_without_namespaces()
    with ExitStack() as stack:
        near, far = Node(), Node()
        stack.callback(near.close)
        stack.callback(far.close)
        yield near, far


@pytest.fixture
def cable(nodes: tuple[Node, Node]) -> tuple[Node, Node]:
    join_by_cable(*nodes)
    return nodes


@pytest.fixture
def folder(own_world: Path) -> Iterator[Path]:
    """A short one: sockets go below it."""
    folder = own_world / "spread"
    folder.mkdir(mode=0o700)
    yield folder
    folder.rmdir()


@contextmanager
def scene(near: Node, far: Node, folder: Path, size: int = STORE) -> Iterator[tuple[Spread, memfaas.Session]]:
    """All clients are near, and there is a store of which every byte is on `one`."""
    spread = Spread(near, far, folder)
    try:
        with near.entered(), operator(spread.address) as session:
            session.reclaim("two", EVERYTHING, PATIENT_S, "later")
            with memfaas.connect(spread.address, fabric="tcp") as owner:
                owner.store("s", size=size, persistent=True)
            session.lend("two", "later")
            yield spread, session
    finally:
        spread.stop()


def slow_down(node: Node) -> None:
    """What its device sends: to about 12 MB/s, so that a copy takes some seconds."""
    shape = ["tc", "qdisc", "replace", "dev", node.device, "root", "tbf"]
    with node.entered():
        done = subprocess.run(
            [*shape, "rate", "100mbit", "burst", "256k", "latency", "200ms"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        pytest.skip(f"this kernel cannot slow a link down by tbf: {done.stderr.strip()}")


def test_a_slow_link_only_takes_its_time(cable: tuple[Node, Node], folder: Path, tmp_path: Path) -> None:
    near, far = cable
    with scene(near, far, folder) as (spread, _), memfaas.connect(spread.address, fabric="tcp") as user:
        store = user.store("s")
        kept = Ledger(store, KEPT, LENGTH)
        with Crew(spread.address, tmp_path, fabrics=("tcp",), longest=6000) as crew:
            crew.join("tcp")
            slow_down(near)
            sent = near.traffic()[1]
            with Asked(spread.address, "one", EVERYTHING, PATIENT_S) as asked:
                moves.copying_among(spread.functions, asked, "one", MIB)
                crew.goes_on()  # while it moves
                reclaimed = asked.result()
            assert (reclaimed.in_time, moves.lost(reclaimed)) == (True, [])
            assert near.traffic()[1] - sent >= KEPT * LENGTH
            crew.goes_on()
            crew.finish()
        assert spread.donors() == ["two"]
        assert kept.missing(store) == []
        user.delete_store("s")
        until(lambda: spread.functions() == [])


def test_a_link_that_loses_packets_loses_no_byte(nodes: tuple[Node, Node], folder: Path, tmp_path: Path) -> None:
    near, far = nodes
    size, count = 16 * MIB, 20
    with ExitStack() as stack:
        wire = stack.enter_context(Wire(near, far, delay_s=0.002, loss=0.005))
        spread, _ = stack.enter_context(scene(near, far, folder, size))
        user = stack.enter_context(memfaas.connect(spread.address, fabric="tcp", timeout=30))
        store = user.store("s")
        kept = Ledger(store, count, LENGTH)
        crew = stack.enter_context(Crew(spread.address, tmp_path, fabrics=("tcp",), longest=1000))
        crew.join("tcp")
        with Asked(spread.address, "one", EVERYTHING, PATIENT_S) as asked:
            reclaimed = asked.result()
        assert (reclaimed.in_time, moves.lost(reclaimed)) == (True, [])
        crew.goes_on()
        crew.finish()
        assert kept.missing(store) == []
        assert wire.lost > 10
        user.delete_store("s")
        until(lambda: spread.functions() == [])


@pytest.mark.parametrize("side", ["near", "far"])
def test_a_link_that_stalls_for_a_while_costs_nothing(
    cable: tuple[Node, Node], folder: Path, tmp_path: Path, side: str
) -> None:
    near, far = cable
    with scene(near, far, folder) as (spread, _), memfaas.connect(spread.address, fabric="tcp", timeout=30) as user:
        store = user.store("s")
        kept = Ledger(store, KEPT, LENGTH)
        down = near if side == "near" else far
        with Crew(spread.address, tmp_path, fabrics=("tcp",), longest=6000) as crew:
            crew.join("tcp")
            slow_down(near)
            with Asked(spread.address, "one", EVERYTHING, PATIENT_S) as asked:
                moves.copying_among(spread.functions, asked, "one", MIB)
                down.set_link("down")
                crew.goes_on()  # the shard is where it was
                time.sleep(2)
                crew.goes_on()
                down.set_link("up")
                reclaimed = asked.result()
            assert (reclaimed.in_time, moves.lost(reclaimed)) == (True, [])
            crew.goes_on()
            crew.finish()
        assert spread.donors() == ["two"]
        assert kept.missing(store) == []
        user.delete_store("s")
        until(lambda: spread.functions() == [])


def test_a_link_that_is_cut_costs_what_was_on_the_node_at_the_deadline(cable: tuple[Node, Node], folder: Path) -> None:
    near, far = cable
    with scene(near, far, folder) as (spread, _), memfaas.connect(spread.address, fabric="tcp", timeout=30) as user:
        store = user.store("s")
        kept = Ledger(store, KEPT, LENGTH)
        slow_down(near)
        with (
            moves.memory_of(spread.functions()) as backed,
            Asked(spread.address, "one", EVERYTHING, 4.0) as asked,
        ):
            moves.copying_among(spread.functions, asked, "one", MIB)
            near.set_link("down")
            reclaimed = asked.result()
            assert backed() == 0
        assert moves.lost(reclaimed) == [f"shard 0 of store 's' of {user.tenant}"]
        assert kept.missing(store) == kept.keys
        with pytest.raises(ValueLost):
            store.get(kept.keys[0])
        near.set_link("up")
        until(lambda: spread.functions() == [])  # half a copy is of use to nobody
        assert [store.lost_shards for store in user.stores()] == [[0]]  # it had no other


def test_a_donor_that_is_cut_off_from_the_broker_frees_its_memory_by_itself(
    cable: tuple[Node, Node], folder: Path
) -> None:
    """The broker's request got there and its answers do not: the deadline is the donor's own."""
    near, far = cable
    with (
        scene(near, far, folder) as (spread, session),
        memfaas.connect(spread.address, fabric="tcp", timeout=5) as user,
    ):
        store = user.store("s")
        kept = Ledger(store, 20, LENGTH)
        assert moves.lost(session.reclaim("one", EVERYTHING, PATIENT_S, "job")) == []
        assert spread.donors() == ["two"]
        with moves.memory_of(spread.functions()) as backed:
            until(lambda: backed() >= STORE)
            with Asked(spread.address, "two", EVERYTHING, 3.0):
                until(lambda: backed() < STORE)  # it has begun to punch
                far.set_link("down")
                until(lambda: backed() == 0)
                far.set_link("up")
        until(lambda: spread.functions() == [])
        until(lambda: [store.lost_shards for store in user.stores()] == [[0]])
        assert kept.missing(store) == kept.keys
