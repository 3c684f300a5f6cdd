"""Redis, through redis-py with the hiredis parser, over a unix socket and over TCP."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from memfaas.bench import processes
from memfaas.bench.peers.base import ServerSystem, Site, missing, program, program_version, versions

_READ_SIZE = 1 << 20
"""The default of 64 KiB costs large values a fifth of their speed."""


class _Redis(ServerSystem):
    kind = "peer"
    networked = True
    over: ClassVar[str]

    def available(self) -> str | None:
        return missing(modules=["redis", "hiredis"], programs=["redis-server"])

    def detail(self) -> str:
        server = program_version(program("redis-server"), "--version").split(" sha=")[0]
        return f"{server}; {versions('redis', 'hiredis')}; {self.over}, one connection, no persistence"

    def serve(self, site: Site, *address: str) -> None:
        argv = [program("redis-server"), *address, "--save", "", "--appendonly", "no"]
        self.start_process(site, "server", [*argv, "--dir", str(site.scratch)])


class RedisUnix(_Redis):
    name = "redis (unix)"
    over = "unix socket"

    def start(self, site: Site) -> None:
        path = site.scratch / "redis.sock"
        self.serve(site, "--port", "0", "--unixsocket", str(path))
        self.wait_until(lambda: _answers(socket.AF_UNIX, str(path)))
        self.start_clients(site, str(path))

    def connect(self, endpoint: str) -> _RedisClient:
        return _RedisClient(unix_socket_path=endpoint)


class RedisTcp(_Redis):
    name = "redis (tcp)"
    over = "TCP"

    def start(self, site: Site) -> None:
        port = processes.free_port()
        self.serve(site, "--port", str(port), "--bind", "127.0.0.1")
        self.wait_until(lambda: _answers(socket.AF_INET, ("127.0.0.1", port)))
        self.start_clients(site, str(port))

    def connect(self, endpoint: str) -> _RedisClient:
        return _RedisClient(host="127.0.0.1", port=int(endpoint))


class _RedisClient:
    def __init__(self, **where: Any) -> None:
        import redis

        # Its own connection rather than one from the pool for each command: a quarter faster.
        self._redis = redis.Redis(**where, single_connection_client=True, socket_read_size=_READ_SIZE)
        self.put = self._redis.set
        self.get = self._redis.get

    def key(self, name: str) -> bytes:
        return name.encode()

    def put_many(self, items: Mapping[bytes, bytes]) -> object:
        return self._redis.mset(items)

    def get_many(self, keys: Sequence[bytes]) -> Any:
        return self._redis.mget(keys)

    def close(self) -> None:
        self._redis.close()


def _answers(family: int, address: Any) -> bool:
    if family == socket.AF_UNIX and not Path(address).exists():
        return False
    with socket.socket(family) as sock:
        sock.settimeout(1)
        if sock.connect_ex(address) != 0:
            return False
        sock.sendall(b"PING\r\n")
        return sock.recv(16).startswith(b"+PONG")
