"""A donor agent whose node has no memory but numbers."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from memfaas.errors import CapacityError, ProtocolError, TransportError
from memfaas.messages import (
    Done,
    DonorReport,
    Endpoint,
    Free,
    Freed,
    Grant,
    Granted,
    Kind,
    Lend,
    Lent,
    Memory,
    Message,
    MoveAway,
    Receive,
    Reclaim,
    Reclaimed,
    Register,
    Registered,
)
from memfaas.server.governor import CALM_S, PAUSE_S, Governor, Reading, margin
from memfaas.server.placement import LANDING
from memfaas.server.pressure import DEADLINE_S, HOLDER
from memfaas.server.reclaim import MOVES_AT_ONCE, Reclaimer
from memfaas.server.simulation.channel import DirectChannel
from memfaas.server.simulation.lease import SimulatedLease
from memfaas.server.simulation.network import Network

_REPORT_S = 0.001
"""After which the broker hears that a donor offers less; its memory may take longer to come back."""

R = TypeVar("R", bound=Message)


@dataclass(frozen=True)
class Node:
    """What a donor's node is. Sizes in bytes."""

    name: str
    size: int
    base: int
    """What runs on it always."""
    headroom: int
    spill: bool = False


@dataclass(frozen=True)
class Rules:
    """What can be tried otherwise than it is."""

    moves_at_once: int = MOVES_AT_ONCE
    """Of one reclaim."""
    calm_s: float = CALM_S
    """Seconds after which a donor lends again what programs that nobody announced had."""
    landing: float = LANDING
    """Share of what donors offer that is kept for leases that must leave others."""
    activity_counts: int = 1
    """Of leases that would do as well as each other, the least active ones leave first; -1: the most active, 0: any."""


AS_IT_IS = Rules()


class SimulatedDonor:
    """`cost` gives what a lease takes, `free_rate` what the kernel takes back, in bytes per second."""

    def __init__(
        self,
        node: Node,
        network: Network,
        cost: Callable[[Kind, int], int],
        neighbour: Callable[[str], SimulatedDonor],
        *,
        free_rate: float,
        rules: Rules,
    ) -> None:
        self.node = node
        self.name = node.name
        self.network = network
        self.cost = cost
        self.neighbour = neighbour
        self.rules = rules
        self.used = node.base
        """Bytes that are in use on the node, without what is lent."""
        self.leases: dict[bytes, SimulatedLease] = {}
        self.endpoint = Endpoint(node=node.name, unix_path="", host=node.name, port=1)
        self.reclaimer = Reclaimer(
            node.name,
            lambda: list(self.leases.values()),
            nominal=max(0, node.size - node.base - (0 if node.spill else node.headroom + margin(node.headroom))),
            evict_rate=int(free_rate),
            moves_at_once=rules.moves_at_once,
        )
        self._governor = Governor(node.headroom, trio.current_time, calm_s=rules.calm_s)
        self._scarce = trio.Event()
        """Something was taken back that may be lent again."""
        self._free_rate = free_rate
        self._freeing = trio.Lock()
        self._channel: DirectChannel
        self._nursery: trio.Nursery

    async def run(self, channel: DirectChannel, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Registers with the broker at the other end; then goes on until cancelled."""
        self._channel = channel
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.reclaimer.run)
            register = Register(
                donor=self.name,
                node=self.name,
                host=self.name,
                memory=self.memory(),
                held=[],
                spill=self.node.spill,
            )
            await channel.request(register, Registered)
            task_status.started()
            if self.node.spill:
                await trio.sleep_forever()
            await self._keep_looking()

    def memory(self) -> Memory:
        populated = sum(one.bytes for one in self.leases.values())
        return Memory(
            offered=self.reclaimer.offered,
            leased=populated + sum(one.punched for one in self.leases.values()),
            populated=populated,
            available=max(0, self.node.size - self.used - populated),
            headroom=self.node.headroom,
        )

    # --- what the broker asks -------------------------------------------------------------------------

    async def on_request(self, message: Message) -> Message:
        if isinstance(message, Grant):
            self._make(SimulatedLease(self, message.spec, "serving"))
            return Granted(endpoint=self.endpoint, memory=self.memory())
        if isinstance(message, Receive):
            self._make(SimulatedLease(self, message.spec, "arriving"))
            return Granted(endpoint=self.endpoint, memory=self.memory())
        if isinstance(message, Free):
            lease = self.leases.get(message.lease)
            if lease is not None:
                await lease.end()
            return Freed(memory=self.memory())
        if isinstance(message, Reclaim):
            return await self.reclaim(message.size, message.deadline, message.holder, in_all=message.in_all)
        if isinstance(message, Lend):
            return Lent(size=self.lend(message.holder))
        if isinstance(message, MoveAway):
            await self.leases[message.lease].move(math.inf)
            return Done()
        raise ProtocolError(f"a donor does not answer {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"the broker does not say {type(message).__name__}")

    def _make(self, lease: SimulatedLease) -> None:
        if lease.spec.lease in self.leases:
            raise CapacityError("another copy of it is still being freed here")
        if self.reclaimer.used + lease.bytes > self.reclaimer.offered:
            raise CapacityError(f"donor {self.name} does not offer so much")
        self.leases[lease.spec.lease] = lease

    async def reclaim(self, size: int, deadline_s: float, holder: str, *, in_all: bool = False) -> Reclaimed:
        """Like the reclaimer's, and the broker hears what is lent now."""
        results: list[Reclaimed] = []

        async def take_back() -> None:
            results.append(await self.reclaimer.reclaim(size, deadline_s, holder, in_all=in_all))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_back)
            await trio.sleep(_REPORT_S)
            self.report()
        self.report()
        return results[0]

    def lend(self, holder: str, size: int | None = None) -> int:
        lent = self.reclaimer.lend(holder, size)
        self.report()
        return lent

    # --- what it sees on its node ---------------------------------------------------------------------

    async def look(self) -> Reclaimed | None:
        """As its watch does when memory has changed: takes back what is missing; returns what came of it."""
        change = self._governor.decide(self._reading())
        if change < 0:
            reclaimed = await self.reclaim(-change, DEADLINE_S, HOLDER)
            self._scarce.set()
            return reclaimed
        if change > 0:
            self.lend(HOLDER, change)
        return None

    async def _keep_looking(self) -> None:
        """While something may be lent again; what else changes is said by `look`."""
        while True:
            await self._scarce.wait()
            while HOLDER in self.reclaimer.reclaimed:
                await trio.sleep(PAUSE_S)
                await self.look()
            self._scarce = trio.Event()

    def _reading(self) -> Reading:
        memory = self.memory()
        return Reading(
            available=memory.available,
            populated=memory.populated,
            offered=memory.offered,
            reclaimed=self.reclaimer.reclaimed.get(HOLDER, 0),
        )

    # --- what leases need -----------------------------------------------------------------------------

    async def ask(self, message: Message, reply: type[R], deadline: float) -> R:
        return await self._channel.request(message, reply, max(0.0, deadline - trio.current_time()))

    def tell(self, message: Message) -> None:
        self._channel.tell(message)

    def report(self) -> None:
        populated = {lease: one.bytes for lease, one in self.leases.items()}
        self.tell(
            DonorReport(memory=self.memory(), links={}, populated=populated, reclaimed=dict(self.reclaimer.reclaimed))
        )

    def in_background(self, task: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(task, *args)

    def waiting_for(self, lease: bytes) -> SimulatedLease:
        """The lease that is to come here. Raises TransportError when it no longer is."""
        copy = self.leases.get(lease)
        if copy is None or copy.state != "arriving":
            raise TransportError(f"donor {self.name} does not wait for it any more")
        return copy

    async def give_back(self, size: int) -> None:
        """Returns when the kernel has so many bytes; it frees one thing after the other."""
        async with self._freeing:
            await trio.sleep(size / self._free_rate)

    def forget(self, lease: SimulatedLease) -> None:
        del self.leases[lease.spec.lease]
        self.reclaimer.changed()
