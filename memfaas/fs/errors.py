"""Errors of the file system are OSErrors, as those of any file system: what each error of memfaas is there."""

from __future__ import annotations

import errno
import os

from memfaas.errors import (
    AccessError,
    CapacityError,
    ClosedError,
    DeadlineExceeded,
    LeaseLost,
    MemfaasError,
    ValueTooLarge,
)

_ERRNO: tuple[tuple[type[MemfaasError], int], ...] = (
    (CapacityError, errno.ENOSPC),
    (LeaseLost, errno.EIO),
    (ValueTooLarge, errno.EFBIG),
    (AccessError, errno.EACCES),
    (ClosedError, errno.ENODEV),
    (DeadlineExceeded, errno.ETIMEDOUT),
)


def fail(code: int, what: str | bytes | None = None) -> OSError:
    """The error of a call; Python makes FileNotFoundError of ENOENT, and so on."""
    return OSError(code, os.strerror(code), what) if what is not None else OSError(code, os.strerror(code))


def errno_of(error: BaseException) -> int:
    """For the kernel. What is no error of ours is EIO."""
    if isinstance(error, OSError) and not isinstance(error, MemfaasError) and error.errno:
        return error.errno
    for kind, code in _ERRNO:
        if isinstance(error, kind):
            return code
    return errno.EIO
