"""memfaas itself, on a local cluster of one donor, with the fabric pinned."""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar, Literal

import memfaas
from memfaas.bench.peers.base import STORE_BYTES, ServerSystem, Site, versions

_STORE = "bench"


class _Memfaas(ServerSystem):
    kind = "memfaas"
    fabric: ClassVar[Literal["shm", "tcp"]]

    def __init__(self) -> None:
        super().__init__()
        self._cluster = ExitStack()

    def available(self) -> str | None:
        return None

    def detail(self) -> str:
        return f"{versions('memfaas')}; one donor, fabric {self.fabric}, one shard"

    def start(self, site: Site) -> None:
        cluster = self._cluster.enter_context(memfaas.LocalCluster(donors=1, memory=2 * STORE_BYTES))
        session = self._cluster.enter_context(memfaas.connect(cluster.address))
        session.store(_STORE, size=STORE_BYTES)
        self.start_clients(site, cluster.address)

    def connect(self, endpoint: str) -> _MemfaasClient:
        return _MemfaasClient(endpoint, self.fabric)

    def stop(self) -> None:
        super().stop()
        self._cluster.close()


class MemfaasShm(_Memfaas):
    name = "memfaas shm"
    fabric = "shm"
    networked = False


class MemfaasTcp(_Memfaas):
    name = "memfaas tcp"
    fabric = "tcp"
    networked = True


class _MemfaasClient:
    def __init__(self, address: str, fabric: Literal["shm", "tcp"]) -> None:
        self._session = memfaas.connect(address, fabric=fabric)
        self._store = self._session.store(_STORE)
        self.put = self._store.put
        self.get = self._store.get
        self.get_into = self._store.get_into
        self.put_many = self._store.put_many
        self.get_many = self._store.get_many

    def key(self, name: str) -> bytes:
        return name.encode()

    def close(self) -> None:
        self._session.close()
