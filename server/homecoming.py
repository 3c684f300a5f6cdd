"""Leases that went to a spill donor come home when some donor has room for them in memory again.

Only room that has lasted counts, and a spill donor sends one lease at a time: what is free for a moment
only would be taken back in the next, and moves cost the nodes that they are to help.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import trio

from memfaas.errors import MemfaasError
from memfaas.messages import Done, MoveAway, short
from memfaas.server.records import Donor, Lease, State

if TYPE_CHECKING:
    from memfaas.server.broker import Broker

LASTING_S = 5.0
"""For so long there must have been room for a lease."""
LOOK_S = 1.0
_MOVE_S = 300.0
_LONGEST_PAUSE_S = 300.0
"""After moves that failed; it doubles up to this."""

logger = logging.getLogger(__name__)


class Homecoming:
    """Runs within `run`, beside the broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._tables = broker.tables
        self._room_since: dict[bytes, float] = {}
        self._pauses: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._under_way: set[str] = set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._broker.wait_until(lambda: any(self._leases(donor) for donor in self._donors()), math.inf)
                for donor, lease in self.due(trio.current_time()):
                    self._under_way.add(donor)
                    nursery.start_soon(self._bring_home, donor, lease)
                await trio.sleep(LOOK_S)

    def due(self, now: float) -> list[tuple[str, Lease]]:
        """What to move now: for each spill donor one lease at most, the one that matters most to its tenant."""
        rooms = self._broker.placer.lendable(self._tables.rooms())
        most = max((room.free for room in rooms if not room.spill), default=0)
        fitting = {
            donor.name: [lease for lease in self._leases(donor) if lease.cost <= most] for donor in self._donors()
        }
        room_since = self._room_since
        self._room_since = {
            lease.spec.lease: room_since.get(lease.spec.lease, now) for leases in fitting.values() for lease in leases
        }
        found = []
        for donor, leases in fitting.items():
            if donor in self._under_way or self._not_before.get(donor, now) > now:
                continue
            if any(lease.moving for lease in leases):
                continue
            lasting = [lease for lease in leases if now - self._room_since[lease.spec.lease] >= LASTING_S]
            if lasting:
                found.append((donor, min(lasting, key=_order)))
        return found

    def _donors(self) -> list[Donor]:
        return [donor for donor in self._tables.donors.values() if donor.spill and donor.connected]

    def _leases(self, donor: Donor) -> list[Lease]:
        leases = (self._tables.leases[identity] for identity in donor.leases)
        return [lease for lease in leases if lease.state is State.HELD]

    async def _bring_home(self, donor: str, lease: Lease) -> None:
        identity = lease.spec.lease
        logger.info("lease %s: there is room in memory again, so it leaves donor %s", short(identity), donor)
        deadline = trio.current_time() + _MOVE_S
        try:
            await self._broker.courier.ask(donor, MoveAway(lease=identity), Done, _MOVE_S)
            await self._broker.wait_until(lambda: lease.moving is None, deadline)
        except MemfaasError as error:
            logger.warning("lease %s: it stays on donor %s for now: %s", short(identity), donor, error)
        finally:
            self._under_way.discard(donor)
        if lease.donor == donor and self._tables.leases.get(identity) is lease:
            self._pauses[donor] = min(_LONGEST_PAUSE_S, 2 * self._pauses.get(donor, LASTING_S))
            self._not_before[donor] = trio.current_time() + self._pauses[donor]
        else:
            self._pauses.pop(donor, None)


def _order(lease: Lease) -> tuple[bool, int, int]:
    return lease.spec.borrowed, -lease.spec.priority, lease.cost
