"""Leases that are nothing but numbers, on a node that frees as fast as it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import trio

from memfaas.errors import CapacityError, LeaseLost, TransportError
from memfaas.messages import LeaseSpec, OnReclaim, StoreSpec
from memfaas.server.victims import HoldingState, Moved

MoveFate = Literal["moves", "spills", "no room", "breaks", "hangs"]
PunchFate = Literal["punches", "fails", "hangs"]


@dataclass
class Node:
    """Its kernel frees one lease after the other, `rate` bytes a second."""

    rate: int
    leases: list[SimulatedLease] = field(default_factory=list)
    freeing: trio.Lock = field(default_factory=trio.Lock)

    def holdings(self) -> list[SimulatedLease]:
        return [one for one in self.leases if one.bytes > 0 or one.state != "ending"]

    @property
    def taken(self) -> int:
        return sum(one.bytes for one in self.leases)

    def lend(
        self,
        size: int,
        *,
        borrowed: bool = False,
        priority: int = 0,
        on_reclaim: OnReclaim = "migrate",
        activity: float = 0.0,
        spare: int = 0,
        move: MoveFate = "moves",
        move_s: float = 0.01,
        punch: PunchFate = "punches",
        state: HoldingState = "serving",
        refusals: int = 0,
    ) -> SimulatedLease:
        number = len(self.leases)
        store = StoreSpec(
            store=b"s" * 16,
            name="results",
            tenant="alice",
            size=size,
            shards=1,
            shard_size=size,
            persistent=False,
            compression="none",
            on_reclaim=on_reclaim,
        )
        spec = LeaseSpec(
            lease=number.to_bytes(16, "big"),
            tenant="alice",
            kind="shard",
            size=size,
            epoch=1,
            store=store,
            shard=number,
            priority=priority,
            borrowed=borrowed,
        )
        lease = SimulatedLease(
            self, spec, size, spare, move, move_s, punch, activity_rate=activity, state=state, refusals=refusals
        )
        self.leases.append(lease)
        return lease


@dataclass(eq=False)
class SimulatedLease:
    node: Node
    spec: LeaseSpec
    bytes: int
    spare: int
    """What could be punched out of it."""
    move_fate: MoveFate
    move_s: float
    punch_fate: PunchFate
    activity_rate: float = 0.0
    state: HoldingState = "serving"
    punched: int = 0
    moves_begun: int = 0
    refusals: int = 0
    """So many times it cannot be evicted."""
    ends: list[str] = field(default_factory=list)
    """What became of it: once at most."""

    def activity(self) -> float:
        return self.activity_rate

    async def punch(self, size: int) -> int:
        await trio.sleep(0.001 if self.punch_fate != "hangs" else float("inf"))
        if self.punch_fate == "fails":
            raise TransportError("the function died")
        if self.ends:
            raise LeaseLost("evicted")
        size = min(size, self.spare)
        self.spare -= size
        self.bytes -= size
        self.punched += size
        return size

    async def unpunch(self) -> None:
        await trio.sleep(0.001)
        if not self.ends:
            self.bytes += self.punched
            self.spare += self.punched
            self.punched = 0

    async def move(self, deadline: float) -> Moved:
        assert self.state == "serving"
        assert not self.ends
        self.moves_begun += 1
        self.state = "moving"
        try:
            if self.move_fate == "hangs":
                await trio.sleep_forever()
            await trio.sleep_until(min(deadline, trio.current_time() + self.move_s))
            if self.ends:
                raise LeaseLost("evicted")
            if trio.current_time() >= deadline:
                raise TransportError("the deadline has passed")
            if self.move_fate == "no room":
                raise CapacityError("no donor has room")
            if self.move_fate == "breaks":
                raise TransportError("the link broke")
            self._end("moved")
            return Moved(spill=self.move_fate == "spills", pause=0.002)
        finally:
            if not self.ends:
                self.state = "serving"

    async def evict(self, reason: str) -> int:
        if self.ends:
            return 0
        if self.refusals > 0:
            self.refusals -= 1
            raise TransportError("too many open files")
        async with self.node.freeing:
            await trio.sleep(self.bytes / self.node.rate)
            if not self.ends:
                self._end("evicted")
        return 7 if self.spec.store is not None and self.spec.store.on_reclaim == "drop" else 0

    def expire(self) -> None:
        """Its session released it."""
        if not self.ends:
            self._end("expired")

    def _end(self, how: str) -> None:
        self.ends.append(how)
        self.state = "ending"
        self.bytes = 0
        self.punched = 0
