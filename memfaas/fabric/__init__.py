"""How bytes move between a client and a lease: opening links, and the choice among fabrics.

Opening blocks, with a deadline, and is the only part written in Python: once a link is open, every
operation on it is native. What goes wrong below comes out as an error of `memfaas.errors`.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memfaas._native import VerbsLink
from memfaas.errors import DeadlineExceeded, FabricUnavailable
from memfaas.fabric import shm, tcp, verbs
from memfaas.fabric.devices import chosen_device, read_kernel
from memfaas.messages import short

if TYPE_CHECKING:
    from memfaas._native import ShmLink, TcpLink
    from memfaas.messages import Place

Choice = Literal["auto", "shm", "tcp", "verbs"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """An open link, and how it was chosen."""

    link: ShmLink | TcpLink | VerbsLink
    fallback: str | None = None
    """Why this is tcp, although the lease is on this node, or both nodes have an RDMA device (or one is pinned)."""
    device: str | None = None
    """Over verbs: the RDMA device, port and address of this node that is used, as NAME:PORT:GID."""


@functools.cache
def boot_id() -> str:
    """Names the running kernel: two processes with the same one can share memory."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise FabricUnavailable(f"cannot tell which node this is: {error}") from error


def check_reach(place: Place, choice: Choice) -> None:
    """Raises FabricUnavailable when the pinned fabric can never reach this place."""
    node = place.endpoint.node  # empty: no donor holds it now
    if choice == "shm" and node and node != boot_id():
        raise FabricUnavailable(
            f"shm cannot reach lease {short(place.lease)}: donor {place.donor} is another node; "
            "leave the choice of the fabric to memfaas, or take tcp"
        )


def open_link(
    place: Place, choice: Choice, deadline: float, timeout_s: float, *, device: str = "", served: bool = False
) -> Opened:
    """Opens a link to a lease, by the best fabric that works or by the one that is pinned.

    `deadline` is a `time.monotonic()`; `timeout_s` is for each operation on the link, later.
    `device`: NAME[:PORT[:GID]] of the RDMA device to use; empty: the first that works.
    `served`: the link is to ask the function something, which one over shm cannot.
    Raises FabricUnavailable, DeadlineExceeded, AccessError (TicketExpired), ProtocolError.
    """
    if not place.endpoint.node:
        raise FabricUnavailable(f"no donor holds lease {short(place.lease)} now")
    check_reach(place, choice)
    if choice == "shm" and not served:
        return Opened(shm.open_link(place, deadline, timeout_s))
    if choice == "verbs":
        return _open_verbs(place, device, deadline, timeout_s)
    here = place.endpoint.node == boot_id()
    try:
        if choice == "auto" and here and not served:
            return Opened(shm.open_link(place, deadline, timeout_s))
        if choice == "auto" and not here and place.endpoint.verbs and (device or read_kernel()):
            now = time.monotonic()
            half = now + (deadline - now) / 2  # the rest is for tcp
            return _open_verbs(place, device, half, timeout_s)
    except (FabricUnavailable, DeadlineExceeded) as error:
        reason = str(error)
    else:
        return Opened(tcp.open_link(place, deadline, timeout_s))
    opened = Opened(tcp.open_link(place, deadline, timeout_s), fallback=reason)
    where = "is on this node, but" if here else "could be reached over verbs, but"
    log.warning("lease %s %s is used over tcp, which is slower: %s", short(place.lease), where, reason)
    return opened


def _open_verbs(place: Place, wanted: str, deadline: float, timeout_s: float) -> Opened:
    device = chosen_device(wanted)
    return Opened(verbs.open_link(place, device, deadline, timeout_s), device=device)


def add_connection(link: TcpLink | VerbsLink, place: Place, deadline: float) -> None:
    """One more of the same kind, for one more thread. Raises what `open_link` raises."""
    if isinstance(link, VerbsLink):
        verbs.add_connection(link, place, deadline)
    else:
        link.add(tcp.dial(place, deadline))
