"""What a lease is made of in its donor: memory and listening sockets, all of them descriptors."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from memfaas.errors import TransportError, UsageError
from memfaas.messages import LeaseSpec
from memfaas.server import memory

_BACKLOG = 1024


def make_descriptors(spec: LeaseSpec, unix_path: Path, host: str, backing: Path | None) -> tuple[list[int], int]:
    """Memory and listening sockets of a new lease, and the tcp port. Raises CapacityError, TransportError."""
    made: list[int] = []
    try:
        made += memory.make(spec.kind, spec.size, spec.lease.hex()[:8], backing)
        unix_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(unix_path))
            os.chmod(unix_path, 0o666)  # for clients of other users: what opens the door is a ticket
            unix.listen(_BACKLOG)
            made.append(unix.detach())
        with _listen(host) as tcp:
            port = tcp.getsockname()[1]
            made.append(tcp.detach())
        return made, port
    except OSError as error:
        for descriptor in made:
            os.close(descriptor)
        raise TransportError(f"cannot make memory and sockets for a lease: {error}") from error


def _listen(host: str) -> socket.socket:
    family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(where[:2], family=family, backlog=_BACKLOG)


def check_host(host: str) -> None:
    """Whether leases can listen there; better known now than at each grant. Raises UsageError."""
    try:
        _listen(host).close()
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} ({error.strerror}); --listen-host is an address of this node"
        ) from error
