"""Key files for jobs: each lets the job's user, and nobody else, be that user's tenant."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from memfaas import auth
from memfaas.errors import UsageError


def tenant_of(uid: int) -> str:
    """The tenant of a user: as for somebody who logs in. Raises UsageError for a name that is no tenant's.

    Nobody is the operator of memfaas because of what they are called on a node.
    """
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"
    if name == auth.OPERATOR:
        raise UsageError(f"the user {name!r} is no tenant: that is what the operator of memfaas is called")
    return auth.valid_tenant(name)


def path_of(folder: Path, job: str) -> Path:
    return folder / f"job-{job}.key"


def write(folder: Path, job: str, uid: int, gid: int, secret: bytes) -> Path:
    """Writes the key file of a job; one that is there already is made anew. Raises UsageError."""
    path = path_of(folder, job)
    try:
        # Its users pass through the folder to a file whose name they know.
        folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        if folder.stat().st_uid != os.geteuid():
            raise UsageError(f"the folder {folder} is not ours; choose another --keys")
        remove(folder, job)
        auth.write_tenant_key(path, auth.Credentials.of_tenant(secret, tenant_of(uid)))
        os.chown(path, uid, gid)
    except OSError as error:
        raise UsageError(f"cannot write the key file {path}: {error.strerror}") from error
    return path


def remove(folder: Path, job: str) -> None:
    path_of(folder, job).unlink(missing_ok=True)
