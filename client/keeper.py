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
from memfaas._native import BROKEN, FROZEN, NEED_CONNECTION, REVOKED, Link, TcpLink, VerbsLink
from memfaas.errors import (
    AccessError,
    CapacityError,
    DeadlineExceeded,
    FabricUnavailable,
    LeaseLost,
    MemfaasError,
    ProtocolError,
    TransportError,
)
from memfaas.fabric import empty

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
_BETTER_S, _BETTER_MOST_S = 30.0, 3600.0
"""How soon a better fabric is tried again; and then, as each try may take as long as an operation does, twice that."""
_VACANT_S = 2.0
"""How long a shard that no donor has room for counts as empty before the broker is asked again."""

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


class Owner(Protocol):
    """What a keeper needs of its session."""

    fabric: fabric.Choice
    device: str
    timeout: float

    def locate(self, lease: bytes, timeout_s: float) -> Place: ...

    def ensure_open(self) -> None:
        """Raises ClosedError."""

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Calls it after so long in the control thread, unless the session has ended by then."""


class Keeper:
    """One lease's place, and the repair of the link to it. Safe to use from several threads.

    lost: what is raised when the lease is over.
    cache: its donor may drop all that is in it. Then it is granted anew, empty, when it is next used;
        while no donor has room for it, it counts as an empty shard that takes nothing.
    """

    def __init__(
        self,
        what: str,
        place: Place,
        owner: Owner,
        current: Callable[[], Link | None],
        install: Callable[[Link | None], None],
        *,
        lost: type[LeaseLost] = LeaseLost,
        cache: bool = False,
    ) -> None:
        fabric.check_reach(place, owner.fabric)
        self.place = place
        """The newest that is known; its epoch never falls."""
        self.fallback: str | None = None
        """Why it is used over tcp, although something better could be expected to work."""
        self.device: str | None = None
        """This node's RDMA device that is used, while it is reached over verbs."""
        self.gone: str | None = None
        """Why the lease was said to be over. A donor that comes back may still prove it wrong."""
        self.vacant: str | None = None
        """Why there is no memory behind a cache's shard for now."""
        self.unwanted = False
        """This program has asked for its end."""
        self._what = what
        self._owner = owner
        self._current = current
        self._install = install
        self._lost = lost
        self._cache = cache
        self._operation = threading.local()
        self._linked = 0
        """Epoch of the place that the newest link is to; 0 before there is one."""
        self._over = 0
        """Places of this epoch, and of older ones, are known to serve no more."""
        self._doubtful = False
        """The broker must be asked before the place is used: it may be over."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._news = threading.Condition(threading.Lock())
        """Held, never for long, to change place or link. Notified when a newer place is known."""
        self._mended_at = float("-inf")
        self._mended = 0
        """How often the link was replaced."""
        self._dialled = 0
        self._better_s = _BETTER_S
        self._in_doubt_until = float("-inf")

    def after_fork(self) -> None:
        """In a forked child: the parent's threads, and what they had locked, are not here."""
        self._reset()
        self._look_again()  # the parent's timer is not here either

    # --- what the broker says; called in the control thread, and never blocks -------------------------

    def lose(self, reason: str) -> None:
        """The lease is over."""
        if self.gone is None:
            self.gone = reason
            if self.unwanted:
                log.info("%s is over: %s", self._what, reason)
            else:
                log.warning("%s is lost: %s", self._what, reason)
        self._cut()

    def drop(self, reason: str) -> None:
        """All that was in a cache's shard is gone, but the lease is not over."""
        log.info("%s was dropped: %s", self._what, reason)
        self._cut()

    def _cut(self) -> None:
        with self._news:
            self._doubtful = True
            self.vacant = None
            self._install(None)

    def moved(self, place: Place) -> None:
        """The lease is served there now. Operations that wait for it go on at once, and new ones begin there."""
        if self._adopt(place):
            log.info("%s is on donor %s now", self._what, place.donor)
            self._look_again()
            with self._news:
                if self._is_behind():
                    self._install(None)

    def _adopt(self, place: Place) -> bool:
        """Takes over a place that is not older than the one that is known. Whether it is not."""
        with self._news:
            if place.epoch < self.place.epoch:
                return False
            self.place = place
            self.gone = None
            self._doubtful = False
            self._news.notify_all()
            return True

    # --- repair ---------------------------------------------------------------------------------------

    def mend(self, reason: int, attempt: int) -> None:
        """Mends the link and returns, for the operation to be tried again; or raises.

        `attempt` counts from 1 within an operation. Raises LeaseLost (or what else `lost` says),
        FabricUnavailable, DeadlineExceeded, BrokerUnavailable, AccessError, ClosedError.
        """
        entered = time.monotonic()
        operation = self._operation
        if attempt <= 1:
            operation.deadline = entered + self._owner.timeout
            operation.waits = 0
            operation.seen = None
        deadline: float = operation.deadline
        self._check(deadline)
        check_may_wait()
        if reason == FROZEN:
            # It moves, or it will go on here. In the first case the news may come before the old memory is revoked.
            if not self._wait_for_news(self._linked or self.place.epoch, _pause_s(attempt, deadline)):
                operation.waits += 1
                return
            reason = REVOKED
        attempt -= operation.waits  # what was frozen did not fail
        if not self._lock.acquire(timeout=max(0.0, deadline - entered)):
            raise self._too_late()
        wait = False
        try:
            link = self._current()
            if reason == NEED_CONNECTION and isinstance(link, TcpLink | VerbsLink):
                wait = not self._add_connection(link, attempt, deadline)
            elif not self._was_mended(link, reason, attempt, entered):
                self._reopen(reason, attempt, deadline)
            operation.seen = self._mended
        finally:
            self._lock.release()
        if wait:
            self._pause(attempt, deadline)

    def _was_mended(self, link: Link | None, reason: int, attempt: int, entered: float) -> bool:
        """Whether another thread replaced the link, perhaps after it failed us."""
        if link is None or self._is_behind() or (reason == BROKEN and not isinstance(link, TcpLink | VerbsLink)):
            return False
        seen = self._operation.seen
        just_now = attempt == 1 and self._mended_at > entered - _JUST_MENDED_S
        return just_now or (seen is not None and seen != self._mended)

    def _is_behind(self) -> bool:
        """Whether a newer place is known than the link is to."""
        return 0 < self._linked < self.place.epoch

    def _check(self, deadline: float) -> None:
        self._owner.ensure_open()
        if time.monotonic() >= deadline:
            raise self._too_late()

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self._what} on donor {self.place.donor} could not be reached within {self._owner.timeout:g} s"
        )

    def _add_connection(self, link: TcpLink | VerbsLink, attempt: int, deadline: float) -> bool:
        """Whether there is one more, or a new link; else one of those that others use is to be waited for."""
        # Timeouts cost connections that are not counted, so the limit is not held for ever.
        patient = self._dialled > 1 and attempt < _PATIENT_ATTEMPTS
        if patient and self._dialled >= MAX_CONNECTIONS:
            return False
        try:
            if self._ticket_is_old():
                self._ask_broker(deadline)
            if not self._is_behind():
                fabric.add_connection(link, self.place, deadline)
                self._dialled += 1
                return True
        except (TransportError, AccessError, LeaseLost, CapacityError) as error:
            log.info("%s: no further connection: %s", self._what, error)
            if patient and isinstance(error, FabricUnavailable):  # refused, perhaps for the number of them
                return False
        self._reopen(NEED_CONNECTION, attempt, deadline)
        return True

    def _reopen(self, reason: int, attempt: int, deadline: float) -> None:
        """Opens a new link where the lease is now, and tries until the deadline."""
        if attempt > 2 and not self._is_behind():  # it keeps failing although it opens
            self._pause(attempt, deadline)
        if reason == REVOKED:
            self._over = max(self._over, self._linked)
        elif reason == BROKEN:
            # It was not over shm. The core asks the function what the broken connection did.
            self._in_doubt_until = max(self._in_doubt_until, deadline)
        in_doubt = time.monotonic() < self._in_doubt_until
        ask = not self._is_behind() and (reason == REVOKED or attempt > 1 or self._doubtful or self._ticket_is_old())
        telling: MemfaasError | None = None
        for round_ in itertools.count(1):
            known = self.place.epoch
            trouble: MemfaasError | None = None
            if ask or known <= self._over:
                try:
                    trouble = self._ask_broker(deadline)
                except CapacityError as error:
                    if not self._cache:
                        raise
                    return self._vacate(known, str(error))
            place = self.place
            try:
                if place.epoch <= self._over:
                    raise trouble or TransportError(f"{self._what} has left donor {place.donor}; where to is not known")
                opened = fabric.open_link(
                    place,
                    self._owner.fabric,
                    deadline,
                    self._owner.timeout,
                    device=self._owner.device,
                    served=in_doubt,
                )
                break
            except (AccessError, ProtocolError) as error:
                if ask and trouble is None:  # with a fresh ticket, at the right place
                    raise
                trouble = trouble or error
            except (TransportError, LeaseLost) as error:
                # LeaseLost is a function's word; whether the lease moved, the broker knows.
                trouble = trouble or error
            log.info("%s: %s; trying again", self._what, trouble)
            self._owner.ensure_open()
            if telling is None or not isinstance(trouble, DeadlineExceeded):
                telling = trouble  # that the time is over says less than what took it
            if not self._pause(round_, deadline):
                if isinstance(telling, LeaseLost):
                    raise self._lost(f"{self._what} is lost: {telling}") from telling
                raise telling
            ask = self.place.epoch == place.epoch
        if opened.fallback or not in_doubt:  # else it is tcp so that the function can be asked
            self.fallback = opened.fallback
        self.device = opened.device
        self._dialled = 1
        self._replace(opened.link, place.epoch)
        if self.fallback is None:
            self._better_s = _BETTER_S
        else:
            self._owner.later(self._better_s * random.uniform(0.5, 1.0), lambda: self._try_better(opened.link))
            self._better_s = min(2 * self._better_s, _BETTER_MOST_S)
        log.debug("%s: opened a %s link to donor %s", self._what, opened.link.fabric, place.donor)

    def _replace(self, link: Link, epoch: int) -> None:
        with self._news:
            self._linked = epoch
            self.vacant = None
            self._install(link)
        self._mended_at = time.monotonic()
        self._mended += 1

    def _ask_broker(self, deadline: float) -> MemfaasError | None:
        """Learns the present place and gets a fresh ticket. Returns why not, if it is too early to tell.

        Raises LeaseLost; CapacityError when no donor has room for a cache's shard that was dropped.
        """
        left = deadline - time.monotonic()
        try:
            place = self._owner.locate(self.place.lease, max(0.0, min(left, _ASK_BROKER_S)))
        except LeaseLost as error:
            raise self._lost(f"{self._what} is lost: {self.gone or error}") from error
        except TransportError as error:  # the broker is away, or does not know yet where the lease is
            if self.gone is not None:
                raise self._lost(f"{self._what} is lost: {self.gone}") from error
            return error
        fabric.check_reach(place, self._owner.fabric)
        if not self._adopt(place):
            return TransportError(f"{self._what}: the broker does not know yet that it is on donor {self.place.donor}")
        return None

    def _try_better(self, link: Link) -> None:
        """Has the next operation open a link anew: what kept the best fabric from working may be over."""
        with self._news:
            if self._current() is link:
                self._install(None)

    def _ticket_is_old(self) -> bool:
        if not self.place.ticket:  # no donor held the lease when the store was opened
            return True
        return auth.Ticket.decode(self.place.ticket).expires - time.time() < _TICKET_MARGIN_S

    # --- a cache's shard without memory -----------------------------------------------------------------

    def _vacate(self, known: int, reason: str) -> None:
        """Lets the shard be empty and full for a while, unless it got memory meanwhile."""
        with self._news:
            if self.place.epoch > known:
                return
            self._doubtful = True
            self.vacant = reason
            self._install(empty.full_link())
        self._mended_at = time.monotonic()
        self._mended += 1
        log.info("%s counts as empty: %s", self._what, reason)
        self._owner.later(_VACANT_S * random.uniform(0.5, 1.0), self._look_again)

    def _look_again(self) -> None:
        """Has the next operation ask whether there is memory again."""
        with self._news:
            if self.vacant is not None:
                self.vacant = None
                self._install(None)

    # --- waiting ----------------------------------------------------------------------------------------

    def _wait_for_news(self, known: int, seconds: float) -> bool:
        """Sleeps until a place newer than `known` is known, or for so long. Whether one is."""
        with self._news:
            return self._news.wait_for(lambda: self.place.epoch > known, seconds)

    def _pause(self, attempt: int, deadline: float) -> bool:
        """Sleeps, the longer the more attempts there were; news end it. False when the deadline is over by then."""
        pause = _pause_s(attempt, deadline)
        return self._wait_for_news(self.place.epoch, pause) or time.monotonic() < deadline


def _pause_s(attempt: int, deadline: float) -> float:
    pause = min(_FIRST_PAUSE_S * (1 << min(attempt, 10)), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
    return max(0.0, min(pause, deadline - time.monotonic()))
