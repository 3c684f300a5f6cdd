"""Repair of links, with a broker and fabrics that do as they are told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from memfaas import auth, fabric, messages
from memfaas._native import BROKEN, FROZEN, NEED_CONNECTION, REVOKED, STALE, Link, TcpLink
from memfaas.client import keeper as module
from memfaas.client.keeper import Keeper, WouldBlock, no_waiting
from memfaas.errors import (
    AccessError,
    BrokerUnavailable,
    ClosedError,
    DeadlineExceeded,
    FabricUnavailable,
    LeaseLost,
    MemfaasError,
    TicketExpired,
    TransportError,
)


def place(epoch: int = 1, life_s: float = 300.0, node: str = "n") -> messages.Place:
    ticket = auth.Ticket(tenant="t", lease=b"L" * 16, epoch=1, donor="d", expires=time.time() + life_s, uid=None)
    return messages.Place(
        lease=b"L" * 16,
        donor="d",
        epoch=epoch,
        kind="shard",
        size=1,
        endpoint=messages.Endpoint(node=node, unix_path="/nowhere", host="127.0.0.1", port=1),
        ticket=ticket.encode(),
        proof_key=b"k" * 32,
    )


class World:
    """Broker, fabric and owner of one link."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout: float = 0.3) -> None:
        self.fabric: fabric.Choice = "auto"
        self.timeout = timeout
        self.closed = False
        self.link: Link | None = None
        self.installed = 0
        self.asked = 0
        self.opened: list[messages.Place] = []
        self.dialled = 0
        self.located: Callable[[], messages.Place] = lambda: place(epoch=2)
        self.opening: Callable[[messages.Place], Any] = lambda where: TcpLink(1.0)
        monkeypatch.setattr(fabric, "open_link", self._open)
        monkeypatch.setattr(fabric.tcp, "dial", self._dial)
        self.keeper = Keeper("shard 0", place(), self, current=lambda: self.link, install=self._install)

    def ensure_open(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    def locate(self, lease: bytes, timeout_s: float) -> messages.Place:
        self.asked += 1
        return self.located()

    def _install(self, link: Link | None) -> None:
        self.link = link
        self.installed += 1

    def _open(self, where: messages.Place, choice: fabric.Choice, deadline: float, timeout_s: float) -> fabric.Opened:
        self.opened.append(where)
        return fabric.Opened(self.opening(where))

    def _dial(self, where: messages.Place, deadline: float) -> int:
        self.dialled += 1
        return socket.socket().detach()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def failing(*outcomes: Exception | None) -> Callable[..., Any]:
    """Fails in these ways, one after the other, and with None succeeds."""
    left = list(outcomes)

    def step(*_: Any) -> Any:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if outcome is not None:
            raise outcome
        return TcpLink(1.0)

    return step


@pytest.mark.parametrize("reason", [NEED_CONNECTION, BROKEN, STALE])
def test_a_missing_link_is_opened_without_asking_the_broker(world: World, reason: int) -> None:
    world.keeper.mend(reason, 1)
    assert world.link is not None
    assert world.asked == 0


def test_a_revoked_link_is_opened_where_the_broker_says(world: World) -> None:
    world.keeper.mend(REVOKED, 1)
    assert world.asked == 1
    assert [where.epoch for where in world.opened] == [2]
    assert world.keeper.place.epoch == 2


def test_a_lease_that_is_over_is_lost_at_once(world: World) -> None:
    def over() -> messages.Place:
        raise LeaseLost("lease is over")

    world.located = over
    with pytest.raises(LeaseLost, match=r"shard 0.*over"):
        world.keeper.mend(REVOKED, 1)


def test_an_old_ticket_is_renewed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.keeper.place = place(life_s=2)
    world.keeper.mend(BROKEN, 1)
    assert world.asked == 1


def test_a_refused_ticket_is_renewed(world: World) -> None:
    world.opening = failing(TicketExpired("old"), None)
    world.keeper.mend(BROKEN, 1)
    assert world.asked == 1
    assert world.link is not None


def test_a_fresh_ticket_that_is_refused_is_an_error(world: World) -> None:
    world.opening = failing(AccessError("no"))
    with pytest.raises(AccessError):
        world.keeper.mend(BROKEN, 1)
    assert len(world.opened) == 2


def test_a_function_that_comes_back_is_waited_for(world: World) -> None:
    world.opening = failing(FabricUnavailable("refused"), FabricUnavailable("refused"), None)
    world.keeper.mend(BROKEN, 1)
    assert world.link is not None


def test_what_stays_away_is_an_error_at_the_deadline(world: World) -> None:
    world.opening = failing(FabricUnavailable("connection refused"))
    with pytest.raises(FabricUnavailable, match="refused"):
        world.keeper.mend(BROKEN, 1)
    assert len(world.opened) > 1


def test_while_the_broker_is_away_the_old_place_is_tried(world: World) -> None:
    def away() -> messages.Place:
        raise BrokerUnavailable("away")

    world.located = away
    world.opening = failing(FabricUnavailable("refused"), FabricUnavailable("refused"), None)
    world.keeper.mend(BROKEN, 1)
    assert world.link is not None


def test_a_broker_that_stays_away_is_named(world: World) -> None:
    def away() -> messages.Place:
        raise BrokerUnavailable("the broker stayed away")

    world.located = away
    world.opening = failing(LeaseLost("not mine any more"))
    with pytest.raises(BrokerUnavailable):
        world.keeper.mend(REVOKED, 1)


def test_a_donor_that_is_on_its_way_back_is_waited_for(world: World) -> None:
    answers: list[Exception | None] = [TransportError("its donor has not come back"), None]

    def locate() -> messages.Place:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return place(epoch=3)

    def open_link(where: messages.Place) -> TcpLink:
        if where.epoch != 3:
            raise FabricUnavailable("refused")
        return TcpLink(1.0)

    world.located, world.opening = locate, open_link
    world.keeper.mend(REVOKED, 1)
    assert world.keeper.place.epoch == 3


def test_one_operation_has_one_deadline(world: World) -> None:
    world.keeper.mend(FROZEN, 1)
    time.sleep(world.timeout)
    with pytest.raises(DeadlineExceeded, match="shard 0 on donor d"):
        world.keeper.mend(FROZEN, 2)
    world.keeper.mend(FROZEN, 1)


def test_a_lost_lease_may_be_found_again(world: World) -> None:
    """A donor that was taken for dead came back with its memory."""
    world.keeper.mend(BROKEN, 1)
    world.keeper.lose("donor d is gone")
    links = [world.link]
    world.keeper.mend(NEED_CONNECTION, 1)
    links.append(world.link)
    assert [link is None for link in links] == [True, False]
    assert world.keeper.gone is None


def test_a_lost_lease_says_why(world: World) -> None:
    def over() -> messages.Place:
        raise LeaseLost("it is over")

    def away() -> messages.Place:
        raise BrokerUnavailable("away")

    world.keeper.lose("donor d is gone")
    for answer in (over, away):
        world.located = answer
        with pytest.raises(LeaseLost, match="donor d is gone"):
            world.keeper.mend(NEED_CONNECTION, 1)


def test_more_threads_get_more_connections(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    first = world.link
    for _ in range(5):
        world.keeper.mend(NEED_CONNECTION, 1)
    assert world.link is first
    assert world.dialled == 5


def test_the_number_of_connections_is_limited(world: World) -> None:
    for _ in range(100):
        world.keeper.mend(NEED_CONNECTION, 1)
    assert world.dialled == module.MAX_CONNECTIONS - 1
    world.keeper.mend(NEED_CONNECTION, 1)
    world.keeper.mend(NEED_CONNECTION, 8)  # it waited long: some of them may be gone
    assert world.dialled == module.MAX_CONNECTIONS


def test_a_connection_that_cannot_be_added_is_a_broken_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    first = world.link
    monkeypatch.setattr(fabric.tcp, "dial", failing(FabricUnavailable("refused")))
    world.keeper.mend(NEED_CONNECTION, 1)
    assert world.link is not first


def test_many_threads_mend_a_link_once(world: World) -> None:
    started = threading.Barrier(8)
    errors: list[MemfaasError] = []

    def open_slowly(where: messages.Place) -> TcpLink:
        time.sleep(0.05)
        return TcpLink(1.0)

    def mend() -> None:
        started.wait()
        try:
            world.keeper.mend(BROKEN, 1)
        except MemfaasError as error:
            errors.append(error)

    world.opening = open_slowly
    threads = [threading.Thread(target=mend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert world.installed == 1


def test_a_link_that_keeps_failing_is_opened_again(world: World) -> None:
    world.keeper.mend(BROKEN, 1)
    world.keeper.mend(BROKEN, 1)  # just mended: worth another try as it is
    assert world.installed == 1
    world.keeper.mend(BROKEN, 2)
    assert world.installed == 2


def test_a_closed_session_mends_nothing(world: World) -> None:
    world.closed = True
    with pytest.raises(ClosedError):
        world.keeper.mend(BROKEN, 1)


def test_who_must_not_wait_is_told(world: World) -> None:
    with no_waiting(), pytest.raises(WouldBlock):
        world.keeper.mend(BROKEN, 1)
    world.keeper.mend(BROKEN, 1)


def test_shm_to_another_node_is_refused_when_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.fabric = "shm"
    with pytest.raises(FabricUnavailable, match="another node"):
        Keeper("x", place(), world, current=lambda: None, install=lambda link: None)
    Keeper("x", place(node=fabric.boot_id()), world, current=lambda: None, install=lambda link: None)


def test_a_shard_that_no_donor_held_is_asked_for(world: World) -> None:
    nowhere = msgspec.structs.replace(place(node=""), ticket=b"", proof_key=b"")
    world.keeper.place = nowhere
    world.keeper.mend(NEED_CONNECTION, 1)
    assert world.asked == 1
    assert world.keeper.place.epoch == 2
