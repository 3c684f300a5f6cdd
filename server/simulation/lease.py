"""One lease in the memory of a simulated donor."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from memfaas.errors import TransportError
from memfaas.messages import Arrived, HeldLease, LeaseGone, LeaseSpec, Relocate, Target
from memfaas.server.victims import HoldingState, Moved, may_drop
from memfaas.units import KIB, MIB

if TYPE_CHECKING:
    from memfaas.server.simulation.donor import SimulatedDonor

_GRAIN = 256 * KIB
"""What is punched out, and what is copied again when it was written, comes in spans."""
_VALUE = 64 * KIB
_SLOWEST_WRITES, _FASTEST_WRITES = 64 * KIB, 256 * MIB


@dataclass(frozen=True)
class Load:
    """What clients do with a lease; the same wherever it is."""

    share: float
    """Of its memory that is in use."""
    writes: float
    """Bytes per second."""

    @classmethod
    def of(cls, lease: bytes) -> Load:
        """By its identity: half to all of it is in use, and writes differ by orders of magnitude."""
        draw = hashlib.blake2b(lease, digest_size=8, person=b"load").digest()
        first, second = int.from_bytes(draw[:4], "big") / 2**32, int.from_bytes(draw[4:], "big") / 2**32
        slowest, fastest = math.log(_SLOWEST_WRITES), math.log(_FASTEST_WRITES)
        return cls(0.5 + first / 2, math.exp(slowest + second * (fastest - slowest)))


class SimulatedLease:
    """A `Holding` that counts bytes."""

    def __init__(self, donor: SimulatedDonor, spec: LeaseSpec, state: HoldingState) -> None:
        self.spec = spec
        self.load = Load.of(spec.lease)
        self.punched = 0
        self.copying = trio.CancelScope()
        """Of the copy that comes or goes."""
        self.gone = trio.Event()
        self._donor = donor
        self._state = state
        self._size = donor.cost(spec.kind, spec.size)

    @property
    def state(self) -> HoldingState:
        return self._state

    @property
    def bytes(self) -> int:
        return 0 if self.gone.is_set() else self._size - self.punched

    def activity(self) -> float:
        return self._donor.rules.activity_counts * self.load.writes / _VALUE

    # --- smaller and larger -------------------------------------------------------------------------

    async def punch(self, size: int) -> int:
        free = int(self.spec.size * (1 - self.load.share)) - self.punched
        punched = min(-(-size // _GRAIN), free // _GRAIN) * _GRAIN
        if punched <= 0:
            return 0
        await self._donor.give_back(punched)
        self.punched += punched
        return punched

    async def unpunch(self) -> None:
        await trio.lowlevel.checkpoint()
        self.punched = 0

    # --- away ---------------------------------------------------------------------------------------

    async def move(self, deadline: float) -> Moved:
        self._state, self.copying = "moving", trio.CancelScope()
        try:
            request = Relocate(
                lease=self.spec.lease, epoch=self.spec.epoch, timeout=max(0.0, deadline - trio.current_time())
            )
            target = await self._donor.ask(request, Target, deadline)
            pause = await self._send(self._donor.neighbour(target.place.donor), deadline)
        finally:
            if self._state == "moving":
                self._state = "serving"
        await self._end()
        return Moved(spill=target.spill, pause=pause)

    async def _send(self, there: SimulatedDonor, deadline: float) -> float:
        """Returns the seconds for which nobody served it."""
        copy = there.waiting_for(self.spec.lease)
        complete = False
        try:
            with self.copying, copy.copying, trio.move_on_at(deadline):
                pause = await self._copy(there.name)
                complete = True
        finally:
            if not complete:
                copy.discard()
        if not complete:
            raise TransportError(f"it could not be copied to {there.name} in time")
        self._state = "ending"
        copy.serve()
        return pause

    async def _copy(self, there: str) -> float:
        """All that is in use, and then once more, while nobody may write, what was written meanwhile."""
        began = trio.current_time()
        size = int(self.spec.size * self.load.share)
        await self._donor.network.copy(self._donor.name, there, size)
        frozen_at = trio.current_time()
        written = int(self.load.writes * (frozen_at - began)) // _GRAIN * _GRAIN
        await self._donor.network.copy(self._donor.name, there, min(size, written))
        return trio.current_time() - frozen_at

    async def evict(self, reason: str) -> int:
        if self._state == "ending":
            await self.gone.wait()
            return 0
        keys = int(self.spec.size * self.load.share) // _VALUE if may_drop(self.spec) else None
        if self._state == "arriving":
            keys = None
        self._state = "ending"
        self.copying.cancel()
        await self._end()
        self._donor.tell(LeaseGone(lease=self.spec.lease, reason=reason, dropped=keys))
        return keys or 0

    async def end(self) -> None:
        """It is over, and nobody need be told."""
        if self._state == "ending":
            await self.gone.wait()
        else:
            self._state = "ending"
            self.copying.cancel()
            await self._end()

    async def _end(self) -> None:
        await self._donor.give_back(self.bytes)
        self.gone.set()
        self._donor.forget(self)

    # --- where it comes to ----------------------------------------------------------------------------

    def serve(self) -> None:
        """All of it has come."""
        self._state = "serving"
        self._donor.tell(Arrived(held=HeldLease(spec=self.spec, endpoint=self._donor.endpoint)))

    def discard(self) -> None:
        """No more of it will come."""
        if self._state == "arriving":
            self._donor.in_background(self.evict, "it did not come")
