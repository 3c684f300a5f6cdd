"""What pyfuse3 does not pass on: locks between mounts, fallocate, and the search for holes."""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Wanted:
    """A lock."""

    kind: int
    exclusive: bool
    start: int
    end: int


@contextmanager
def _answering(request: LockRequest) -> Iterator[None]:
    """An error is the answer, and not the end of the mount."""
    try:
        yield
    except (OSError, MemfaasError) as error:
        request.reply(errno_of(error))
    except Exception:
        log.exception("a lock of inode %d failed", request.ino)
        request.reply(errno.EIO)


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
        with _answering(request):
            start, end = _range(request)
            exclusive = request.type == fcntl.F_WRLCK
            found = self._volume.locks.in_the_way(request.ino, request.owner, exclusive=exclusive, start=start, end=end)
            if found is None:
                request.reply_lock(fcntl.F_UNLCK, 0, 0, 0)
            else:
                kind = fcntl.F_WRLCK if found.exclusive else fcntl.F_RDLCK
                request.reply_lock(kind, found.start, 0 if found.end == END else found.end - found.start, found.pid)

    def set_lock(self, request: LockRequest) -> None:
        wanted = _Wanted(POSIX, request.type == fcntl.F_WRLCK, *_range(request))
        self._set(request, wanted, unlock=request.type == fcntl.F_UNLCK)

    def set_flock(self, request: LockRequest) -> None:
        wanted = _Wanted(FLOCK, request.type == fcntl.LOCK_EX, 0, END)
        self._set(request, wanted, unlock=request.type == fcntl.LOCK_UN)

    def _set(self, request: LockRequest, wanted: _Wanted, *, unlock: bool) -> None:
        with _answering(request):
            if unlock:
                self._give(request.ino, wanted.kind, request.owner, wanted.start, wanted.end)
                request.reply(0)
            elif self._take(request, wanted):
                self._taken(request, wanted)
            elif request.waits and self.nursery is not None:
                self.nursery.start_soon(self._wait, request, wanted)
            else:
                request.reply(errno.EAGAIN)

    def _take(self, request: LockRequest, wanted: _Wanted) -> bool:
        return self._volume.locks.take(
            request.ino,
            wanted.kind,
            request.owner,
            exclusive=wanted.exclusive,
            start=wanted.start,
            end=wanted.end,
            pid=request.pid,
        )

    async def _wait(self, request: LockRequest, wanted: _Wanted) -> None:
        pause = _FIRST_PAUSE_S
        with _answering(request):
            while not request.interrupted:
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                if self._take(request, wanted):
                    self._taken(request, wanted)
                    return
            request.reply(errno.EINTR)

    def _taken(self, request: LockRequest, wanted: _Wanted) -> None:
        """What others wrote while they had the lock must be seen by who has it now."""
        with self._or_released(request, wanted):
            outdated = self._operations.is_outdated(request.ino)
        if outdated and self.nursery is not None:
            self.nursery.start_soon(self._renew, request, wanted)
        else:
            request.reply(0)

    async def _renew(self, request: LockRequest, wanted: _Wanted) -> None:
        with _answering(request):
            with self._or_released(request, wanted):
                # It may wait for pages that the kernel reads, which needs this thread.
                await trio.to_thread.run_sync(self._operations.forget_data, request.ino)
            request.reply(0)

    @contextmanager
    def _or_released(self, request: LockRequest, wanted: _Wanted) -> Iterator[None]:
        """Who is told of an error has no lock."""
        try:
            yield
        except Exception:
            self._volume.locks.give(request.ino, wanted.kind, request.owner, start=wanted.start, end=wanted.end)
            raise

    def _give(self, ino: int, kind: int, owner: int, start: int, end: int) -> None:
        if self._volume.locks.holds(ino, kind, owner):
            try:
                self._volume.flush_under_lock(ino)
            except BaseException:  # it would be stored later, over what the next holder writes
                self._volume.files.lose(ino)
                raise
            finally:  # others must not wait for who cannot write
                self._volume.locks.give(ino, kind, owner, start=start, end=end)

    def closed(self, ino: int, owner: int) -> None:
        self._end(ino, POSIX, owner)

    def unlocked(self, ino: int, owner: int) -> None:
        self._end(ino, FLOCK, owner)

    def _end(self, ino: int, kind: int, owner: int) -> None:
        try:
            self._give(ino, kind, owner, 0, END)
        except (OSError, MemfaasError) as error:
            log.error("at the end of a lock of inode %d: %s", ino, error)
        except Exception:
            log.exception("the end of a lock of inode %d failed", ino)


def _range(request: LockRequest) -> tuple[int, int]:
    return request.start, request.start + request.length if request.length else END
