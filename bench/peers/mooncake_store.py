"""Mooncake Store over its tcp transport: a master, one process that lends memory, and clients that lend none."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from memfaas.bench import processes
from memfaas.bench.peers.base import STORE_BYTES, ServerSystem, Site, missing, program, versions

_CLIENT_BUFFER = 128 << 20
"""What a client stages its transfers in; a 16 MiB value must fit several times."""


class Mooncake(ServerSystem):
    name = "Mooncake Store (tcp)"
    kind = "peer"
    networked = True

    def available(self) -> str | None:
        if (why := missing(modules=["mooncake"], programs=["mooncake_master"])) is not None:
            return why
        try:
            import mooncake.store  # noqa: F401
        except ImportError as error:
            return f"mooncake.store does not import: {error} (it needs the libibverbs1 of the system also for tcp)"
        return None

    def detail(self) -> str:
        return f"{versions('mooncake-transfer-engine-non-cuda')}; tcp, memory in a process of its own, upsert and get"

    def start(self, site: Site) -> None:
        master_port, metrics_port = processes.free_port(), processes.free_port()
        argv = [program("mooncake_master"), "-rpc_address", "127.0.0.1", "-rpc_port", str(master_port)]
        argv += ["-metrics_host", "127.0.0.1", "-metrics_port", str(metrics_port)]
        self.start_process(site, "master", argv)
        self.wait_until(lambda: _listens(master_port))
        endpoint = f"127.0.0.1:{master_port}"
        lends = site.scratch / "lends"
        holder = [sys.executable, "-m", __name__, endpoint, str(STORE_BYTES), str(lends)]
        self.start_process(site, "memory holder", holder)
        self.wait_until(lends.exists)
        self.start_clients(site, endpoint)

    def connect(self, endpoint: str) -> _MooncakeClient:
        return _MooncakeClient(endpoint)


class _MooncakeClient:
    def __init__(self, master: str) -> None:
        self._store = _set_up(master, lend=0, buffer=_CLIENT_BUFFER)
        # `put` leaves a value that exists as it is and reports success.
        self._upsert = self._store.upsert
        self.get = self._store.get

    def key(self, name: str) -> str:
        return name

    def put(self, key: str, value: bytes) -> None:
        if (status := self._upsert(key, value)) != 0:
            raise OSError(f"Mooncake's upsert failed with status {status}")

    def put_many(self, items: Mapping[str, bytes]) -> None:
        if (status := self._store.upsert_batch(list(items), list(items.values()))) != 0:
            raise OSError(f"Mooncake's upsert_batch failed with status {status}")

    def get_many(self, keys: Sequence[str]) -> Any:
        return self._store.get_batch(list(keys))

    def close(self) -> None:
        self._store.close()


def _set_up(master: str, *, lend: int, buffer: int) -> Any:
    os.environ.setdefault("GLOG_minloglevel", "2")
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    status = store.setup("127.0.0.1", "P2PHANDSHAKE", lend, buffer, "tcp", "", master)
    if status != 0:
        raise OSError(f"Mooncake's setup failed with status {status}")
    return store


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _lend() -> None:
    """The process that lends the memory: until its standard input ends."""
    master, size, lends = sys.argv[1:]
    store = _set_up(master, lend=int(size), buffer=0)
    with open(lends, "w"):
        pass
    sys.stdin.read()
    store.close()


if __name__ == "__main__":
    _lend()
