"""What a lease is made of in its donor: memory and listening sockets, all of them descriptors."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import trio

from memfaas import _native
from memfaas.errors import TransportError, UsageError
from memfaas.messages import LeaseSpec, short
from memfaas.server import memory

_BACKLOG = 1024
_LOOK_PAUSE_S = 0.1

T = TypeVar("T")
logger = logging.getLogger(__name__)


def make_descriptors(spec: LeaseSpec, unix_path: Path, host: str, backing: Path | None) -> tuple[list[int], int]:
    """Memory and listening sockets of a new lease, and the tcp port. Raises CapacityError, TransportError."""
    made: list[int] = []
    try:
        made += memory.make(spec.kind, spec.size, short(spec.lease), backing)
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


class Descriptors:
    """Those of one lease, in its agent, which keeps them until `close` and looks at the memory without its function.

    `name` is the lease's, for what is logged and raised.
    """

    def __init__(self, numbers: list[int], name: str) -> None:
        self.numbers = numbers
        """Data, control, and the listening sockets; none when they are closed."""
        self._name = name

    @property
    def closed(self) -> bool:
        return not self.numbers

    def close(self) -> None:
        for descriptor in self.numbers:
            os.close(descriptor)
        self.numbers = []

    @property
    def populated(self) -> int:
        """Bytes of the memory that are backed by pages."""
        return sum(memory.populated(descriptor) for descriptor in self.numbers[:2])

    @contextmanager
    def mapped(self) -> Iterator[_native.Memory | None]:
        """Our own look at the memory; None when it is cut off, or was never formatted.

        Raises TransportError when this node has no descriptor or no address space for it now.
        """
        mapped = None
        if self.numbers:
            try:
                mapped = _native.Memory(*self.numbers[:2])
            except ValueError:
                pass
            except OSError as error:
                raise TransportError(f"the memory of lease {self._name} cannot be looked at now: {error}") from error
        try:
            yield mapped
        finally:
            if mapped is not None:
                mapped.close()

    def state(self) -> _native.State:
        """What is true whichever function lives: the state stands in the memory itself. Raises TransportError."""
        with self.mapped() as mapped:
            return "revoked" if mapped is None else mapped.state

    async def known_state(self) -> _native.State:
        """Once it can be looked at."""
        while True:
            try:
                return self.state()
            except TransportError as error:
                logger.warning("%s", error)
            await trio.sleep(_LOOK_PAUSE_S)

    def surely_served(self) -> bool:
        """False also when that cannot be told now."""
        try:
            return self.state() == "serving"
        except TransportError as error:
            logger.warning("%s", error)
            return False

    async def with_memory(self, work: Callable[[int, int], T]) -> T:
        """Does work in a thread with data and control memory. Raises TransportError when the system refuses it."""
        copies: list[int] = []
        try:
            # Ours may be closed, and their numbers be used again, while the kernel frees the pages.
            for descriptor in self.numbers[:2]:
                copies.append(os.dup(descriptor))
            data, control = copies
            return await trio.to_thread.run_sync(work, data, control)
        except OSError as error:
            raise TransportError(f"the memory of lease {self._name} cannot be got at now: {error}") from error
        finally:
            for descriptor in copies:
                os.close(descriptor)
