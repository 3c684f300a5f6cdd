"""A lease departs: copied to another donor's function while it is in use, then frozen for the rest.

The sender serves again only while it is certain that the other side cannot have all of it: once the
end was sent and no answer came it stays frozen, `in doubt`, until the broker has decided.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

from memfaas import _native, rpc
from memfaas.errors import MemfaasError
from memfaas.fabric import tcp
from memfaas.messages import Done, Refused, Sent, Target, short

_ROUNDS = 6
_LITTLE = 4 << 20
"""Bytes that are sent in a pause that nobody notices."""
_SOON_S = 0.02
"""Operations end within microseconds, unless their client is slow or stopped."""
_PATIENCE = 0.25
_PATIENCE_WITH_DISKS = 0.5
_LEAST_PATIENCE_S = 0.2
"""For a target that stands still: a share of the time that there is, so that there is some for another target. A disk
may take a while; but it is only asked when hardly anybody else has room."""

logger = logging.getLogger(__name__)


class Departure:
    """One attempt. `run` blocks, so it has a thread of its own; `stop` may be called from another.

    `cut` ends the tcp connections of clients that may be too slow for an operation to end; `close` keeps network
    devices out.
    """

    def __init__(
        self, memory: _native.Memory, target: Target, cut: Callable[[], None], close: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._target = target
        self._cut = cut
        self._close = close
        self._name = short(target.place.lease)
        self._sock: socket.socket | None = None
        self._stopped = False
        self._patience = _LEAST_PATIENCE_S

    def run(self, timeout_s: float) -> Sent:
        """Gives up a target that stands still before the time is over."""
        started = time.monotonic()
        deadline = started + timeout_s
        share = _PATIENCE_WITH_DISKS if self._target.spill else _PATIENCE
        self._patience = max(_LEAST_PATIENCE_S, share * timeout_s)
        try:
            descriptor = tcp.dial(self._target.place, min(deadline, started + self._patience), "move")
        except MemfaasError as error:
            return Sent(outcome="stayed", reason=str(error))
        with socket.socket(fileno=descriptor) as self._sock:
            return self._send(self._sock, started, deadline)

    def stop(self) -> None:
        """Makes `run` end soon."""
        self._stopped = True
        if self._sock is not None:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already

    def _send(self, sock: socket.socket, started: float, deadline: float) -> Sent:
        memory = self._memory
        size = 0
        try:
            if memory.kind == "region":
                self._close()  # nobody would note what devices write
            size = self._copy_in_use(sock.fileno(), deadline)
            frozen = time.monotonic()
            self._close()
            if not memory.freeze():
                return Sent(outcome="stayed", reason="its memory was needed", size=size)
            if not memory.drain(_SOON_S):
                self._cut()
                if not memory.drain(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError("a client's operation did not end; perhaps the client is stopped")
            size += memory.copy_rest(sock.fileno(), deadline - time.monotonic(), self._patience)
        except Exception as error:  # a fault of ours, too, must not leave it frozen
            memory.thaw()
            reason = "it was given up" if self._stopped else f"the copy broke off: {_what(error)}"
            return Sent(outcome="stayed", reason=reason, size=size)
        try:
            sock.settimeout(max(0.001, min(deadline - time.monotonic(), self._patience)))
            answer = rpc.receive_message_blocking(sock)
        except Exception as error:  # whatever it is, the other side may have all of it
            return Sent(outcome="in doubt", reason=f"no answer came: {_what(error)}", size=size)
        if isinstance(answer, Refused):
            memory.thaw()
            return Sent(outcome="stayed", reason=answer.text, size=size)
        if not isinstance(answer, Done):
            return Sent(outcome="in doubt", reason=f"the answer was {type(answer).__name__}", size=size)
        now = time.monotonic()
        logger.info("lease %s: sent to donor %s in %.2f s", self._name, self._target.place.donor, now - started)
        return Sent(outcome="moved", size=size, seconds=now - started, pause=now - frozen)

    def _copy_in_use(self, descriptor: int, deadline: float) -> int:
        """Rounds, until little is left or they no longer get shorter. Returns bytes."""
        self._memory.copy_all()
        total = 0
        last = 0
        for round_ in range(_ROUNDS):
            size = self._memory.copy_written(descriptor, deadline - time.monotonic(), self._patience)
            total += size
            if size <= _LITTLE or (round_ > 1 and size > last / 2):
                break
            last = size
        return total


def _what(error: Exception) -> str:
    if isinstance(error, OSError | EOFError | MemfaasError):
        return getattr(error, "strerror", None) or str(error) or "the connection ended"
    logger.exception("a lease could not be sent")
    return f"a fault: {error!r}"
