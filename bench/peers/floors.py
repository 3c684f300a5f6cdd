"""Not systems but limits: the least that moving the bytes costs on this machine."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
from array import array
from importlib.resources import as_file, files
from pathlib import Path

from memfaas.bench.peers.base import ServerSystem, Site, StartError, TimesItself, missing, program, program_version

_SMALL = 32
"""Bytes of a request for a value, and of the answer to a put."""

_ROOM = 16 << 20


class MemoryCopy(ServerSystem):
    """A plain copy of the value into a fresh bytes object."""

    name = "memory copy"
    kind = "floor"
    networked = False
    most_clients = 1

    def available(self) -> str | None:
        return None

    def detail(self) -> str:
        return "bytes(memoryview): a copy into a fresh object, in Python"

    def start(self, site: Site) -> None:
        self.start_clients(site, "")

    def connect(self, endpoint: str) -> _Copies:
        return _Copies()


class _Copies:
    def __init__(self) -> None:
        self._values: dict[str, memoryview] = {}

    def key(self, name: str) -> str:
        return name

    def put(self, key: str, value: bytes) -> None:
        self._values[key] = memoryview(bytes(memoryview(value)))

    def get(self, key: str) -> bytes:
        return bytes(self._values[key])

    def close(self) -> None:
        self._values.clear()


class RoundTrip(ServerSystem):
    """Ask and answer between two processes in C, over TCP on the loopback interface."""

    name = "C round trip"
    kind = "floor"
    networked = True
    most_clients = 1

    def available(self) -> str | None:
        return missing(programs=["gcc"])

    def detail(self) -> str:
        compiler = program_version(program("gcc"), "--version")
        return f"blocking send and recv between two processes over TCP on the loopback interface; {compiler}"

    def start(self, site: Site) -> None:
        library = site.scratch / "floor.so"
        _build(library)
        port_file = site.scratch / "port"
        self.start_process(site, "server", [sys.executable, "-m", __name__, library, port_file])
        self.wait_until(port_file.exists)
        self.start_clients(site, f"{library}:{port_file.read_text()}")

    def connect(self, endpoint: str) -> _RoundTripClient:
        library, _, port = endpoint.rpartition(":")
        return _RoundTripClient(Path(library), int(port))


class _RoundTripClient(TimesItself):
    ops = ("put", "get")

    def __init__(self, library: Path, port: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = _buffer()

    def times(self, op: str, size: int, count: int) -> array[int]:
        times = array("Q", bytes(8 * count))
        request, response = (size, _SMALL) if op == "put" else (_SMALL, size)
        status = self._library.floor_ask(
            self._socket.fileno(),
            self._buffer,
            ctypes.c_uint64(request),
            ctypes.c_uint64(response),
            ctypes.c_uint64(count),
            ctypes.c_void_p(times.buffer_info()[0]),
        )
        if status != 0:
            raise OSError(-status, "the C round trip failed")
        return times

    def close(self) -> None:
        self._socket.close()


def _buffer() -> ctypes.Array[ctypes.c_char]:
    """Memory that begins with a page and is backed by pages of its own.

    Memory of malloc begins 16 bytes into a page, where an AMD Zen copies out of the kernel at a third
    of the speed; and what was never written is one page of zeros, which is faster than any real data.
    """
    memory = mmap.mmap(-1, _ROOM)
    memory[:] = os.urandom(1 << 20) * (_ROOM >> 20)
    return (ctypes.c_char * _ROOM).from_buffer(memory)


def _build(library: Path) -> None:
    with as_file(files("memfaas.bench") / "floor.c") as source:
        argv = [program("gcc"), "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise StartError(f"gcc can't build floor.c: {done.stderr.strip().splitlines()[-1:]}")


def _serve() -> None:
    """The answering process: one connection, then the end."""
    library, port_file = Path(sys.argv[1]), Path(sys.argv[2])
    listener = socket.create_server(("127.0.0.1", 0))
    ready = port_file.with_suffix(".new")
    ready.write_text(str(listener.getsockname()[1]))
    ready.rename(port_file)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ctypes.CDLL(str(library)).floor_serve(connection.fileno(), _buffer(), ctypes.c_uint64(_ROOM))
    sys.stdin.read()  # so that we end when the benchmark says so, not when its client goes


if __name__ == "__main__":
    _serve()
