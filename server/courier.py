"""What the broker says by itself: it asks donors, and tells donors and sessions what has ended or moved."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from memfaas import rpc
from memfaas.errors import MemfaasError, TransportError
from memfaas.messages import Free, Freed, LeaseGone, LeaseMoved, Message, short
from memfaas.server.places import place_of
from memfaas.server.records import Outcome, State, ToDirect, ToFree, ToTell
from memfaas.server.tables import Tables

_FREE_S = 60.0
"""A donor gives 4 KiB pages back at a few GiB/s, so a large lease takes a while."""
_NOTICE_S = 5.0

Work = Callable[[], Awaitable[None]]
R = TypeVar("R", bound=Message)
logger = logging.getLogger(__name__)


class Courier:
    """`announce` is called when something has come of what was said; `spawn` has something done in the background."""

    def __init__(
        self, tables: Tables, secret: bytes, announce: Callable[[], None], spawn: Callable[[Work], None]
    ) -> None:
        self.donors: dict[str, rpc.Channel] = {}
        """By name, those that are connected."""
        self.sessions: dict[bytes, rpc.Channel] = {}
        self.silent: set[str] = set()
        """Donors that seem to hang: no lease moves there."""
        self._tables = tables
        self._secret = secret
        self._announce = announce
        self._spawn = spawn

    async def ask(self, donor: str, message: Message, reply: type[R], timeout_s: float, *, withdraw: bool = False) -> R:
        """Asks a donor. Raises what it answers, TransportError, DeadlineExceeded.

        `withdraw`: it need not do it any more when nobody waits for it.
        """
        channel = self.donors.get(donor)
        if channel is None:
            raise TransportError(f"donor {donor} is not connected")
        return await channel.request(message, reply, timeout_s, withdraw=withdraw)

    async def carry_out(self, outcome: Outcome) -> None:
        """Says to donors and sessions what has ended or moved. A donor that is away is told when it comes back."""
        async with trio.open_nursery() as nursery:
            for telling in outcome.tell:
                nursery.start_soon(self._tell, telling)
            for directing in outcome.moved:
                nursery.start_soon(self._direct, directing)
            for freeing in outcome.free:
                nursery.start_soon(self.free, freeing)
        self._announce()

    def in_background(self, outcome: Outcome) -> None:
        self._spawn(partial(self.carry_out, outcome))

    def distrust(self, donor: str, outcome: Outcome) -> None:
        """It did not answer in time. It is left alone until it has done this, or has come back."""
        self.silent.add(donor)

        async def until_it_answers() -> None:
            await self.carry_out(outcome)
            self.silent.discard(donor)
            self._announce()

        self._spawn(until_it_answers)

    async def _tell(self, telling: ToTell) -> None:
        """One that is away hears of it from its next renewal."""
        notice = LeaseGone(lease=telling.lease, reason=telling.reason, dropped=telling.dropped)
        await self._notify(telling.session, notice)

    async def _direct(self, directing: ToDirect) -> None:
        """One that is away asks when it does not find the lease where it was."""
        lease = self._tables.leases.get(directing.lease)
        if lease is not None and lease.state is State.HELD:
            await self._notify(directing.session, LeaseMoved(place=place_of(lease, self._secret)))

    async def _notify(self, session: bytes, notice: Message) -> None:
        channel = self.sessions.get(session)
        if channel is None:
            return
        try:
            with trio.move_on_after(_NOTICE_S):
                await channel.notify(notice)
        except TransportError:
            pass

    async def free(self, freeing: ToFree) -> None:
        channel = self.donors.get(freeing.donor)
        if channel is None:
            return
        try:
            freed = await channel.request(Free(lease=freeing.lease, reason=freeing.reason), Freed, _FREE_S)
        except MemfaasError as error:
            logger.warning("lease %s: donor %s did not free it: %s", short(freeing.lease), freeing.donor, error)
            await channel.aclose()  # when it registers again it is told once more
        else:
            self._tables.freed(freeing.donor, freeing.lease, freed.memory)
