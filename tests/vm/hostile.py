"""Clients over verbs that keep no rules, and a function in a process of its own."""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from memfaas._native import VerbsLink
from memfaas.testing.compiling import CORE
from memfaas.testing.lease import BareLease, any_device, tcp_pair

WRITE, WRITE_WITH_NUMBER, SEND, READ, ADD = 0, 1, 2, 4, 6
PUT, DELETE, RESERVE, COMMIT = 2, 3, 13, 14
_REQUEST = struct.Struct("<4B3I4Q")
_WELCOME = struct.Struct("<32s5Q2I")
_PATIENCE_MS = 20_000


class Welcome(NamedTuple):
    """What a function says of itself."""

    address: bytes
    generation: int
    kind: int
    size: int
    data: int
    landing: int
    landing_key: int
    first_key: int

    @classmethod
    def of(cls, packed: bytes) -> Welcome:
        return cls(*_WELCOME.unpack(packed))

    def pack(self) -> bytes:
        return _WELCOME.pack(*self)


def request(
    verb: int, rest: bytes = b"", *, key: int = 0, meta: int = 0, landing: int = 0, value: int = 0, number: int = 1
) -> bytes:
    """A message; `key`, `meta` and `value` are lengths. All are of the connection 77."""
    return _REQUEST.pack(verb, 0, 0, 0, key, meta, landing, value, 77, number, 0) + rest


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "hostile.so")
        source = Path(__file__).with_name("hostile.c")
        command = ["gcc", "-O0", "-shared", "-fPIC", f"-I{CORE}", "-o", str(built), str(source), "-libverbs"]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(built))
    library.hostile_open.restype = ctypes.c_void_p
    library.hostile_buffer.restype = ctypes.c_void_p
    for name in ("close", "buffer", "address", "connect", "receive", "post", "wait"):
        getattr(library, f"hostile_{name}").argtypes = [ctypes.c_void_p]
    return library


class Hostile:
    """A queue pair that sends whatever it is told to, and the connection beside it."""

    def __init__(self, lease: BareLease) -> None:
        name, port, gid = any_device().split(b":")
        self._client = ctypes.c_void_p(_library().hostile_open(name, int(port), int(gid)))
        assert self._client.value, "the device does not let us"
        address = ctypes.create_string_buffer(32)
        _library().hostile_address(self._client, address)
        end = lease.server.verbs_end(any_device(), address.raw)
        self.welcome = Welcome.of(end.welcome)
        self.stream, far = tcp_pair()
        lease.server.serve(far.detach(), end)
        error = _library().hostile_connect(self._client, self.welcome.address)
        assert not error, os.strerror(error)

    def expect_replies(self, count: int) -> None:
        for _ in range(count):
            assert not _library().hostile_receive(self._client)

    def post(self, opcode: int, data: bytes = b"", *, length: int = -1, to: int = 0, key: int = 0) -> None:
        """`length`: of what is sent, when that is not the data alone."""
        where = _library().hostile_buffer(self._client)
        ctypes.memmove(where, data, len(data))
        length = len(data) if length < 0 else length
        error = _library().hostile_post(self._client, opcode, length, ctypes.c_uint64(to), key)
        assert not error, os.strerror(error)

    def wait(self) -> tuple[int, bool]:
        """The status of the next thing that is done, 0 for a good one, and whether it is an answer."""
        received = ctypes.c_int()
        status = _library().hostile_wait(self._client, _PATIENCE_MS, ctypes.byref(received))
        assert status >= 0, "nothing was done"
        return status, bool(received.value)

    def done(self, opcode: int, data: bytes, *, to: int, key: int) -> bool:
        """Whether the other device does it."""
        self.post(opcode, data, to=to, key=key)
        return self.wait() == (0, False)

    def ask(self, message: bytes) -> bool:
        """Whether there is an answer to a message."""
        self.expect_replies(1)
        self.post(SEND, message)
        return {self.wait(), self.wait()} == {(0, True), (0, False)}

    def close(self) -> None:
        self.stream.close()
        _library().hostile_close(self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_FUNCTION = """
import socket, sys
from memfaas.testing.lease import BareLease, any_device
lease = BareLease(sys.argv[1], int(sys.argv[2]))
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    for line in sys.stdin:
        end = lease.server.verbs_end(any_device(), bytes.fromhex(line))
        lease.server.serve(listener.accept()[0].detach(), end)
        print(end.welcome.hex(), flush=True)
"""


class FunctionProcess:
    """Serves one lease over verbs, in a process of its own."""

    def __init__(self, kind: str, size: int) -> None:
        command = [sys.executable, "-c", _FUNCTION, kind, str(size)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self._port = int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def link(self, timeout_s: float) -> VerbsLink:
        link = VerbsLink(any_device(), timeout_s)
        pair = link.queue_pair()
        assert self._process.stdin is not None
        self._process.stdin.write(pair.address.hex() + "\n")
        self._process.stdin.flush()
        sock = socket.create_connection(("127.0.0.1", self._port))
        link.add(sock.detach(), pair, bytes.fromhex(self._read()), timeout_s)
        return link

    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
