"""The other process of a bare measurement: one that holds memory to be killed, or one that receives a copy.

Started by `Helper`; says "ready" or why not in one line, and ends when its standard input does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import TracebackType
from typing import Literal, Self

from memfaas.bench.reclaim.pages import Pages
from memfaas.bench.reclaim.raw import Raw, WrongPagesError
from memfaas.units import MIB

Task = Literal["hold", "receive"]
_PIECE = 64 * MIB


class HelperError(Exception):
    """It could not get ready; the message says why."""


class Helper:
    """A process at its task, with `size` bytes of such pages; those of `receive` are shared memory."""

    def __init__(self, task: Task, size: int, pages: Pages, *, populated: bool) -> None:
        command = [sys.executable, "-P", "-m", __name__, task, str(size), pages, "populated" if populated else "fresh"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        try:
            assert self._process.stdout is not None
            words = self._process.stdout.readline().decode().split(maxsplit=1)
            if words[:1] != ["ready"]:
                raise HelperError(" ".join(words[1:]) or "the other process ended at once")
            self.port = int(words[1])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def kill(self) -> None:
        """As by `kill -9`; it is gone, and all that it held, when this returns."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def _hold(memory: Raw) -> None:
    print("ready 0", flush=True)
    sys.stdin.read()


def _receive(memory: Raw) -> None:
    """Takes one copy, and answers with one byte when all of it is here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"ready {listener.getsockname()[1]}", flush=True)
        connection, _ = listener.accept()
    with connection:
        view, received = memory.view, 0
        while received < memory.size:
            count = connection.recv_into(view[received:], min(_PIECE, memory.size - received), socket.MSG_WAITALL)
            if not count:
                return
            received += count
        connection.send(b"1")
    sys.stdin.read()


def main() -> None:
    task, size, pages, state = sys.argv[1:]
    kind: Pages = "2 MiB" if pages == "2 MiB" else "4 KiB"
    memory = Raw(int(size), kind, shared=task == "receive")
    try:
        if state == "populated":
            memory.populate()
    except (WrongPagesError, OSError) as error:
        print(f"failed {error}", flush=True)
        os._exit(1)
    (_receive if task == "receive" else _hold)(memory)


if __name__ == "__main__":
    main()
