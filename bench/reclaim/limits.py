"""What is physically possible here: memory freed, or copied to another process, with nothing around it.

The memory is mapped while it is freed, as memory that is served always is.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable

from memfaas.bench.reclaim.helper import Helper
from memfaas.bench.reclaim.pages import Pages
from memfaas.bench.reclaim.raw import Raw


def punch(size: int, pages: Pages) -> float:
    """Seconds of fallocate(FALLOC_FL_PUNCH_HOLE) over a memfd."""
    return _free(size, pages, Raw.punch, shared=True)


def truncate(size: int, pages: Pages) -> float:
    """Seconds of ftruncate(0) of a memfd."""
    return _free(size, pages, Raw.truncate, shared=True)


def unmap(size: int, pages: Pages) -> float:
    """Seconds of munmap of private memory."""
    return _free(size, pages, Raw.unmap, shared=False)


def kill(size: int, pages: Pages) -> float:
    """Seconds from the SIGKILL of a process with so much private memory until it is gone."""
    with Helper("hold", size, pages, populated=True) as helper:
        start = time.perf_counter()
        helper.kill()
        return time.perf_counter() - start


def copy_to_fresh(size: int, pages: Pages) -> float:
    """Seconds of a copy over TCP on the loopback interface into a memfd that has no pages yet."""
    return _copy(size, pages, populated=False)


def copy_to_populated(size: int, pages: Pages) -> float:
    """The same into a memfd that has its pages already."""
    return _copy(size, pages, populated=True)


def _free(size: int, pages: Pages, way: Callable[[Raw], None], *, shared: bool) -> float:
    memory = Raw(size, pages, shared=shared)
    try:
        memory.populate()
        start = time.perf_counter()
        way(memory)
        seconds = time.perf_counter() - start
        if shared and memory.backed():
            raise RuntimeError(f"{memory.backed()} bytes are still backed by pages")
        return seconds
    finally:
        memory.close()


def _copy(size: int, pages: Pages, *, populated: bool) -> float:
    memory = Raw(size, pages, shared=True)
    try:
        memory.populate()
        with (
            Helper("receive", size, pages, populated=populated) as helper,
            socket.create_connection(("127.0.0.1", helper.port)) as connection,
        ):
            start = time.perf_counter()
            connection.sendall(memory.view)
            if connection.recv(1) != b"1":
                raise RuntimeError("the copy did not arrive")
            return time.perf_counter() - start
    finally:
        memory.close()


def write(size: int, pages: Pages) -> float:
    """Seconds of a plain write of so much memory to a file in the temporary folder, where spilled leases go too."""
    memory = Raw(size, pages, shared=True)
    try:
        memory.populate()
        with tempfile.TemporaryFile(prefix="memfaas-bench-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            start = time.perf_counter()
            view, written = memory.view, 0
            while written < size:
                written += os.write(file.fileno(), view[written:])
            return time.perf_counter() - start
    finally:
        memory.close()
