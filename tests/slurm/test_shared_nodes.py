"""Jobs that share a node: a real donor, and the hooks as Slurm would run them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from memfaas import LocalCluster, auth, local_agent
from memfaas.addresses import parse_address
from memfaas.local_agent import SOCKET
from memfaas.messages import Done, Lend, Message, Reclaim, Reclaimed
from memfaas.server.slurm import programs, reclaim
from memfaas.units import MIB

pytestmark = pytest.mark.slow

_LENT = 64 * MIB
_NODE = "donor0"
_LONG_S = 30.0

R = TypeVar("R", bound=Message)


@pytest.fixture(scope="module")
def cluster(own_world: Path) -> Iterator[LocalCluster]:
    with LocalCluster(donors=1, memory=_LENT) as running:
        yield running


class Node:
    """Starts and ends jobs on it. `given`: what Slurm says that each was given."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.given: dict[str, str] = {}
        self._address = parse_address(cluster.address)
        self._operator = auth.Credentials.of_tenant(auth.read_secret(cluster.folder / "secret"), auth.OPERATOR)
        self._socket = cluster.folder / "run" / _NODE / SOCKET

    async def squeue(self, *_: str) -> str:
        return "".join(f"{job}    {given}\n" for job, given in self.given.items())

    async def start(self, job: str) -> None:
        await reclaim.on_controller(self._address, self._operator, job, [_NODE], 5)
        await reclaim.on_node(self._socket, _NODE, job, [_NODE], 5)

    async def end(self, job: str) -> None:
        await reclaim.lend_on_node(self._socket, _NODE, job)
        await reclaim.lend_on_controller(self._address, self._operator, job, [_NODE])

    async def lends(self) -> int:
        """Bytes: what another could take back now."""
        taken = await self._ask(Reclaim(donor=_NODE, size=2 * _LENT, deadline=5, holder="another"), Reclaimed)
        await self._ask(Lend(donor=_NODE, holder="another"), Done)
        return taken.asked

    async def _ask(self, message: Message, reply: type[R]) -> R:
        return await local_agent.ask(self._socket.parent, message, reply, _LONG_S)


@pytest.fixture
def node(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(cluster)
    monkeypatch.setattr(programs, "run", made.squeue)
    return made


async def test_where_slurm_does_not_divide_memory_nothing_is_lent_until_the_last_job_has_ended(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.given = {"1": "cpu=1,node=1", "2": "cpu=1,node=1"}
    await node.start("1")
    await node.start("2")
    assert await node.lends() == 0
    await node.end("1")
    assert await node.lends() == 0
    await node.end("2")
    assert await node.lends() == _LENT
    assert "had not heard of it" not in caplog.text


async def test_a_job_keeps_what_it_asked_for_when_another_that_took_nearly_all_has_ended(node: Node) -> None:
    node.given = {"3": "cpu=1,mem=50M,node=1", "4": "cpu=1,mem=30M,node=1"}
    await node.start("3")
    await node.start("4")
    assert await node.lends() == 0
    await node.end("3")
    assert await node.lends() == _LENT - 30 * MIB
    await node.end("4")
    assert await node.lends() == _LENT
