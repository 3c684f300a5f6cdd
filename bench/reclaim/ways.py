"""Names of what is measured: the bare limits of the machine, and the steps of a reclaim."""

from __future__ import annotations

PUNCH_HOLE = "bare punch-hole"
TRUNCATE = "bare ftruncate"
MUNMAP = "bare munmap"
KILL = "bare kill -9"
COPY = "bare copy, fresh"
COPY_POPULATED = "bare copy, populated"
WRITE = "bare write to scratch"

UNLENT = "unlent"
PUNCHED = "punched"
DROPPED = "dropped"
MIGRATED = "migrated"
SPILLED = "spilled"

FROM_POOL = "a lease from the warm pool"
FROM_START = "a lease of a donor that has just been started"
