"""The agent's warm pool: idle memory functions, forked ahead of need by the zygote."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque

import trio

from memfaas.errors import TransportError
from memfaas.server.fds import FdStream

_FORK_S = 60.0
"""The first fork waits for the zygote to load everything, seconds on a slow node; later ones take milliseconds."""
_REFILL_PAUSE_S = 0.1
_END_S = 5.0

logger = logging.getLogger(__name__)


class FunctionProcess:
    """A function's process, idle or at work, and our socket to it. No child of ours, so we watch its pidfd."""

    def __init__(self, pid: int, stream: FdStream) -> None:
        self.pid = pid
        self.stream = stream
        self._pidfd = _open_pidfd(pid)
        self._killed: trio.Event | None = None
        """Once somebody kills it: that has come to an end."""

    async def kill(self) -> None:
        """Makes sure that it has ended; then nobody but us and the clients has its memory."""
        await trio.aclose_forcefully(self.stream)
        if self._killed is not None:
            await self._killed.wait()
        elif self._pidfd is not None:
            pidfd, self._pidfd = self._pidfd, None
            self._killed = trio.Event()
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await self._wait_for_end(pidfd)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)
                self._killed.set()

    async def _wait_for_end(self, pidfd: int) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_END_S):
            await trio.lowlevel.wait_readable(pidfd)
            return
        # The kernel unpins hundreds of GiB, or a disk hangs.
        logger.warning("function %d takes long to end; until then its memory is not free", self.pid)
        await trio.lowlevel.wait_readable(pidfd)

    async def let_go(self) -> None:
        """Leaves it to itself."""
        await trio.aclose_forcefully(self.stream)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def lives(self) -> bool:
        if self._pidfd is None:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:  # so soon
        return None


class Pool:
    """Keeps `size` idle functions ready, within `run`."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._idle: deque[FunctionProcess] = deque()
        self._taken = trio.Event()
        self._forking = trio.Lock()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._socket: trio.socket.SocketType | None = None

    async def run(self) -> None:
        while True:
            self._taken = trio.Event()
            try:
                while len(self._idle) < self._size:
                    self._idle.append(await self._fork())
            except TransportError as error:
                logger.error("%s", error)  # the next lease tries again
            await self._taken.wait()
            await trio.sleep(_REFILL_PAUSE_S)  # whoever took one needs the processor now

    async def take(self) -> FunctionProcess:
        """An idle function. TransportError when none can be made."""
        self._taken.set()
        while self._idle:
            process = self._idle.popleft()
            if process.lives():
                return process
            await process.kill()
        return await self._fork()

    async def _fork(self) -> FunctionProcess:
        async with self._forking:
            for again in (True, False):
                if self._socket is None:
                    await self._start_zygote()
                try:
                    with trio.fail_after(_FORK_S):
                        return await self._ask_zygote()
                except (OSError, ValueError, trio.TooSlowError) as error:
                    await self._end_zygote()
                    if not again:
                        raise TransportError(f"the zygote does not fork memory functions: {error!r}") from error
                    logger.warning("the zygote is gone, starting another: %r", error)
        raise AssertionError("unreachable")

    async def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # In no terminal's foreground, where Ctrl-C would end it; and standard output, where a parent
            # may wait for its end, must not stay open in functions that outlive us. Python's `-m` looks
            # for modules in the current folder first, which must not be anybody's.
            command = [sys.executable, "-m", "memfaas.server.zygote", "--socket", str(theirs.fileno())]
            self._zygote = await trio.to_thread.run_sync(
                lambda: subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
            )
        ours.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(ours)

    async def _ask_zygote(self) -> FunctionProcess:
        assert self._socket is not None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                await _send_descriptor(self._socket, theirs.fileno())
            pid = int(await self._socket.recv(16))  # ValueError: it has ended
            ours.setblocking(False)
            return FunctionProcess(pid, FdStream(trio.socket.from_stdlib_socket(ours)))
        except BaseException:
            ours.close()
            raise

    async def _end_zygote(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._zygote is not None:
            zygote, self._zygote = self._zygote, None
            zygote.kill()
            await trio.to_thread.run_sync(zygote.wait)

    async def stop(self) -> None:
        """Ends the zygote and all idle functions."""
        await self._end_zygote()
        while self._idle:
            await self._idle.popleft().kill()


async def _send_descriptor(sock: trio.socket.SocketType, descriptor: int) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))
    await sock.sendmsg([b"f"], [rights])
