"""A session: what a program has with a broker, and what holds its leases."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeVar, get_args

from memfaas import auth, messages
from memfaas.client.control import Control, Holdings
from memfaas.client.loop import ControlLoop
from memfaas.client.region import Region
from memfaas.client.store import Store
from memfaas.config import ClientSettings, load_settings
from memfaas.errors import ClosedError, MemfaasError, TransportError, UsageError
from memfaas.units import parse_duration, parse_size

if TYPE_CHECKING:
    from memfaas.addresses import Address
    from memfaas.client.keeper import Keeper
    from memfaas.fabric import Choice

_CLOSE_S = 3.0
_DETAIL_S = 2.0

R = TypeVar("R", bound=messages.Message)

log = logging.getLogger(__name__)


def connect(
    address: str | Address | None = None,
    *,
    fabric: Choice | None = None,
    device: str | None = None,
    tenant: str | None = None,
    secret_file: str | Path | None = None,
    timeout: str | float | None = None,
) -> Session:
    """Opens a session with the broker.

    address: `HOST:PORT` or `memfaas://HOST:PORT?secret=/path`; by default that of MEMFAAS_BROKER or
        the settings file, else 127.0.0.1:7411.
    fabric: `shm`, `verbs` or `tcp` pins how bytes move, and then it is an error where that cannot work;
        `auto` (the default) takes the best that works.
    device: the RDMA device of this node that verbs uses, as NAME[:PORT[:GID]]; by default that of
        MEMFAAS_DEVICE or the settings file, else the first that works.
    tenant: whose stores and leases to use; by default the login name, or whom the key file is for.
    secret_file: the cluster's secret or a tenant's key file, mode 0600.
    timeout: seconds (or "500ms") that one operation may take; 10 by default.

    Raises BrokerUnavailable, AccessError, ProtocolError, UsageError.
    """
    given = {
        "broker": address,
        "fabric": fabric,
        "device": device,
        "tenant": tenant,
        "secret_file": secret_file,
        "timeout": timeout,
    }
    return Session.open(load_settings(ClientSettings, given))


class Session:
    """An open session. Made by `connect`; a context manager; may be used by many threads.

    Its leases live for as long as it renews them, which a thread in the background does. When the
    process dies, they end by themselves after their time to live, and a store that nobody else uses
    ends with them, unless it is persistent.

    After `os.fork` the child has a session of its own, with the same stores, from its next use on.
    A region stays the parent's, and the child may use it while the parent holds it.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self.fabric: Choice = settings.fabric
        self.device = settings.device
        self.timeout = settings.timeout
        self._credentials = auth.read_credentials(settings.secret_path, settings.tenant)
        self._closed = False
        self._stores: dict[bytes, Store] = {}
        self._regions: dict[bytes, Region] = {}
        self._keepers: dict[bytes, Keeper] = {}
        # What the broker must hear after a reconnect. Only the control thread changes them, in one
        # step with the broker's answer, so that no reconnect can fall in between.
        self._held_stores: set[bytes] = set()
        self._held_regions: set[bytes] = set()
        self._loop: ControlLoop | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: ClientSettings) -> Session:
        """Like `connect`, with settings that are complete."""
        session = cls(settings)
        session._start(patient=False)
        return session

    def _start(self, *, patient: bool) -> ControlLoop:
        loop = ControlLoop(Control(self.settings.broker, self._credentials, self))
        loop.start(patient=patient)
        self._loop = loop
        _sessions.add(self)
        return loop

    def _running(self) -> ControlLoop:
        with self._lock:
            if self._closed:
                raise ClosedError("the session is closed")
            return self._loop or self._start(patient=True)  # the latter in a forked child

    @property
    def address(self) -> str:
        return str(self.settings.broker)

    @property
    def tenant(self) -> str:
        return self._credentials.name

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        place = f"{self.settings.broker.host}:{self.settings.broker.port}"
        return f"<Session of {self.tenant} at {place}{': closed' if self._closed else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session cannot be pickled; call memfaas.connect in the other process")

    # --- stores and leases ----------------------------------------------------------------------------

    def store(
        self,
        name: str,
        size: str | int | None = None,
        persistent: bool = False,
        compression: messages.Compression = "none",
        on_reclaim: messages.OnReclaim = "migrate",
    ) -> Store:
        """Opens a store of this tenant; creates it when `size` is given and there is none of that name.

        size: bytes, or like "256MiB", of all shards together.
        persistent: it lives on without a session, until it is deleted.
        compression: `lz4` compresses the values that gain from it.
        on_reclaim: what becomes of a shard when its donor needs the memory: `migrate` or `drop`.

        All but the name matter only to a store that is created; one that exists stays as it is.
        Opening a store that this session has open returns the same object.

        Raises UnknownStore, CapacityError, UsageError; FabricUnavailable when a fabric is pinned that
        does not reach the store; BrokerUnavailable, DeadlineExceeded.
        """
        _check_choice("compression", compression, messages.Compression)
        _check_choice("on_reclaim", on_reclaim, messages.OnReclaim)
        request = messages.OpenStore(
            name=name,
            size=None if size is None else parse_size(size),
            persistent=persistent,
            compression=compression,
            on_reclaim=on_reclaim,
        )
        opened = self._obtain(
            request,
            messages.StoreOpened,
            hold=lambda _, opened: self._held_stores.add(opened.spec.store),
            give_back=lambda opened: messages.CloseStore(store=opened.spec.store),
        )
        identity = opened.spec.store
        try:
            with self._lock:
                store = self._stores.get(identity)
                if store is None:
                    store = self._stores[identity] = Store(self, opened.spec, opened.places)
                    self._keepers.update((keeper.place.lease, keeper) for keeper in store.keepers)
        except BaseException:
            self._leave_store(identity)
            raise
        return store

    def lease(self, size: str | int) -> Region:
        """Leases raw memory on one donor, all zero: bytes, or like "64MiB".

        Raises CapacityError, UsageError; FabricUnavailable when a fabric is pinned that does
        not reach the donor; BrokerUnavailable, DeadlineExceeded.
        """
        owner = b""

        def hold(control: Control, granted: messages.RegionGranted) -> None:
            nonlocal owner
            owner = control.session
            self._held_regions.add(granted.place.lease)

        place = self._obtain(
            messages.OpenRegion(size=parse_size(size)),
            messages.RegionGranted,
            hold,
            give_back=lambda granted: messages.ReleaseLease(lease=granted.place.lease),
        ).place
        try:
            region = Region(self, place, owner)
            with self._lock:
                self._regions[place.lease] = region
                self._keepers[place.lease] = region.keeper
        except BaseException:
            self._release_lease(place.lease)
            raise
        return region

    def stores(self) -> list[messages.StoreInfo]:
        """The stores of this tenant. Raises BrokerUnavailable, DeadlineExceeded."""
        return [one for one in self.status().stores if one.spec.tenant == self.tenant]

    def delete_store(self, name: str) -> None:
        """Deletes a store, whoever has it open, and frees its memory.

        Raises UnknownStore, BrokerUnavailable, DeadlineExceeded.
        """
        with self._lock:
            keepers = [one for store in self._stores.values() if store.name == name for one in store.keepers]
        for keeper in keepers:
            keeper.unwanted = True  # what the broker says of it now is no loss
        try:
            self._request(messages.DeleteStore(name=name), messages.Done)
        except MemfaasError:
            for keeper in keepers:
                keeper.unwanted = False
            raise

    def status(self) -> messages.StatusReport:
        """What the broker knows: donors, and this tenant's leases, stores and sessions.

        Raises BrokerUnavailable, DeadlineExceeded.
        """
        return self._request(messages.Status(), messages.StatusReport)

    def usage(self) -> messages.UsageReport:
        """Who used how much of whose memory, in byte-seconds: this tenant's part, or all for the tenant `operator`.

        Raises BrokerUnavailable, DeadlineExceeded.
        """
        return self._request(messages.AskUsage(), messages.UsageReport)

    def reclaim(
        self, donor: str, size: str | int, deadline: str | float = "500ms", holder: str = auth.OPERATOR
    ) -> messages.Reclaimed:
        """Takes memory back from a donor: it lends so much less, until `lend` with the same `holder`.

        donor: its name.
        size: bytes, or like "2GiB"; more than it lends is taken as all of it.
        deadline: seconds, or like "500ms", by which the kernel shall have it. What is in the memory moves to
            other donors, as far as that can be done in time. Then the memory goes, whatever is in it.
        holder: who needs it. What one holder asks for adds up.

        Only the tenant `operator` may. What it returns says whether it was in time, how the memory came free,
        and what was lost. Raises AccessError, UsageError; and BrokerUnavailable, TransportError,
        DeadlineExceeded, of which only the first means that nothing was done.
        """
        seconds, amount = parse_duration(deadline), parse_size(size)
        message = messages.Reclaim(donor=donor, size=amount, deadline=seconds, holder=holder)
        return self._request(message, messages.Reclaimed, timeout_s=message.patience, once=True)

    def lend(self, donor: str, holder: str = auth.OPERATOR) -> int:
        """A donor may lend again what this holder took back from it. Returns how many bytes; 0 if it took nothing.

        Only the tenant `operator` may. Raises AccessError, UsageError, BrokerUnavailable, DeadlineExceeded.
        """
        return self._request(messages.Lend(donor=donor, holder=holder), messages.Lent).size

    def close(self) -> None:
        """Ends the session. Its leases are freed at once. Closing twice does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, self._loop = self._loop, None
            self._keepers.clear()  # the broker tells of each lease that it frees now
        for store in self._stores.values():
            store.shut()
        for region in self._regions.values():
            region.shut()
        if loop is not None:
            loop.stop(_CLOSE_S)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- for stores and regions -----------------------------------------------------------------------

    def ensure_open(self) -> None:
        """Raises ClosedError. In a forked child, starts its own session if there is none yet."""
        self._running()

    def locate(self, lease: bytes, timeout_s: float) -> messages.Place:
        """Where a lease is now, with a fresh ticket. Raises LeaseLost, BrokerUnavailable and others."""
        return self._request(messages.Locate(lease=lease), messages.Located, timeout_s=timeout_s).place

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Calls it in the control thread after so long, unless the session has ended by then."""
        loop = self._loop
        if loop is not None:
            loop.later(delay_s, action)

    def dropped(self, spec: messages.StoreSpec) -> int | None:
        """How many keys of a store were dropped; None when the broker cannot be asked now."""
        try:
            report = self._request(messages.Status(), messages.StatusReport, timeout_s=min(self.timeout, _DETAIL_S))
        except TransportError:
            return None
        return next((one.dropped for one in report.stores if one.spec.store == spec.store), None)

    def close_store(self, store: Store) -> None:
        with self._lock:
            self._stores.pop(store.spec.store, None)
            for keeper in store.keepers:
                self._keepers.pop(keeper.place.lease, None)
        self._leave_store(store.spec.store)

    def close_region(self, region: Region) -> None:
        with self._lock:
            self._regions.pop(region.lease, None)
            self._keepers.pop(region.lease, None)
            loop = self._loop
        if loop is not None and loop.control.session == region.owner:
            self._release_lease(region.lease)

    def _leave_store(self, identity: bytes) -> None:
        self._tell(messages.CloseStore(store=identity), lambda: self._held_stores.discard(identity))

    def _release_lease(self, lease: bytes) -> None:
        self._tell(messages.ReleaseLease(lease=lease), lambda: self._held_regions.discard(lease))

    def _tell(self, message: messages.Message, drop: Callable[[], None]) -> None:
        """Gives something back. A broker that is away learns it from what we say after a reconnect."""
        try:
            loop = self._running()

            async def tell() -> None:
                drop()
                await loop.control.request(message, messages.Done, min(self.timeout, _CLOSE_S))

            loop.call(tell)
        except MemfaasError as error:
            log.info("%s: %s", type(message).__name__, error)

    def _request(
        self,
        message: messages.Message,
        reply: type[R],
        timeout_s: float | None = None,
        once: bool = False,
    ) -> R:
        control = (loop := self._running()).control

        async def ask() -> R:
            patience = self.timeout if timeout_s is None else timeout_s
            return await control.request(message, reply, patience, once=once)

        return loop.call(ask)

    def _obtain(
        self,
        message: messages.Message,
        reply: type[R],
        hold: Callable[[Control, R], object],
        give_back: Callable[[R], messages.Message],
    ) -> R:
        """Asks the broker for something to hold. An interrupted caller (Ctrl-C) gives it back when it comes."""
        control = (loop := self._running()).control
        lock = threading.Lock()
        answers: list[R] = []
        abandoned = False

        async def ask() -> R:
            answer = await control.request(message, reply, self.timeout)
            with lock:
                if not abandoned:
                    hold(control, answer)
                    answers.append(answer)
            if not answers:
                await control.request(give_back(answer), messages.Done, self.timeout)
            return answer

        try:
            return loop.call(ask, cancel=False)
        except MemfaasError:
            raise
        except BaseException:
            with lock:
                abandoned = True
            if answers:  # it had come already
                self._request(give_back(answers[0]), messages.Done)
            raise

    # --- called by the control thread ---------------------------------------------------------------

    def holdings(self) -> Holdings:
        return Holdings(list(self._held_stores), list(self._held_regions))

    def fabrics(self) -> dict[str, int]:
        counts = Counter[str]()
        for store in list(self._stores.values()):
            counts.update(store.fabrics())
        counts.update(region.fabric for region in list(self._regions.values()) if region.fabric)
        return dict(counts)

    def on_gone(self, lease: bytes, reason: str) -> None:
        self._held_regions.discard(lease)
        keeper = self._keepers.get(lease)
        if keeper is not None:
            keeper.lose(reason)

    def on_dropped(self, lease: bytes, reason: str) -> None:
        keeper = self._keepers.get(lease)
        if keeper is not None:
            keeper.drop(reason)

    def on_moved(self, place: messages.Place) -> None:
        keeper = self._keepers.get(place.lease)
        if keeper is not None:
            keeper.moved(place)

    # --- fork and exit --------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In the child: lets go of the parent's connection. Its thread is not here."""
        self._lock = threading.Lock()
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.control.close_after_fork()
        self._held_regions.clear()
        for keeper in self._keepers.values():
            keeper.after_fork()


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_sessions):
        session.after_fork()


def _close_all() -> None:
    for session in list(_sessions):
        session.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)


def _check_choice(option: str, given: object, choices: object) -> None:
    allowed = get_args(choices)
    if given not in allowed:
        raise UsageError(f"{option}={given!r}: expected one of {', '.join(map(repr, allowed))}")
