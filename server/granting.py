"""New leases: the broker chooses donors for them, and has them granted there."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import trio

from memfaas.errors import CapacityError, ClosedError, LeaseLost, MemfaasError
from memfaas.messages import Grant, Granted, OpenStore, StoreSpec, short
from memfaas.server.records import Lease, Outcome, Room, State, Store, ToFree

if TYPE_CHECKING:
    from memfaas.server.broker import Broker

RETURN_S = 3.0
"""How long a request waits for donors that are known to be on their way back."""
_GRANT_S = 10.0
_ROUNDS = 4

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Grants:
    """Beside the broker, whose donors it asks."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._tables = broker.tables
        self._placer = broker.placer

    async def new_store(self, session: bytes, tenant: str, request: OpenStore, size: int) -> Store | None:
        """A new store with all its shards granted; None when another has begun one of that name, or ended ours.

        Raises CapacityError, TransportError, ClosedError.
        """

        async def begin(excluded: set[str]) -> list[Lease]:
            try:
                placement = await self._place(lambda rooms: self._placer.store(size, rooms), excluded)
            except CapacityError:
                if self._tables.find_store(tenant, request.name) is None:
                    raise
                return []  # the room went to a store of this very name, which another session has begun
            self._check_open(session)
            if self._tables.find_store(tenant, request.name) is not None:
                return []
            spec = StoreSpec(
                store=secrets.token_bytes(16),
                name=request.name,
                tenant=tenant,
                size=placement.shard_size * len(placement.donors),
                shards=len(placement.donors),
                shard_size=placement.shard_size,
                persistent=request.persistent,
                compression=request.compression,
                on_reclaim=request.on_reclaim,
            )
            return self._tables.begin_store(session, spec, placement.donors)

        def undo(leases: list[Lease], reason: str) -> Outcome:
            return self._tables.abandon_store(_store_of(leases), reason)

        leases = await self._begin(begin, undo)
        store = self._tables.stores.get(_store_of(leases)) if leases else None
        if store is None:
            return None
        donors = [lease.donor for lease in leases]
        logger.info("store %s of %s: made, %d shards on %s", request.name, tenant, len(leases), donors)
        self._broker.announce()
        return store

    async def new_region(self, session: bytes, tenant: str, size: int) -> Lease:
        """A new region, granted. Raises like `new_store`."""

        async def begin(excluded: set[str]) -> list[Lease]:
            donor = await self._place(lambda rooms: self._placer.region(size, rooms), excluded)
            self._check_open(session)
            return [self._tables.begin_region(session, tenant, secrets.token_bytes(16), size, donor)]

        def undo(leases: list[Lease], reason: str) -> Outcome:
            return self._tables.abandon_region(leases[0].spec.lease, reason)

        (lease,) = await self._begin(begin, undo)
        logger.info("lease %s of %s: granted on %s", short(lease.spec.lease), tenant, lease.donor)
        return lease

    def _check_open(self, session: bytes) -> None:
        if session not in self._tables.sessions:
            raise ClosedError("the session was closed")

    async def regrant(self, lease: Lease) -> None:
        """A shard that was dropped gets memory anew, and is empty. Raises CapacityError, TransportError."""

        async def begin(excluded: set[str]) -> list[Lease]:
            if lease.state is not State.DROPPED:
                return []
            donor = await self.place_lease(lease, excluded)
            if lease.state is not State.DROPPED or self._tables.leases.get(lease.spec.lease) is not lease:
                return []  # somebody was quicker, or its store is over
            self._tables.begin_again(lease, donor)
            return [lease]

        def undo(leases: list[Lease], reason: str) -> Outcome:
            return self._tables.not_begun_again(lease, reason)

        if await self._begin(begin, undo):
            logger.info("lease %s: granted anew on %s", short(lease.spec.lease), lease.donor)
            self._broker.announce()

    async def _begin(
        self, begin: Callable[[set[str]], Awaitable[list[Lease]]], undo: Callable[[list[Lease], str], Outcome]
    ) -> list[Lease]:
        """Begins leases, somewhere but on those donors, and has them granted; some times, until that succeeds.

        Nothing is returned when `begin` finds nothing to do. Raises what `begin` does, and what the donors do.
        """
        excluded: set[str] = set()
        failure: MemfaasError | None = None
        for _ in range(_ROUNDS):
            leases = await begin(excluded)
            failure = await self._grant(leases, excluded)
            if failure is None:
                return leases
            await self._broker.courier.carry_out(undo(leases, f"it could not be granted: {failure}"))
        assert failure is not None
        raise failure

    async def place_lease(self, lease: Lease, excluded: set[str], until: float = math.inf) -> str:
        """A donor for a lease that nobody has, or for a copy of one. Raises CapacityError."""

        def choose(rooms: list[Room]) -> str:
            return self._choose(lease, rooms)

        return await self._place(choose, excluded, lambda: self._tables.rooms_for(lease), until)

    def has_place(self, lease: Lease, excluded: set[str]) -> bool:
        """Whether another donor than those, and than those that have it or get it, has room for it now."""
        try:
            self._choose(lease, [room for room in self._tables.rooms_for(lease) if room.donor not in excluded])
        except CapacityError:
            return False
        return True

    def _choose(self, lease: Lease, rooms: list[Room]) -> str:
        return self._placer.lease(
            lease.spec.kind, lease.spec.size, rooms if lease.donor else self._placer.lendable(rooms)
        )

    async def _place(
        self,
        choose: Callable[[list[Room]], T],
        excluded: set[str],
        rooms: Callable[[], list[Room]] | None = None,
        until: float = math.inf,
    ) -> T:
        """Waits a moment for room while donors are on their way back."""
        limit = min(until, trio.current_time() + RETURN_S)
        rooms = rooms or self._tables.rooms
        while True:
            changed = self._broker.changed
            try:
                return choose([room for room in rooms() if room.donor not in excluded])
            except CapacityError as error:
                failure = error
            with trio.move_on_at(min(limit, self._donors_back_by())) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                left_out = f" (left out, because a grant failed there: {', '.join(excluded)})" if excluded else ""
                raise CapacityError(f"{failure}{left_out}")

    def _donors_back_by(self) -> float:
        away = [donor.away_since + RETURN_S for donor in self._tables.donors.values() if not donor.connected]
        return max([self._broker.settled_at, *away])

    async def _grant(self, leases: list[Lease], excluded: set[str]) -> MemfaasError | None:
        """Asks the donors of all the leases at once; returns one of the failures, if there are any."""
        failures: list[MemfaasError] = []
        courier = self._broker.courier

        async def grant(lease: Lease, donor: str) -> None:
            try:
                granted = await courier.ask(donor, Grant(spec=lease.spec), Granted, _GRANT_S, withdraw=True)
            except MemfaasError as error:
                logger.warning("lease %s: donor %s: %s", short(lease.spec.lease), donor, error)
                failures.append(error)
                ended = self._tables.leases.get(lease.spec.lease) is not lease  # which is not the donor's fault
                if not ended and not isinstance(error, CapacityError):  # then its next report says what it has
                    excluded.add(donor)
                return
            if not self._tables.granted(donor, lease.spec.lease, granted.endpoint, granted.memory):
                # Its end was told to the donor perhaps before the donor had begun.
                await courier.free(ToFree(donor, lease.spec.lease, "it ended while it was being granted"))
                failures.append(LeaseLost(f"lease {short(lease.spec.lease)} ended while it was being granted"))

        async with trio.open_nursery() as nursery:
            for lease in leases:
                nursery.start_soon(grant, lease, lease.donor)
        return failures[0] if failures else None


def _store_of(shards: list[Lease]) -> bytes:
    spec = shards[0].spec.store
    assert spec is not None
    return spec.store
