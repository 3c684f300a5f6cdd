"""A donor's folder: its lock, its own socket and those of its memory functions, and what was reclaimed."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from memfaas.errors import UsageError
from memfaas.fabric import boot_id
from memfaas.local_agent import SOCKET

_LOCK = "lock"
_RECLAIMED = "reclaimed.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Legacy:
    """What an agent leaves to the next one of its donor, as long as somebody has reclaimed memory of it."""

    asked: dict[str, int]
    """Bytes that each holder needs."""
    due: dict[str, float]
    """By which time (`time.monotonic`) those are to have it who still wait for some of it."""
    nominal: int
    """Bytes that the donor lends at most while nobody wants any back."""


class Home:
    """Held by one agent at a time.

    Other users may pass through (mode 0711), to a data socket whose name they have from the broker,
    but cannot list it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    def enter(self) -> None:
        """Makes the folder where it is missing, and locks it. Raises UsageError."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
            _check_owner(self.folder.parent)
            self.folder.mkdir(exist_ok=True, mode=0o711)
            _check_owner(self.folder)
            self.folder.chmod(0o711)
            self._lock = self._take_lock()
        except OSError as error:
            raise UsageError(f"cannot use the runtime folder {self.folder}: {error.strerror}") from error

    def _take_lock(self) -> int:
        path = self.folder / _LOCK
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise UsageError(
                    f"another donor runs in {self.folder}; stop it, or give this one another --name"
                ) from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # its last holder removed it, just before we had it

    @property
    def desk_path(self) -> Path:
        """Where programs of this node ask the agent."""
        return self.folder / SOCKET

    def legacy(self) -> Legacy:
        """What an earlier agent of this donor left; nothing after the node was started anew."""
        path = self.folder / _RECLAIMED
        try:
            saved = json.loads(path.read_text())
            if saved["boot"] == boot_id():
                asked = {str(holder): int(size) for holder, size in saved["asked"].items()}
                due = {str(holder): float(time) for holder, time in saved["due"].items()}
                return Legacy(asked, due, int(saved["nominal"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.error("%s cannot be read, so what was reclaimed is lent again: %s", path, error)
        return Legacy({}, {}, 0)

    def leave_behind(self, legacy: Legacy) -> None:
        """For the next agent, whyever this one ends. A folder that takes no file must not keep memory from a job."""
        path = self.folder / _RECLAIMED
        draft = path.with_suffix(".new")
        try:
            if legacy.asked:
                draft.write_text(json.dumps({"boot": boot_id(), **asdict(legacy)}))
                draft.replace(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.error("%s cannot be written, so the next agent of this donor lends it again: %s", path, error)

    def unix_path(self, lease: bytes) -> Path:
        """Half of a lease's identity: a socket's path must be short."""
        return self.folder / f"{lease.hex()[:16]}.sock"

    def control_paths(self) -> list[Path]:
        """Where functions of an earlier agent may listen."""
        return sorted(self.folder.glob("*.ctl"))

    def forget_all_but(self, unix_paths: Iterable[str]) -> None:
        """Removes the sockets of leases that ended while no agent ran."""
        keep = {Path(path) for path in unix_paths} | {self.desk_path}
        for path in self.folder.glob("*.sock"):
            if path not in keep and not path.with_suffix(".ctl").exists():
                path.unlink(missing_ok=True)

    def forget(self, control_path: Path) -> None:
        """Removes the sockets of a function that is dead."""
        for path in (control_path, control_path.with_suffix(".sock")):
            path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Unlocks it for the next agent, and removes it if there is nothing left for one to find."""
        if self._lock is None:
            return
        if [path.name for path in self.folder.iterdir()] == [_LOCK]:
            (self.folder / _LOCK).unlink()
            _remove_if_empty(self.folder)
            _remove_if_empty(self.folder.parent)
        os.close(self._lock)
        self._lock = None


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # another donor's things are in it, or it is not ours to remove


def _check_owner(folder: Path) -> None:
    """Whoever owns the folder can put a socket of their own in the place of ours."""
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(f"the runtime folder {folder} belongs to user {status.st_uid}; choose another --runtime-dir")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise UsageError(f"everybody can write to the runtime folder {folder}; choose another --runtime-dir")
