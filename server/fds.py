"""A Unix stream that carries descriptors beside the bytes."""

from __future__ import annotations

import array
import os
import socket
from collections import deque

import trio

_MAX_FDS = 8
_ROOM = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)


class FdStream(trio.abc.Stream):
    """Bytes, and descriptors that travel with them.

    Descriptors that are `attach`ed go out with the next bytes sent. Those that came in wait, in
    order, in `take`; they are there once the bytes that they were sent with are.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self._stream = trio.SocketStream(sock)
        self._attached: list[int] = []
        self._received: deque[int] = deque()

    def attach(self, descriptors: list[int]) -> None:
        """The descriptors stay the caller's, and must stay open until something was sent."""
        self._attached += descriptors

    def take(self, count: int) -> list[int]:
        """Received descriptors, now the caller's. Raises ValueError when there are fewer."""
        if len(self._received) < count:
            raise ValueError(f"expected {count} descriptors, got {len(self._received)}")
        return [self._received.popleft() for _ in range(count)]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._attached:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._attached).tobytes())
            try:
                sent = await self.socket.sendmsg([data], [rights])
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            self._attached = []
            data = memoryview(data)[sent:]
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            data, ancillary, _, _ = await self.socket.recvmsg(
                65536 if max_bytes is None else max_bytes, _ROOM, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError("this stream was closed") from None
            raise trio.BrokenResourceError(str(error)) from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._received += numbers
        return data

    async def aclose(self) -> None:
        while self._received:
            os.close(self._received.popleft())
        await self._stream.aclose()


def peer_of(sock: trio.socket.SocketType) -> tuple[int, int]:
    """Process and user id of who connected to a Unix socket.

    The process is 0 when we cannot see it, because it is in another PID namespace.
    """
    credentials = array.array("i")
    credentials.frombytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * credentials.itemsize))
    pid, uid, _ = credentials
    return pid, uid
