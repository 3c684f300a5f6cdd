"""memcached, through pymemcache, over TCP."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from memfaas.bench import processes
from memfaas.bench.peers.base import STORE_BYTES, ServerSystem, Site, missing, program, program_version, versions

_LARGEST_ITEM = "64m"
"""The default is 1 MiB, which would refuse the largest values here."""


class Memcached(ServerSystem):
    name = "memcached (tcp)"
    kind = "peer"
    networked = True

    def available(self) -> str | None:
        return missing(modules=["pymemcache"], programs=["memcached"])

    def detail(self) -> str:
        server = program_version(program("memcached"), "--version")
        return f"{server}; {versions('pymemcache')}; TCP, items up to {_LARGEST_ITEM}, {os.cpu_count()} threads"

    def start(self, site: Site) -> None:
        port = processes.free_port()
        argv = [program("memcached"), "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-t", str(os.cpu_count())]
        argv += ["-I", _LARGEST_ITEM, "-m", str(STORE_BYTES >> 20)]
        if os.geteuid() == 0:
            argv += ["-u", "root"]  # it refuses to run as root unless told to
        self.start_process(site, "server", argv)
        self.wait_until(lambda: _answers(port))
        self.start_clients(site, str(port))

    def connect(self, endpoint: str) -> _MemcachedClient:
        return _MemcachedClient(int(endpoint))


class _MemcachedClient:
    def __init__(self, port: int) -> None:
        from pymemcache.client.base import Client

        # Its default does not wait for the answer of a put.
        self._client = Client(("127.0.0.1", port), no_delay=True, default_noreply=False)
        self.put = self._client.set
        self.get = self._client.get

    def key(self, name: str) -> bytes:
        return name.encode()

    def put_many(self, items: Mapping[bytes, bytes]) -> object:
        return self._client.set_many(items)

    def get_many(self, keys: Sequence[bytes]) -> Any:
        return self._client.get_many(keys)

    def close(self) -> None:
        self._client.close()


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        if sock.connect_ex(("127.0.0.1", port)) != 0:
            return False
        sock.sendall(b"version\r\n")
        return sock.recv(64).startswith(b"VERSION")
