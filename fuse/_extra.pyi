"""Requests of the kernel that pyfuse3 does not pass on: locks, fallocate, and the search for holes."""

from typing import Protocol, final

@final
class LockRequest:
    """One request to lock, unlock or ask, which has to be answered once. Keep it until then."""

    ino: int
    owner: int
    """Of a POSIX lock a process, of a flock an open file; within this mount."""
    waits: bool
    interrupted: bool
    """Who waits has got a signal: answer EINTR."""
    type: int
    """F_RDLCK, F_WRLCK or F_UNLCK; of a flock LOCK_SH, LOCK_EX or LOCK_UN."""
    start: int
    length: int
    """Bytes; 0: to the end."""
    pid: int
    def reply(self, error: int) -> None:
        """0, or an errno."""
    def reply_lock(self, type: int, start: int, length: int, pid: int) -> None:
        """To who asks: what stands in the way, or F_UNLCK."""

class Handlers(Protocol):
    """Called in the event loop; none may raise."""

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> int: ...
    def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Where it is, or an errno, negative."""
    def get_lock(self, request: LockRequest) -> None: ...
    def set_lock(self, request: LockRequest) -> None: ...
    def set_flock(self, request: LockRequest) -> None: ...
    def closed(self, ino: int, owner: int) -> None: ...
    def unlocked(self, ino: int, owner: int) -> None: ...

def install(wanted: Handlers) -> None:
    """Before `pyfuse3.init`."""

def used() -> bool:
    """Whether the session that was made since passes them on."""

def fits() -> bool:
    """Whether the libfuse that runs has the structures of the one that this was built for."""

def built_for() -> str:
    """Of libfuse: major and minor version."""

def here() -> str:
    """The version of the libfuse that runs."""
