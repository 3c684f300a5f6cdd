"""What a whole cluster does, on a virtual clock: the broker and the reclaims are the real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio
from trio.testing import MockClock

from memfaas import auth
from memfaas.errors import CapacityError
from memfaas.messages import LeaseGone, OpenStore, Reclaim, Reclaimed, StoreOpened
from memfaas.server.simulation.cluster import Client, Cluster, Speeds
from memfaas.server.simulation.donor import Node
from memfaas.units import GIB

NODE = 64 * GIB
SPEEDS = Speeds(link=10.0 * GIB, free=100.0 * GIB, spill=1.0 * GIB)


class Scene:
    """A cluster, a tenant of it, and what both said."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.cluster = Cluster(nodes, SPEEDS)
        self.tenant = Client(self.cluster.broker, "alice")
        self.gone: list[LeaseGone] = []
        self.tenant.on_gone = self.gone.append
        self.taken_back: list[Reclaimed] = []

    async def store(self, name: str, size: int) -> None:
        await self.tenant.ask(OpenStore(name=name, size=size), StoreOpened)

    async def take_back(self, donor: str, deadline: float, leave: int = 0) -> None:
        """All that it offers but `leave` bytes."""
        size = self.cluster.donors[donor].memory().offered - leave
        request = Reclaim(donor=donor, size=size, deadline=deadline, holder="job")
        operator = Client(self.cluster.broker, auth.OPERATOR)
        self.taken_back.append(await operator.ask(request, Reclaimed))

    def nothing_is_lost(self) -> bool:
        how = Counter(step.how for reclaimed in self.taken_back for step in reclaimed.steps)
        return how["migrated"] > 0 and how["lost"] == 0 and self.gone == []


def play(nodes: Sequence[Node], what: Callable[[Scene], Awaitable[None]]) -> Scene:
    async def main() -> Scene:
        scene = Scene(nodes)
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.cluster.run)
            await nursery.start(scene.tenant.run)
            await what(scene)
            nursery.cancel_scope.cancel()
        return scene

    return trio.run(main, clock=MockClock(autojump_threshold=0))


def test_many_donors_that_need_their_memory_at_once_do_not_all_send_it_to_the_roomiest() -> None:
    """Its link takes 10 GiB in a second; each of the four sends about 5 GiB, which all the others could take."""
    nodes = [Node("roomy", 4 * NODE, 0, GIB), *(Node(f"n{number}", NODE, 0, GIB) for number in range(12))]

    async def what(scene: Scene) -> None:
        for number in range(8):
            await scene.store(f"store{number}", len(nodes) * 2 * GIB)
        async with trio.open_nursery() as reclaims:
            for name in ("n0", "n1", "n2", "n3"):
                reclaims.start_soon(scene.take_back, name, 1.0, 8 * GIB)

    scene = play(nodes, what)
    assert all(reclaimed.in_time for reclaimed in scene.taken_back)
    assert scene.nothing_is_lost()


def test_leases_of_a_donor_that_needs_all_its_memory_find_room_when_no_new_store_does() -> None:
    nodes = [Node(f"n{number}", NODE, 0, GIB) for number in range(24)]

    async def what(scene: Scene) -> None:
        try:
            for number in range(100):
                await scene.store(f"store{number}", len(nodes) * GIB)
        except CapacityError:
            assert number > 50
            await scene.take_back("n0", 10.0)

    scene = play(nodes, what)
    (reclaimed,) = scene.taken_back
    assert reclaimed.in_time
    assert reclaimed.seconds < 9  # it did not wait for room until the deadline
    assert scene.nothing_is_lost()
