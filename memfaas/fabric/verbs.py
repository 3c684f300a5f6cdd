"""Verbs: the network devices do the work, and the function only what changes a store.

A link's connections are those of tcp, each with a queue pair beside it. The two ends of that learn of each
other over the connection, after the handshake with the ticket.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from memfaas import messages, rpc
from memfaas._native import VerbsLink
from memfaas.errors import ProtocolError, from_code
from memfaas.fabric.handshake import mapped_errors, present_ticket, time_left

if TYPE_CHECKING:
    from memfaas.messages import Place

_TEST_S = 3.0
"""A connection that takes longer for a packet is worse than tcp."""


def open_link(place: Place, device: str, deadline: float, timeout_s: float) -> VerbsLink:
    """A link with one connection, which has been tried, from the device NAME:PORT:GID of this node.

    Raises FabricUnavailable and what `tcp.open_link` raises.
    """
    link = VerbsLink(device.encode(), timeout_s)
    add_connection(link, place, deadline)
    return link


def add_connection(link: VerbsLink, place: Place, deadline: float) -> None:
    """Adds a connection to the link. Raises the same as `open_link`."""
    host, port = place.endpoint.host, place.endpoint.port
    pair = link.queue_pair()
    with (
        mapped_errors(place, "verbs", f"{host}:{port}"),
        socket.create_connection((host, port), timeout=time_left(deadline)) as sock,
    ):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        present_ticket(sock, place, "verbs", deadline)
        sock.settimeout(time_left(deadline))
        rpc.send_message_blocking(sock, messages.VerbsHello(address=pair.address))
        answer = rpc.receive_message_blocking(sock)
        if isinstance(answer, messages.Refused):
            raise from_code(answer.code, answer.text)
        if not isinstance(answer, messages.VerbsWelcome):
            raise ProtocolError(f"expected a welcome to a queue pair, got {type(answer).__name__}")
        sock.setblocking(True)
        link.add(sock.fileno(), pair, answer.welcome, min(_TEST_S, time_left(deadline)))
        sock.detach()
