"""Stores on memory of this process, without broker and donors; and a local cluster for all tests."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from memfaas import messages
from memfaas._native import Memory, ShmLink, format_memory, geometry
from memfaas.client.local import LocalCluster
from memfaas.client.session import Session, connect
from memfaas.client.store import Store
from memfaas.errors import LeaseLost, MemfaasError
from memfaas.fabric import Choice
from memfaas.units import MIB

NOWHERE = messages.Endpoint(node="", unix_path="", host="", port=0)


@dataclass
class Bench:
    """Stands for a session: its broker knows no place of any lease."""

    fabric: str = "auto"
    device: str = ""
    timeout: float = 1.0
    located: int = 0
    closed_stores: list[Store] = field(default_factory=list)
    refusal: MemfaasError = field(default_factory=lambda: LeaseLost("it is over"))
    """Its broker's answer."""
    timers: list[Callable[[], None]] = field(default_factory=list)
    dropped_keys: int | None = 0

    def ensure_open(self) -> None: ...

    def locate(self, lease: bytes, timeout_s: float) -> messages.Place:
        self.located += 1
        raise self.refusal

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.timers.append(action)

    def dropped(self, spec: messages.StoreSpec) -> int | None:
        return self.dropped_keys

    def close_store(self, store: Store) -> None:
        self.closed_stores.append(store)


@dataclass
class Local:
    """A store on memory of this process, and the owner's side of that memory."""

    store: Store
    memories: list[Memory]
    data: list[int]
    session: Bench

    def parts(self) -> int:
        return sum(memory.stats()["parts"] for memory in self.memories)

    def lose(self, shard: int) -> None:
        """As a donor takes memory back."""
        self.memories[shard].revoke()
        os.ftruncate(self.data[shard], 0)


def a_place(size: int, kind: messages.Kind = "shard") -> messages.Place:
    return messages.Place(
        lease=secrets.token_bytes(16),
        donor="here",
        epoch=1,
        kind=kind,
        size=size,
        endpoint=NOWHERE,
        ticket=b"",
        proof_key=b"",
    )


@pytest.fixture
def make_local() -> Iterator[Callable[..., Local]]:
    descriptors: list[int] = []

    def make(
        shards: int = 2,
        shard_size: int = 4 * MIB,
        compression: messages.Compression = "none",
        on_reclaim: messages.OnReclaim = "migrate",
    ) -> Local:
        spec = messages.StoreSpec(
            store=secrets.token_bytes(16),
            name="local",
            tenant="t",
            size=shards * shard_size,
            shards=shards,
            shard_size=shard_size,
            persistent=False,
            compression=compression,
            on_reclaim=on_reclaim,
        )
        places = [a_place(shard_size) for _ in range(shards)]
        session: Any = Bench()
        store = Store(session, spec, places)
        memories, datas = [], []
        for shard, place in enumerate(places):
            data, control = (os.memfd_create(f"memfaas-test-{shard}") for _ in range(2))
            descriptors.extend((data, control))
            for descriptor, size in zip((data, control), geometry("shard", shard_size), strict=True):
                os.ftruncate(descriptor, size)
            format_memory(
                data, control, kind="shard", size=shard_size, lease=place.lease, store=spec.store, shard=shard, epoch=1
            )
            memory = Memory(data, control)
            memories.append(memory)
            datas.append(data)
            store._set_link(shard, ShmLink(data, control, memory.attach(os.getpid(), 0), 1.0))
        return Local(store, memories, datas, session)

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture(params=["shm", "tcp"])
def choice(request: pytest.FixtureRequest) -> Choice:
    """The fabric that is pinned; tests/vm has the same tests over verbs."""
    chosen: Choice = request.param
    return chosen


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """For tests that leave it as they found it: broker and two donors with 256 MiB each."""
    with LocalCluster(donors=2, memory=256 * MIB) as cluster:
        yield cluster


@pytest.fixture
def session(cluster: LocalCluster) -> Iterator[Session]:
    with connect(cluster.address) as session:
        yield session
