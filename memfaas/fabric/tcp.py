"""TCP: the function's threads do the work, near the memory; one round trip for each operation."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Literal

from memfaas._native import TcpLink
from memfaas.fabric.handshake import mapped_errors, present_ticket, time_left

if TYPE_CHECKING:
    from memfaas.messages import Place


def open_link(place: Place, deadline: float, timeout_s: float) -> TcpLink:
    """A link with one connection."""
    link = TcpLink(timeout_s)
    link.add(dial(place, deadline))
    return link


def dial(place: Place, deadline: float, fabric: Literal["tcp", "move"] = "tcp") -> int:
    """The descriptor of an authenticated connection, for `TcpLink.add`, or to send the whole lease over."""
    host, port = place.endpoint.host, place.endpoint.port
    with (
        mapped_errors(place, fabric, f"{host}:{port}"),
        socket.create_connection((host, port), timeout=time_left(deadline)) as sock,
    ):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        present_ticket(sock, place, fabric, deadline)
        sock.setblocking(True)
        return sock.detach()
