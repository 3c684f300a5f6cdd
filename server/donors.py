"""What a donor may ask of the broker, and say to it."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import trio

from memfaas import _accept, rpc
from memfaas.errors import AccessError, DeadlineExceeded, LeaseLost, MemfaasError, ProtocolError, UsageError
from memfaas.messages import (
    Arrived,
    DonorReport,
    Granted,
    LeaseGone,
    Message,
    Receive,
    Reclaimed,
    Register,
    Registered,
    Relocate,
    Settle,
    Settled,
    Target,
    short,
)
from memfaas.server.places import place

if TYPE_CHECKING:
    from memfaas.server.broker import Broker

_RECEIVE_S = 10.0
_COPY_MARGIN_S = 5.0
"""How much longer than its sender has time a donor waits for a copy: the end of it may just have been sent."""

logger = logging.getLogger(__name__)


class DonorPeer:
    """One connection of a donor."""

    channel: rpc.Channel

    def __init__(self, broker: Broker, name: str) -> None:
        self._broker = broker
        self._name = name
        self._registered = False

    async def on_request(self, message: Message) -> Message:
        if isinstance(message, Register) != self._registered:
            match message:
                case Register():
                    return self._register(message)
                case Relocate():
                    return await self._broker.detached(lambda: self._relocate(message))
                case Settle():
                    return self._settle(message)
        raise ProtocolError(f"a donor does not ask {type(message).__name__} now")

    def on_notice(self, message: Message) -> None:
        if not self._registered:
            raise ProtocolError("a donor registers first")
        match message:
            case DonorReport():
                self._broker.donor_reported(self._name, message)
            case LeaseGone():
                self._broker.donor_lost(self._name, message)
            case Arrived():
                self._broker.lease_arrived(self._name, message.held)
            case Reclaimed():
                self._broker.tables.accounts.donor_reclaimed(self._name, message.freed, message.in_time)
            case _:
                raise ProtocolError(f"a donor does not say {type(message).__name__}")

    def ended(self) -> None:
        self._broker.donor_ended(self._name, self.channel)

    def _register(self, message: Register) -> Registered:
        if message.donor != _accept.donor_name(self._name):
            raise AccessError(f"donor {self._name!r} registers as {message.donor!r}")
        reply = self._broker.donor_opened(message, self.channel)
        self._registered = True
        return reply

    # --- leases that move -----------------------------------------------------------------------

    async def _relocate(self, message: Relocate) -> Target:
        """Another donor for a lease, ready to receive it. One that fails is left out, and then the next is asked.

        Raises CapacityError when none is left; LeaseLost; DeadlineExceeded.
        """
        if not 0 < message.timeout < math.inf:
            raise UsageError(f"a lease cannot move within {message.timeout:g} s")
        tables, grants, courier = self._broker.tables, self._broker.grants, self._broker.courier
        deadline = trio.current_time() + message.timeout
        excluded = set(message.avoid)
        while True:
            lease = tables.movable(self._name, message.lease, message.epoch)
            target = await grants.place_lease(lease, excluded | courier.silent, until=deadline)
            lease = tables.movable(self._name, message.lease, message.epoch)  # that may have taken a while
            left = deadline - trio.current_time()
            if left <= 0:
                raise DeadlineExceeded(f"no donor was ready for lease {short(message.lease)} in time")
            move, spec = tables.begin_move(lease, target, left + _COPY_MARGIN_S)
            others = grants.has_place(lease, excluded | courier.silent)
            try:
                # One that hangs costs a third of the time that is left, so that there is some for others.
                request = Receive(spec=spec, timeout=left + _COPY_MARGIN_S)
                patience = min(_RECEIVE_S, left / 3 if others else left)
                granted = await courier.ask(target, request, Granted, patience, withdraw=True)
            except MemfaasError as error:
                logger.warning("lease %s: cannot move to donor %s: %s", short(message.lease), target, error)
                excluded.add(target)
                outcome = tables.move_over(lease, move, str(error))
                if isinstance(error, DeadlineExceeded):
                    courier.distrust(target, outcome)
                else:
                    courier.in_background(outcome)
                continue
            if not tables.move_ready(lease, move, granted.memory):
                courier.in_background(tables.move_over(lease, move, "it did not move after all"))
                raise LeaseLost(f"lease {short(message.lease)} ended, or moves elsewhere")
            logger.info("lease %s: may move from %s to %s", short(message.lease), self._name, target)
            return Target(
                place=place(spec, target, granted.endpoint, self._broker.secret), spill=tables.donors[target].spill
            )

    def _settle(self, message: Settle) -> Settled:
        settled, outcome = self._broker.tables.settle(self._name, message.lease, message.epoch, message.donor)
        logger.info(
            "lease %s: %s at epoch %d, says the broker to donor %s",
            short(message.lease),
            "moved, and is" if settled.moved else "did not move, and goes on",
            settled.epoch,
            self._name,
        )
        self._broker.courier.in_background(outcome)
        return settled
