"""Keeps the link to one lease in repair, so that an operation on it goes on after almost anything.

The native core calls in here only when a link is missing or failed; see `mend`. Each operation has
one deadline: what can't be mended by then raises, once.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from memfaas import auth, fabric
from memfaas._native import BROKEN, FROZEN, NEED_CONNECTION, REVOKED, Link, TcpLink
from memfaas.errors import (
    AccessError,
    DeadlineExceeded,
    LeaseLost,
    MemfaasError,
    ProtocolError,
    TransportError,
)

if TYPE_CHECKING:
    from memfaas.messages import Place

MAX_CONNECTIONS = 32
"""To one lease, from one process. A thread beyond it waits for one of the others."""
_JUST_MENDED_S = 1.0
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.1
_PATIENT_ATTEMPTS = 8
_TICKET_MARGIN_S = 15.0
_ASK_BROKER_S = 2.0
"""How long to wait for the broker before the old place is tried again."""

log = logging.getLogger(__name__)


class WouldBlock(Exception):
    """The operation takes longer than the calling thread may wait; see `no_waiting`."""


class _Calling(threading.local):
    postponed: list[Callable[[], None]] | None = None


_calling = _Calling()


@contextmanager
def no_waiting() -> Iterator[list[Callable[[], None]]]:
    """In it, operations of this thread raise WouldBlock instead of waiting or working for long.

    Gives a list of what they leave to be done elsewhere afterwards.
    """
    postponed: list[Callable[[], None]] = []
    _calling.postponed = postponed
    try:
        yield postponed
    finally:
        _calling.postponed = None


def check_may_wait() -> None:
    if _calling.postponed is not None:
        raise WouldBlock


def now_or_later(work: Callable[[], None]) -> None:
    if _calling.postponed is None:
        work()
    else:
        _calling.postponed.append(work)


class Broker(Protocol):
    """What a keeper needs of its session."""

    fabric: fabric.Choice
    timeout: float

    def locate(self, lease: bytes, timeout_s: float) -> Place: ...

    def ensure_open(self) -> None:
        """Raises ClosedError."""


class Keeper:
    """One lease's place, and the repair of the link to it. Safe to use from several threads."""

    def __init__(
        self,
        what: str,
        place: Place,
        broker: Broker,
        current: Callable[[], Link | None],
        install: Callable[[Link | None], None],
    ) -> None:
        fabric.check_reach(place, broker.fabric)
        self.place = place
        self.fallback: str | None = None
        """Why a lease on this node is not used over shm."""
        self.gone: str | None = None
        """Why the lease was said to be over. A donor that comes back may still prove it wrong."""
        self._what = what
        self._broker = broker
        self._current = current
        self._install = install
        self._operation = threading.local()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._mended_at = float("-inf")
        self._dialled = 0

    def after_fork(self) -> None:
        """In a forked child: the parent's threads, and what they had locked, are not here."""
        self._reset()

    def lose(self, reason: str) -> None:
        """The lease is over. Never blocks."""
        if self.gone is None:
            self.gone = reason
            log.warning("%s is lost: %s", self._what, reason)
        self._install(None)

    def mend(self, reason: int, attempt: int) -> None:
        """Mends the link and returns, for the operation to be tried again; or raises.

        `attempt` counts from 1 within an operation. Raises LeaseLost, FabricUnavailable,
        DeadlineExceeded, BrokerUnavailable, AccessError, ClosedError.
        """
        entered = time.monotonic()
        if attempt <= 1:
            self._operation.deadline = entered + self._broker.timeout
        deadline: float = self._operation.deadline
        self._check(deadline)
        check_may_wait()
        if reason == FROZEN:
            _pause(attempt, deadline)
            return
        if not self._lock.acquire(timeout=max(0.0, deadline - entered)):
            raise self._too_late()
        try:
            link = self._current()
            if reason == NEED_CONNECTION and isinstance(link, TcpLink):
                # Timeouts cost connections that are not counted, so the limit is not held for ever.
                if self._dialled >= MAX_CONNECTIONS and attempt < _PATIENT_ATTEMPTS:
                    wait = True
                else:
                    wait = False
                    self._add_connection(link, attempt, deadline)
            elif attempt == 1 and link is not None and self._mended_at > entered - _JUST_MENDED_S:
                wait = False  # another thread mended it, perhaps after ours failed
            else:
                wait = False
                self._reopen(reason, attempt, deadline)
        finally:
            self._lock.release()
        if wait:
            _pause(attempt, deadline)

    def _check(self, deadline: float) -> None:
        self._broker.ensure_open()
        if time.monotonic() >= deadline:
            raise self._too_late()

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self._what} on donor {self.place.donor} could not be reached within {self._broker.timeout:g} s"
        )

    def _add_connection(self, link: TcpLink, attempt: int, deadline: float) -> None:
        try:
            if self._ticket_is_old():
                self._ask_broker(deadline)
            link.add(fabric.tcp.dial(self.place, deadline))
        except (TransportError, AccessError, LeaseLost) as error:
            log.info("%s: no further connection: %s", self._what, error)
            self._reopen(BROKEN, attempt, deadline)
        else:
            self._dialled += 1

    def _reopen(self, reason: int, attempt: int, deadline: float) -> None:
        """Opens a new link where the lease is now, and tries until the deadline."""
        if attempt > 2:  # it keeps failing although it opens
            _pause(attempt, deadline)
        # Over tcp the core asks what the broken connection did, so it must not become another fabric.
        broken = reason == BROKEN and isinstance(self._current(), TcpLink)
        choice: fabric.Choice = "tcp" if broken else self._broker.fabric
        ask = reason == REVOKED or attempt > 1 or self.gone is not None or self._ticket_is_old()
        telling: MemfaasError | None = None
        for round_ in itertools.count(1):
            trouble: MemfaasError | None = self._ask_broker(deadline) if ask else None
            try:
                opened = fabric.open_link(self.place, choice, deadline, self._broker.timeout)
                break
            except (AccessError, ProtocolError) as error:
                if ask and trouble is None:  # with a fresh ticket, at the right place
                    raise
                trouble = trouble or error
            except (TransportError, LeaseLost) as error:
                # LeaseLost is a function's word; whether the lease moved, the broker knows.
                trouble = trouble or error
            ask = True
            log.info("%s: %s; trying again", self._what, trouble)
            self._broker.ensure_open()
            if telling is None or not isinstance(trouble, DeadlineExceeded):
                telling = trouble  # that the time is over says less than what took it
            if not _pause(round_, deadline):
                raise telling
        self.fallback = self.fallback if broken else opened.fallback
        self._dialled = 1
        self._install(opened.link)
        self._mended_at = time.monotonic()
        log.debug("%s: opened a %s link to donor %s", self._what, opened.link.fabric, self.place.donor)

    def _ask_broker(self, deadline: float) -> MemfaasError | None:
        """Learns the present place and gets a fresh ticket. Returns why not, if it is too early to tell.

        Raises LeaseLost.
        """
        left = deadline - time.monotonic()
        try:
            place = self._broker.locate(self.place.lease, max(0.0, min(left, _ASK_BROKER_S)))
        except LeaseLost as error:
            raise LeaseLost(f"{self._what} is lost: {self.gone or error}") from error
        except TransportError as error:  # the broker is away, or does not know yet where the lease is
            if self.gone is not None:
                raise LeaseLost(f"{self._what} is lost: {self.gone}") from error
            return error
        fabric.check_reach(place, self._broker.fabric)
        self.place = place
        self.gone = None
        return None

    def _ticket_is_old(self) -> bool:
        if not self.place.ticket:  # no donor held the lease when the store was opened
            return True
        return auth.Ticket.decode(self.place.ticket).expires - time.time() < _TICKET_MARGIN_S


def _pause(attempt: int, deadline: float) -> bool:
    """Sleeps, the longer the more attempts there were. False when the deadline is over by then."""
    pause = min(_FIRST_PAUSE_S * (1 << min(attempt, 10)), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
    left = deadline - time.monotonic()
    time.sleep(max(0.0, min(pause, left)))
    return pause < left
