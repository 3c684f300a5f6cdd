"""Shared memory: the function passes its memory over a Unix socket, and the client maps it.

The socket stays open for as long as the link lives. When it closes, the memory function takes the
client for dead and clears up behind it, so it must never close under a running operation.
"""

from __future__ import annotations

import os
import socket
import time
import weakref
from typing import TYPE_CHECKING

from memfaas._native import ShmLink
from memfaas.errors import FabricUnavailable
from memfaas.fabric.handshake import mapped_errors, present_ticket, time_left
from memfaas.messages import short

if TYPE_CHECKING:
    from memfaas.messages import Place

_DESCRIPTORS = 2
_BACKLOG_PAUSE_S = 0.005


class _Presence(socket.socket):
    """A Unix socket that keeps the descriptors which arrive beside the bytes."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.received: list[int] = []

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        # MSG_CMSG_CLOEXEC: no program started meanwhile may inherit the memory.
        data, descriptors, _, _ = socket.recv_fds(self, bufsize, _DESCRIPTORS, flags | socket.MSG_CMSG_CLOEXEC)
        self.received += descriptors
        return data

    def close_received(self) -> None:
        while self.received:
            os.close(self.received.pop())


_open: dict[weakref.ref[ShmLink], _Presence] = {}


def _watch(link: ShmLink, presence: _Presence) -> None:
    # An operation refers to its link, so this comes after the last one, in whichever thread.
    _open[weakref.ref(link, lambda reference: _open.pop(reference).close())] = presence


def _close_inherited() -> None:
    # Else a child that lives longer would speak for its dead parent.
    for presence in list(_open.values()):
        presence.close()


os.register_at_fork(after_in_child=_close_inherited)


def open_link(place: Place, deadline: float, timeout_s: float) -> ShmLink:
    """Maps the lease's memory; its presence is known until the link is no longer referred to."""
    path = place.endpoint.unix_path
    sock = _Presence()
    try:
        with mapped_errors(place, "shm", path):
            _connect(sock, path, deadline)
            welcome = present_ticket(sock, place, "shm", deadline)
            if len(sock.received) != _DESCRIPTORS:
                raise FabricUnavailable(
                    f"shm to lease {short(place.lease)}: the function passed {len(sock.received)} descriptors, "
                    f"not {_DESCRIPTORS}; perhaps this process has too many files open"
                )
            data, control = sock.received
            link = ShmLink(data, control, welcome.participant, timeout_s)
        _watch(link, sock)
        return link
    except BaseException:
        sock.close()
        raise
    finally:
        sock.close_received()


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    while True:
        sock.settimeout(time_left(deadline))
        try:
            return sock.connect(path)
        except BlockingIOError:  # the backlog is full, and the kernel does not wait
            time.sleep(_BACKLOG_PAUSE_S)
