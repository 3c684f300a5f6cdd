"""A memory function and nothing more: `python -m memfaas.testing.function DATA CONTROL UNIX TCP`.

It serves the memory behind two descriptors to whoever connects to two listening sockets, cleans up
behind processes that die, and can itself be killed and started again on the same four descriptors.
A client sends one byte and gets the number of its participant (over tcp: 0) when it is admitted. For verbs it sends
the address of its queue pair behind another byte, and gets a welcome to that behind the number.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from memfaas._native import Memory, Server
from memfaas.errors import FabricUnavailable
from memfaas.testing.lease import any_device

_NUMBER = struct.Struct("<I")
_PLAIN, _VERBS = b"?", b"v"
_ADDRESS_BYTES = 32
_WELCOME_BYTES = 80
_PEER = struct.Struct("3i")


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def admitted(sock: socket.socket) -> int:
    """For the client, after it connected: its participant number. EOFError: the function died."""
    sock.sendall(_PLAIN)
    return int(_NUMBER.unpack(_receive(sock, _NUMBER.size))[0])


def welcomed(sock: socket.socket, address: bytes) -> bytes:
    """For the client, after it connected: the welcome to its queue pair. EOFError: the function died, or refused."""
    sock.sendall(_VERBS + address)
    return _receive(sock, _NUMBER.size + _WELCOME_BYTES)[_NUMBER.size :]


def _receive(sock: socket.socket, length: int) -> bytes:
    answer = sock.recv(length, socket.MSG_WAITALL)
    if len(answer) < length:
        raise EOFError("the function died")
    return answer


class Function:
    def __init__(self, memory: Memory, unix: socket.socket, tcp: socket.socket) -> None:
        self._memory = memory
        self._server = Server(memory)
        self._selector = selectors.DefaultSelector()
        self._reaped = threading.Semaphore(0)
        memory.reap(0)
        self._reaped.release()
        for participant, pid, start_time in memory.participants():
            self._watch_inherited(participant, pid, start_time)
        self._listen(unix, self._attach)
        self._listen(tcp, self._serve)
        threading.Thread(target=self._put_right, daemon=True).start()

    def run_until_eof(self, stream: int) -> None:
        """Serves until whoever started us closes our standard input, then until all clients are gone."""
        ending: list[bool] = []
        self._selector.register(stream, selectors.EVENT_READ, lambda: ending.append(True))
        while not ending:
            for key, _ in self._selector.select():
                key.data()
        if not self._server.stop(60.0):
            raise SystemExit("a connection's thread did not end")

    def _put_right(self) -> None:
        while True:
            self._reaped.acquire()
            while not self._memory.put_right(1.0):
                pass

    def _listen(self, listener: socket.socket, welcome: Callable[[socket.socket], None]) -> None:
        def accept() -> None:
            sock, _ = listener.accept()
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._greet(sock, welcome))

        self._selector.register(listener, selectors.EVENT_READ, accept)

    def _greet(self, sock: socket.socket, welcome: Callable[[socket.socket], None]) -> None:
        self._selector.unregister(sock)
        try:
            wanted = sock.recv(1)
            if wanted == _VERBS:
                return self._connect(sock)
            if wanted:
                return welcome(sock)
        except (EOFError, OSError, FabricUnavailable):
            pass
        sock.close()

    def _serve(self, sock: socket.socket) -> None:
        sock.sendall(_NUMBER.pack(0))
        self._server.serve(sock.detach())

    def _connect(self, sock: socket.socket) -> None:
        end = self._server.verbs_end(any_device(), _receive(sock, _ADDRESS_BYTES))
        self._server.serve(os.dup(sock.fileno()), end)  # before the client knows: none of its messages is too early
        with sock:
            sock.sendall(_NUMBER.pack(0) + end.welcome)

    def _attach(self, sock: socket.socket) -> None:
        pid, _, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        participant = self._memory.attach(pid, _start_time(pid))

        def gone() -> None:
            self._selector.unregister(sock)
            sock.close()
            self._reap(participant)

        self._selector.register(sock, selectors.EVENT_READ, gone)
        try:
            sock.sendall(_NUMBER.pack(participant))
        except OSError:
            pass  # it is gone, and we shall hear of it

    def _watch_inherited(self, participant: int, pid: int, start_time: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError):
            return self._reap(participant)
        if _start_time(pid) != start_time:
            os.close(pidfd)
            return self._reap(participant)

        def gone() -> None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
            self._reap(participant)

        self._selector.register(pidfd, selectors.EVENT_READ, gone)

    def _reap(self, participant: int) -> None:
        self._memory.reap(participant)
        self._reaped.release()


if __name__ == "__main__":
    data, control, unix, tcp = map(int, sys.argv[1:])
    function = Function(Memory(data, control), socket.socket(fileno=unix), socket.socket(fileno=tcp))
    print("ready", flush=True)
    function.run_until_eof(0)
