"""LMDB in a file in memory: no server, each client maps the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memfaas.bench.peers.base import STORE_BYTES, BringsLoops, KeepsSizesApart, ServerSystem, Site, missing, versions

_MAP_BYTES = 4 * STORE_BYTES
"""It takes whole runs of free pages for large values, and needs slack to find them. Untouched pages cost nothing."""


class Lmdb(ServerSystem):
    name = "LMDB"
    kind = "peer"
    networked = False

    def available(self) -> str | None:
        return missing(modules=["lmdb"])

    def detail(self) -> str:
        import lmdb

        engine = ".".join(str(part) for part in lmdb.version())
        return (
            f"LMDB {engine}; {versions('lmdb')}; files in memory, one for each size, writemap, no sync, "
            "a transaction for each operation"
        )

    def start(self, site: Site) -> None:
        self.start_clients(site, str(site.memory))

    def connect(self, endpoint: str) -> _LmdbClient:
        return _LmdbClient(Path(endpoint))


class _LmdbClient(KeepsSizesApart, BringsLoops):
    """Values of each size have a file of their own: the free pages that large values leave behind
    would make each commit of a small one slower."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._environments: dict[int, Any] = {}
        self._begin: Callable[..., Any] = _nowhere

    def use(self, size: int) -> None:
        if size not in self._environments:
            self._environments[size] = _open(self._place / str(size))
        self._begin = self._environments[size].begin

    def key(self, name: str) -> bytes:
        return name.encode()

    def put(self, key: bytes, value: bytes) -> None:
        with self._begin(write=True) as transaction:
            transaction.put(key, value)

    def get(self, key: bytes) -> Any:
        with self._begin() as transaction:
            return transaction.get(key)

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        with self._begin(write=True) as transaction:
            for key, value in items.items():
                transaction.put(key, value)

    def get_many(self, keys: Sequence[bytes]) -> list[Any]:
        with self._begin() as transaction:
            get = transaction.get
            return [get(key) for key in keys]

    def loop(self, op: str) -> Callable[[Sequence[Any]], None] | None:
        begin = self._begin

        def puts(items: Sequence[tuple[bytes, bytes]]) -> None:
            for key, value in items:
                with begin(write=True) as transaction:
                    transaction.put(key, value)

        def gets(items: Sequence[bytes]) -> None:
            for key in items:
                with begin() as transaction:
                    transaction.get(key)

        return puts if op == "put" else gets if op == "get" else None

    def close(self) -> None:
        for environment in self._environments.values():
            environment.close()


def _open(path: Path) -> Any:
    import lmdb

    return lmdb.open(
        str(path),
        subdir=False,
        map_size=_MAP_BYTES,
        writemap=True,
        sync=False,
        metasync=False,
        map_async=True,
        readahead=False,
    )


def _nowhere(**options: Any) -> Any:
    raise RuntimeError("no size was chosen")
