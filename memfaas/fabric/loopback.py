"""Tries an RDMA device: both ends of a link over verbs in this process, by the code that all links use."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from memfaas.errors import FabricUnavailable
from memfaas.units import MIB

_PAGE = 4096
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Took:
    """Microseconds for a page."""

    write_us: float
    read_us: float


def measure(device: str) -> Took:
    """Writes a page through the device NAME:PORT:GID and reads it back, beside tcp, which tells what is there.

    Raises FabricUnavailable, OSError.
    """
    from memfaas._native import LinkDown
    from memfaas.testing.lease import BareLease

    page, other = os.urandom(_PAGE), os.urandom(_PAGE)
    try:
        with BareLease("region", 2 * MIB, timeout_s=_TIMEOUT_S, device=device) as lease:
            near, witness = lease.region(lease.verbs_link()), lease.region(lease.tcp_link())
            near.write(0, other)  # the first takes the keys
            start = time.perf_counter_ns()
            near.write(_PAGE, page)
            written = time.perf_counter_ns()
            back = near.read(_PAGE, _PAGE)
            read = time.perf_counter_ns()
            if witness.read(_PAGE, _PAGE) != page or back != page:
                raise FabricUnavailable(f"verbs: device {device} does not move what it is given")
            return Took((written - start) / 1e3, (read - written) / 1e3)
    except LinkDown as error:
        raise FabricUnavailable(f"verbs: device {device} broke the connection with itself: {error}") from error
