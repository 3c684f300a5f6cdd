"""Run by DragonHPC's launcher: one dictionary, and client processes that take the benchmark's orders."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

from memfaas.bench.peers.base import STORE_BYTES
from memfaas.bench.worker import serve


class _DragonClient:
    def __init__(self, dictionary: Any) -> None:
        self._dictionary = dictionary
        self.put = dictionary.__setitem__
        self.get = dictionary.__getitem__

    def key(self, name: str) -> str:
        return name

    def put_many(self, items: dict[str, bytes]) -> None:
        self._dictionary.start_batch_put()
        for key, value in items.items():
            self._dictionary[key] = value
        self._dictionary.end_batch_put()

    def close(self) -> None:
        self._dictionary.detach()


def _client(dictionary: Any, door: str, pool: str, index: int) -> None:
    serve(_DragonClient(dictionary), Path(door), Path(pool), index)


def main() -> None:
    # Only the launcher's processes can import it. It makes a start method of its own known.
    import dragon  # noqa: F401
    from dragon.data.ddict import DDict

    _, door, pool, clients = sys.argv[1:]
    multiprocessing.set_start_method("dragon")
    dictionary = DDict(1, 1, STORE_BYTES)
    processes = [
        multiprocessing.Process(target=_client, args=(dictionary, door, pool, index)) for index in range(int(clients))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    dictionary.destroy()


if __name__ == "__main__":
    main()
