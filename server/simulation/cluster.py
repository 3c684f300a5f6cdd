"""A broker, its donors, and clients that use what they lend, in one process."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import trio

from memfaas.errors import ProtocolError
from memfaas.messages import LeaseGone, Message, OpenSession, Renew, Renewed, SessionOpened
from memfaas.server.broker import SETTLE_S, Broker
from memfaas.server.donors import DonorPeer
from memfaas.server.placement import Placer
from memfaas.server.sessions import SessionPeer
from memfaas.server.simulation.channel import DirectChannel
from memfaas.server.simulation.donor import AS_IT_IS, Node, Rules, SimulatedDonor
from memfaas.server.simulation.network import Network

TTL_S = 3600.0
"""Long, because a renewal is nothing that a policy has to do with."""
_SECRET = bytes(32)

R = TypeVar("R", bound=Message)


class _Nobody(trio.abc.Listener[trio.SocketStream]):
    """Nobody comes over a network."""

    async def accept(self) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class Speeds:
    """Bytes per second."""

    link: float
    """What a node sends, and what it receives."""
    free: float
    """What a kernel takes back."""
    spill: float
    """What the scratch of a spill donor takes."""


class Client:
    """A session of one tenant, and what it was told about its leases."""

    def __init__(self, broker: Broker, tenant: str) -> None:
        peer = SessionPeer(broker, tenant)
        peer.channel = DirectChannel(self, f"session of {tenant}")
        self._channel = DirectChannel(peer, "broker")
        self._session = secrets.token_bytes(16)
        self.on_gone: Callable[[LeaseGone], None] = lambda _: None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Opens the session, and keeps it until cancelled."""
        await self.ask(OpenSession(session=self._session), SessionOpened)
        task_status.started()
        while True:
            await trio.sleep(TTL_S / 3)
            await self.ask(Renew(fabrics={}), Renewed)

    async def ask(self, message: Message, reply: type[R]) -> R:
        return await self._channel.request(message, reply)

    async def on_request(self, message: Message) -> Message:
        raise ProtocolError(f"a session does not answer {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        if isinstance(message, LeaseGone):
            self.on_gone(message)


class Cluster:
    """Within `run`."""

    def __init__(self, nodes: Sequence[Node], speeds: Speeds, rules: Rules = AS_IT_IS) -> None:
        self.broker = Broker(_SECRET, TTL_S, Placer(landing=rules.landing))
        self.network = Network(speeds.link)
        self.donors: dict[str, SimulatedDonor] = {}
        for node in nodes:
            self.donors[node.name] = SimulatedDonor(
                node,
                self.network,
                self.broker.placer.cost,
                self.donors.__getitem__,
                free_rate=speeds.free,
                rules=rules,
            )
            if node.spill:
                self.network.slow_down(node.name, speeds.spill)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; it has started when all donors are there."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.broker.run, [cast(trio.SocketListener, _Nobody())])
            await trio.sleep(2 * SETTLE_S)  # it has no earlier life, and asks nobody any more whether it had one
            for name, donor in self.donors.items():
                peer = DonorPeer(self.broker, name)
                peer.channel = DirectChannel(donor, f"donor {name}")
                await nursery.start(donor.run, DirectChannel(peer, "the broker"))
            task_status.started()
