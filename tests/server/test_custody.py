"""The agent's side of one lease, over real memory: what it takes of the node, whatever its clients do."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from memfaas import _native
from memfaas.errors import TransportError
from memfaas.messages import Endpoint, LeaseSpec, StoreSpec
from memfaas.server import memory
from memfaas.server.custody import Custody
from memfaas.server.function_peer import FunctionPeer
from memfaas.server.placement import lease_bytes
from memfaas.server.pool import Pool
from memfaas.units import MIB
from tests.server.support import eventually

SIZE = 64 * MIB
STORE = StoreSpec(
    store=b"s" * 16,
    name="results",
    tenant="alice",
    size=SIZE,
    shards=1,
    shard_size=SIZE,
    persistent=False,
    compression="none",
    on_reclaim="migrate",
)
SPEC = LeaseSpec(lease=b"L" * 16, tenant="alice", kind="shard", size=SIZE, epoch=1, store=STORE)
TOLERANCE = 2 * MIB


class Function:
    """Does with the memory what a memory function does; `punches` is what becomes of requests to punch."""

    def __init__(self, data: int, control: int) -> None:
        self.memory = _native.Memory(data, control)
        self.data = data
        self.ended = trio.Event()
        self.punches = "at once"

    def listen(self, hear: object) -> None:
        pass

    async def punch(self, size: int) -> int:
        await trio.lowlevel.checkpoint()
        if self.punches == "never":
            return 0
        punched = self.memory.punch(self.data, size, 0.1)
        if self.punches == "late":
            raise TransportError("it said nothing")
        return punched

    async def unpunch(self) -> None:
        await trio.lowlevel.checkpoint()
        self.memory.unpunch()

    async def kill(self) -> None:
        pass


class NoFunctions:
    async def take(self) -> None:
        await trio.sleep_forever()


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    data, control = memory.make("shard", SIZE, "test")
    _native.format_memory(data, control, kind="shard", size=SIZE, lease=SPEC.lease, store=STORE.store, shard=0, epoch=1)
    yield [data, control]
    for descriptor in (data, control):
        os.close(descriptor)


@pytest.fixture
def function(descriptors: list[int]) -> Iterator[Function]:
    made = Function(*descriptors)
    yield made
    made.memory.close()


@pytest.fixture
async def custody(descriptors: list[int], function: Function, tmp_path: Path, nursery: trio.Nursery) -> Custody:
    def unexpected(*_: object) -> None:
        raise AssertionError

    made = Custody(
        SPEC,
        Endpoint(node="n", unix_path=str(tmp_path / "socket"), host="", port=0),
        descriptors,
        donor="d",
        ticket_key=b"k",
        spill=False,
        on_change=unexpected,
        on_arrived=unexpected,
        on_doubt=unexpected,
        on_evicted=unexpected,
        on_lost=unexpected,
        mover=cast(Any, unexpected),
    )
    await nursery.start(made.keep, nursery, cast(Pool, NoFunctions()), cast(FunctionPeer, function))
    return made


def fill(descriptors: list[int]) -> None:
    """Backs all of it with pages, as a client can."""
    data = descriptors[0]
    with mmap.mmap(data, os.fstat(data).st_size, access=mmap.ACCESS_READ) as mapped:
        for offset in range(0, len(mapped), mmap.PAGESIZE):
            mapped[offset]


def let_go(descriptors: list[int]) -> None:
    """What is punched seems free, as a client can make it seem."""
    hostile = _native.Memory(*descriptors)
    hostile.unpunch()
    hostile.close()


async def test_what_is_punched_is_missing_in_the_kernels_figure(custody: Custody, descriptors: list[int]) -> None:
    fill(descriptors)
    whole = custody.populated
    assert custody.bytes == lease_bytes("shard", SIZE)
    assert await custody.punch(20 * MIB) == 20 * MIB
    assert custody.bytes == lease_bytes("shard", SIZE) - 20 * MIB
    assert whole - custody.populated >= 19 * MIB  # of the control memory more is used now
    assert await custody.restrain() == 0
    await custody.unpunch()
    assert custody.bytes == lease_bytes("shard", SIZE)


async def test_what_had_no_pages_yet_counts_when_it_is_punched(custody: Custody) -> None:
    assert await custody.punch(20 * MIB) == 20 * MIB
    assert await custody.punch(20 * MIB) == 20 * MIB
    assert custody.bytes == lease_bytes("shard", SIZE) - 40 * MIB


async def test_the_same_part_is_not_given_back_twice(custody: Custody, descriptors: list[int]) -> None:
    fill(descriptors)
    assert await custody.punch(20 * MIB) == 20 * MIB
    for _ in range(5):
        let_go(descriptors)
        assert await custody.punch(20 * MIB) <= TOLERANCE
    assert custody.bytes >= custody.populated - TOLERANCE


async def test_pages_that_were_brought_back_are_cut_out_again(
    custody: Custody, descriptors: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    await custody.punch(40 * MIB)
    fill(descriptors)
    assert custody.populated > custody.bytes + 30 * MIB
    assert await custody.restrain() == 0
    assert custody.populated <= custody.bytes + TOLERANCE
    assert custody.punched == 40 * MIB
    assert "shard 0 of store 'results' of alice takes" in caplog.text


async def test_pages_that_cannot_be_cut_out_again_are_too_many(
    custody: Custody, descriptors: list[int], function: Function
) -> None:
    await custody.punch(40 * MIB)
    fill(descriptors)
    function.punches = "never"
    assert await custody.restrain() == custody.populated - custody.bytes > 30 * MIB


async def test_a_node_without_descriptors_evicts_as_soon_as_it_has_some(
    custody: Custody, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", refuse)
        with pytest.raises(TransportError, match="Too many open files"):
            await custody.evict("the node needs it")
        assert (custody.state, custody.bytes) == ("serving", lease_bytes("shard", SIZE))
    custody._on_evicted = lambda *_: None
    await custody.evict("the node needs it")
    assert custody.bytes == 0


async def test_a_lease_that_cannot_be_looked_at_for_a_moment_is_not_lost(
    custody: Custody, function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[Custody] = []
    custody._on_arrived = arrived.append
    looks = 0
    real = _native.Memory

    def sometimes(data: int, control: int) -> _native.Memory:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(data, control)

    monkeypatch.setattr(_native, "Memory", sometimes)
    assert custody.activity() == 0
    assert custody.gone("it ends").spec is None  # nobody can tell
    looks, custody.state = 0, "arriving"
    function.ended.set()  # it had received all of it, but could not say so
    await eventually(lambda: bool(arrived))
    assert (looks, custody.state) == (3, "serving")


async def test_what_a_function_punched_without_saying_so_is_found_out(custody: Custody, function: Function) -> None:
    function.punches = "late"
    with pytest.raises(TransportError):
        await custody.punch(20 * MIB)
    assert (custody.punched, custody.unsure) == (0, True)
    assert await custody.restrain() == 0
    assert (custody.punched, custody.unsure) == (20 * MIB, False)
    await custody.unpunch()
    assert function.memory.punched() == 0
