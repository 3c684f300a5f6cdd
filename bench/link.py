"""The connection between the benchmark and its client processes, and what they say to each other.

Plain blocking sockets: a client process must be idle while it waits for its turn.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from memfaas.bench.measure import Slice
from memfaas.bench.plan import Case

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, tag="hello"):
    """A client process is connected to its system and ready; `ops` are what its client can do."""

    client: int
    pid: int
    ops: tuple[str, ...]


class Load(msgspec.Struct, tag="load"):
    """Store this client's working set of one size, read it back, and compare every byte."""

    size: int


class Prepare(msgspec.Struct, tag="prepare"):
    """Get ready for a case: build the values and, if this is the first time, find the block length."""

    case: Case


class Run(msgspec.Struct, tag="run"):
    """Do the prepared case from `start_ns` to `until_ns` of CLOCK_MONOTONIC, which all processes share."""

    start_ns: int
    until_ns: int


class Stop(msgspec.Struct, tag="stop"):
    """Close the client and exit."""


class Done(msgspec.Struct, tag="done"):
    """Load, Prepare or Stop went well. After Prepare, `op_ns` is about how long one operation takes."""

    op_ns: float = 0.0


class Ran(msgspec.Struct, tag="ran"):
    """The outcome of Run."""

    slice: Slice


class Failed(msgspec.Struct, tag="failed"):
    """The order could not be carried out; the process is ready for the next one."""

    reason: str


Order = Load | Prepare | Run | Stop
Answer = Hello | Done | Ran | Failed

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class Link:
    """One side of the connection. EOFError when the other side is gone, TimeoutError when it is silent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, message: Order | Answer) -> None:
        body = msgspec.msgpack.encode(message)
        self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def next_order(self) -> Order:
        return _orders.decode(self._frame())

    def answer(self, timeout_s: float) -> Answer:
        self._sock.settimeout(timeout_s)
        return _answers.decode(self._frame())

    def close(self) -> None:
        self._sock.close()

    def _frame(self) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._sock.recv(size - len(parts))
            if not part:
                raise EOFError("the other side of a benchmark connection is gone")
            parts += part
        return bytes(parts)
