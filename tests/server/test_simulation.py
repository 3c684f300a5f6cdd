"""What a whole cluster does, on a virtual clock: the broker and the reclaims are the real ones."""

from __future__ import annotations

from collections import Counter

import trio
from trio.testing import MockClock

from memfaas import auth
from memfaas.messages import LeaseGone, OpenStore, Reclaim, Reclaimed, StoreOpened
from memfaas.server.simulation.cluster import Client, Cluster, Speeds
from memfaas.server.simulation.donor import Node
from memfaas.units import GIB

NODE = 64 * GIB
SPEEDS = Speeds(link=10.0 * GIB, free=100.0 * GIB, spill=1.0 * GIB)


def test_many_donors_that_need_their_memory_at_once_do_not_all_send_it_to_the_roomiest() -> None:
    """Its link takes 10 GiB in a second; each of the four sends about 5 GiB, which all the others could take."""
    names = [f"n{number}" for number in range(12)]
    nodes = [Node("roomy", 4 * NODE, 0, GIB), *(Node(name, NODE, 0, GIB) for name in names)]
    taken_back: dict[str, Reclaimed] = {}
    gone: list[LeaseGone] = []

    async def main() -> None:
        cluster = Cluster(nodes, SPEEDS)
        operator = Client(cluster.broker, auth.OPERATOR)
        tenant = Client(cluster.broker, "alice")
        tenant.on_gone = gone.append

        async def take_back(name: str) -> None:
            size = cluster.donors[name].memory().offered - 8 * GIB
            request = Reclaim(donor=name, size=size, deadline=1.0, holder="job")
            taken_back[name] = await operator.ask(request, Reclaimed)

        async with trio.open_nursery() as nursery:
            await nursery.start(cluster.run)
            await nursery.start(tenant.run)
            for number in range(8):
                await tenant.ask(OpenStore(name=f"store{number}", size=len(nodes) * 2 * GIB), StoreOpened)
            async with trio.open_nursery() as reclaims:
                for name in names[:4]:
                    reclaims.start_soon(take_back, name)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    for name, reclaimed in taken_back.items():
        how = Counter(step.how for step in reclaimed.steps)
        assert reclaimed.in_time, name
        assert how["migrated"] > 0, name
        assert how["lost"] == 0, name
    assert gone == []
