"""What pyfuse3 does not pass on: locks between mounts, fallocate, and the search for holes."""

from __future__ import annotations

import errno
import fcntl
import logging
from typing import TYPE_CHECKING

import trio

from memfaas.errors import MemfaasError
from memfaas.fs.errors import errno_of
from memfaas.fs.locks import END, FLOCK, POSIX

if TYPE_CHECKING:
    from memfaas.fuse._extra import LockRequest
    from memfaas.fuse.operations import Operations

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05

log = logging.getLogger(__name__)


class Extra:
    """The handlers of memfaas.fuse._extra."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._volume = operations.volume
        self.nursery: trio.Nursery | None = None
        """For who waits."""

    # --- fallocate --------------------------------------------------------------------------------------

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> int:
        try:
            return self._fallocate(fh, mode, offset, length)
        except (OSError, MemfaasError) as error:
            return errno_of(error)
        except Exception:
            log.exception("fallocate failed")
            return errno.EIO

    def _fallocate(self, fh: int, mode: int, offset: int, length: int) -> int:
        files, file = self._volume.files, self._operations.file_of(fh)
        keep_size = bool(mode & FALLOC_KEEP_SIZE)
        kind = mode & ~FALLOC_KEEP_SIZE
        if kind == FALLOC_PUNCH_HOLE and keep_size:
            files.punch(file, offset, length)
        elif kind == FALLOC_ZERO_RANGE:
            files.punch(file, offset, length)
            files.reserve(file, offset, length, keep_size=keep_size)
        elif kind == 0:
            files.reserve(file, offset, length, keep_size=keep_size)
        else:
            return errno.EOPNOTSUPP
        return 0

    # --- holes ------------------------------------------------------------------------------------------

    def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Where the next data (os.SEEK_DATA) or hole (os.SEEK_HOLE) begins; an errno, negative."""
        try:
            return self._volume.files.seek(self._operations.file_of(fh), offset, whence)
        except (OSError, MemfaasError) as error:
            return -errno_of(error)
        except Exception:
            log.exception("lseek failed")
            return -errno.EIO

    # --- locks ------------------------------------------------------------------------------------------

    def get_lock(self, request: LockRequest) -> None:
        try:
            start, end = _range(request)
            exclusive = request.type == fcntl.F_WRLCK
            found = self._volume.locks.in_the_way(request.ino, request.owner, exclusive=exclusive, start=start, end=end)
            if found is None:
                request.reply_lock(fcntl.F_UNLCK, 0, 0, 0)
            else:
                kind = fcntl.F_WRLCK if found.exclusive else fcntl.F_RDLCK
                request.reply_lock(kind, found.start, 0 if found.end == END else found.end - found.start, found.pid)
        except (OSError, MemfaasError) as error:
            request.reply(errno_of(error))

    def set_lock(self, request: LockRequest) -> None:
        self._set(request, POSIX, request.type == fcntl.F_UNLCK, request.type == fcntl.F_WRLCK, *_range(request))

    def set_flock(self, request: LockRequest) -> None:
        self._set(request, FLOCK, request.type == fcntl.LOCK_UN, request.type == fcntl.LOCK_EX, 0, END)

    def _set(self, request: LockRequest, kind: int, unlock: bool, exclusive: bool, start: int, end: int) -> None:
        try:
            if unlock:
                self._give(request.ino, kind, request.owner, start, end)
                request.reply(0)
            elif self._take(request, kind, exclusive, start, end):
                self._taken(request)
            elif request.waits and self.nursery is not None:
                self.nursery.start_soon(self._wait, request, kind, exclusive, start, end)
            else:
                request.reply(errno.EAGAIN)
        except (OSError, MemfaasError) as error:
            request.reply(errno_of(error))

    def _take(self, request: LockRequest, kind: int, exclusive: bool, start: int, end: int) -> bool:
        return self._volume.locks.take(
            request.ino, kind, request.owner, exclusive=exclusive, start=start, end=end, pid=request.pid
        )

    async def _wait(self, request: LockRequest, kind: int, exclusive: bool, start: int, end: int) -> None:
        pause = _FIRST_PAUSE_S
        try:
            while not request.interrupted:
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                if self._take(request, kind, exclusive, start, end):
                    self._taken(request)
                    return
            request.reply(errno.EINTR)
        except (OSError, MemfaasError) as error:
            request.reply(errno_of(error))

    def _taken(self, request: LockRequest) -> None:
        """What others wrote while they had the lock must be seen by who has it now."""
        if self.nursery is not None and self._operations.is_outdated(request.ino):
            self.nursery.start_soon(self._renew, request)
        else:
            request.reply(0)

    async def _renew(self, request: LockRequest) -> None:
        # It may wait for pages that the kernel reads, which needs this thread.
        await trio.to_thread.run_sync(self._operations.forget_data, request.ino)
        request.reply(0)

    def _give(self, ino: int, kind: int, owner: int, start: int, end: int) -> None:
        if self._volume.locks.holds(ino, kind, owner):
            self._volume.flush_under_lock(ino)
            self._volume.locks.give(ino, kind, owner, start=start, end=end)

    def closed(self, ino: int, owner: int) -> None:
        self._end(ino, POSIX, owner)

    def unlocked(self, ino: int, owner: int) -> None:
        self._end(ino, FLOCK, owner)

    def _end(self, ino: int, kind: int, owner: int) -> None:
        try:
            self._give(ino, kind, owner, 0, END)
        except (OSError, MemfaasError) as error:
            log.error("a lock of inode %d stays: %s", ino, error)


def _range(request: LockRequest) -> tuple[int, int]:
    return request.start, request.start + request.length if request.length else END
