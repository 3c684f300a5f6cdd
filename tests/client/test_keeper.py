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
    CapacityError,
    ClosedError,
    DeadlineExceeded,
    FabricUnavailable,
    LeaseLost,
    MemfaasError,
    TicketExpired,
    TransportError,
    ValueLost,
)
from memfaas.fabric import empty


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
        self.device = ""
        self.timeout = timeout
        self.closed = False
        self.link: Link | None = None
        self.installed = 0
        self.asked = 0
        self.opened: list[messages.Place] = []
        self.choices: list[fabric.Choice] = []
        self.timers: list[Callable[[], None]] = []
        self.dialled = 0
        self.located: Callable[[], messages.Place] = lambda: place(epoch=2)
        self.opening: Callable[[messages.Place], Any] = lambda where: TcpLink(1.0)
        monkeypatch.setattr(fabric, "open_link", self._open)
        monkeypatch.setattr(fabric.tcp, "dial", self._dial)
        self.keeper = self.keep()

    def keep(self, *, lost: type[LeaseLost] = LeaseLost, cache: bool = False) -> Keeper:
        self.keeper = Keeper(
            "shard 0", place(), self, current=lambda: self.link, install=self._install, lost=lost, cache=cache
        )
        return self.keeper

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.timers.append(action)

    def ensure_open(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    def locate(self, lease: bytes, timeout_s: float) -> messages.Place:
        self.asked += 1
        return self.located()

    def _install(self, link: Link | None) -> None:
        self.link = link
        self.installed += 1

    def _open(
        self,
        where: messages.Place,
        choice: fabric.Choice,
        deadline: float,
        timeout_s: float,
        *,
        device: str,
        served: bool,
    ) -> fabric.Opened:
        self.opened.append(where)
        self.choices.append("tcp" if served else choice)  # as the fabric does
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


def test_a_further_connection_that_is_refused_costs_no_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function serves so many of them; who has some already waits until one of them is free."""
    for _ in range(3):
        world.keeper.mend(NEED_CONNECTION, 1)
    first = world.link
    monkeypatch.setattr(fabric.tcp, "dial", failing(FabricUnavailable("refused")))
    for attempt in range(1, 8):
        world.keeper.mend(NEED_CONNECTION, attempt)
    assert world.link is first
    world.keeper.mend(NEED_CONNECTION, 8)  # nobody had one to spare for long: none of them may work
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


# --- leases that move -----------------------------------------------------------------------------


def test_a_move_that_was_told_needs_no_broker(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    world.keeper.moved(place(epoch=2))
    world.keeper.mend(REVOKED, 1)
    assert [where.epoch for where in world.opened] == [1, 2]
    assert world.asked == 0


def test_new_operations_begin_where_the_lease_is_now(world: World) -> None:
    """The old memory may be frozen for long, when its donor cannot tell whether the move went well."""
    world.keeper.mend(NEED_CONNECTION, 1)
    links = [world.link]
    world.keeper.moved(place(epoch=1))
    links.append(world.link)
    world.keeper.moved(place(epoch=2))
    assert links[0] is links[1]
    assert world.link is None
    world.keeper.mend(NEED_CONNECTION, 1)
    assert (world.asked, world.opened[-1].epoch) == (0, 2)


def test_a_second_move_within_a_moment_is_followed_too(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    for epoch in (2, 3, 4):
        world.keeper.moved(place(epoch=epoch))
        world.keeper.mend(REVOKED, 1)
    assert [where.epoch for where in world.opened] == [1, 2, 3, 4]
    assert world.asked == 0


def test_no_older_place_takes_the_newest_ones_place(world: World) -> None:
    world.keeper.moved(place(epoch=5))
    world.keeper.moved(place(epoch=4))
    assert world.keeper.place.epoch == 5
    world.located = lambda: place(epoch=4)
    world.opening = failing(FabricUnavailable("refused"), None)
    world.keeper.mend(BROKEN, 1)
    assert world.keeper.place.epoch == 5
    assert [where.epoch for where in world.opened] == [5, 5]


def test_the_broker_is_asked_until_it_knows_where_revoked_memory_went(world: World) -> None:
    """It hears of the new place a moment after the old one was taken away."""
    answers = [place(epoch=1), place(epoch=1), place(epoch=2)]
    world.located = lambda: answers.pop(0)
    world.keeper.mend(NEED_CONNECTION, 1)
    world.keeper.mend(REVOKED, 1)
    world.keeper.mend(REVOKED, 2)
    assert [where.epoch for where in world.opened] == [1, 2]


def test_memory_that_was_revoked_and_is_nowhere_else_is_an_error_at_the_deadline(world: World) -> None:
    world.located = lambda: place(epoch=1)
    world.keeper.mend(NEED_CONNECTION, 1)
    with pytest.raises(TransportError, match="shard 0 has left donor d"):
        world.keeper.mend(REVOKED, 2)
    assert [where.epoch for where in world.opened] == [1]


def test_who_waits_for_frozen_memory_goes_on_when_it_has_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 300.0)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 300.0)
    world = World(monkeypatch, timeout=600.0)
    world.keeper.mend(NEED_CONNECTION, 1)
    waiting = threading.Thread(target=world.keeper.mend, args=(FROZEN, 1), daemon=True)
    waiting.start()
    world.keeper.moved(place(epoch=2))
    waiting.join(30)
    assert not waiting.is_alive()
    assert [where.epoch for where in world.opened] == [1, 2]
    assert world.asked == 0


def test_who_asks_the_broker_in_vain_goes_on_when_the_move_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 300.0)
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 300.0)
    world = World(monkeypatch, timeout=600.0)
    world.located = lambda: place(epoch=1)
    world.keeper.mend(NEED_CONNECTION, 1)

    def operate() -> None:
        world.keeper.mend(REVOKED, 1)  # it has just been mended
        world.keeper.mend(REVOKED, 2)

    waiting = threading.Thread(target=operate, daemon=True)
    waiting.start()
    while not world.asked:
        assert waiting.is_alive()
        time.sleep(0.001)
    world.keeper.moved(place(epoch=2))
    waiting.join(30)
    assert not waiting.is_alive()
    assert (world.asked, world.keeper.place.epoch) == (1, 2)


def test_frozen_memory_that_stays_is_tried_again_as_it_is(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    for attempt in (1, 2, 3):
        world.keeper.mend(FROZEN, attempt)
    assert (world.installed, world.asked) == (1, 0)


def test_what_was_frozen_long_is_not_taken_for_a_link_that_keeps_failing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    for attempt in range(1, 6):
        world.keeper.mend(FROZEN, attempt)
    monkeypatch.setattr(Keeper, "_pause", failing(AssertionError("it waits once more")))
    world.keeper.mend(REVOKED, 6)  # it has just been mended
    world.keeper.mend(REVOKED, 7)
    assert world.keeper.place.epoch == 2


def test_a_move_finds_a_lost_lease_again(world: World) -> None:
    world.keeper.lose("donor d is gone")
    world.keeper.moved(place(epoch=2))
    assert world.keeper.gone is None
    world.keeper.mend(NEED_CONNECTION, 1)
    assert world.asked == 0


def test_a_further_connection_goes_to_where_the_lease_is_now(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    world.keeper.moved(place(epoch=2))
    world.keeper.mend(NEED_CONNECTION, 1)
    assert world.dialled == 0
    assert [where.epoch for where in world.opened] == [1, 2]


def test_an_operation_in_doubt_over_tcp_is_not_continued_over_another_fabric(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    world.keeper.mend(BROKEN, 1)
    world.keeper.mend(BROKEN, 2)
    world.keeper.moved(place(epoch=3))
    world.keeper.mend(REVOKED, 3)
    world.link = None  # another thread's doing
    world.keeper.mend(BROKEN, 4)
    assert world.choices == ["auto", "tcp", "tcp", "tcp"]
    time.sleep(world.timeout)  # by then it has ended
    world.keeper.moved(place(epoch=4))
    world.keeper.mend(REVOKED, 1)
    assert world.choices[4:] == ["auto"]


def test_a_broken_connection_is_asked_about_over_tcp_whatever_the_link_is_by_now(world: World) -> None:
    world.keeper.mend(NEED_CONNECTION, 1)
    world.link = mapped = empty.full_link()  # as by another thread, which found the lease on its own node
    world.keeper.mend(BROKEN, 1)
    assert world.link is not mapped
    assert world.choices == ["auto", "tcp"]


# --- leases that are lost, and caches -------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_a_lost_shard_is_a_lost_value(world: World, told: bool) -> None:
    def over() -> messages.Place:
        raise LeaseLost("it is over")

    keeper = world.keep(lost=ValueLost)
    world.located = over
    if told:
        keeper.lose("donor d needed its memory")
    with pytest.raises(ValueLost, match=r"shard 0 is lost: .*(over|needed)"):
        keeper.mend(REVOKED, 1)


def test_a_functions_word_that_the_lease_is_over_is_a_lost_value_too(world: World) -> None:
    keeper = world.keep(lost=ValueLost)
    world.opening = failing(LeaseLost("not here"))
    with pytest.raises(ValueLost, match="shard 0 is lost: not here"):
        keeper.mend(BROKEN, 1)


def no_room() -> messages.Place:
    raise CapacityError("no donor has room")


def test_a_dropped_shard_is_granted_anew_when_it_is_used(world: World) -> None:
    keeper = world.keep(cache=True)
    keeper.mend(NEED_CONNECTION, 1)
    keeper.drop("a job needs the memory")
    assert world.link is None
    keeper.mend(NEED_CONNECTION, 1)
    assert (world.asked, keeper.place.epoch, keeper.gone) == (1, 2, None)


def test_a_dropped_shard_that_no_donor_has_room_for_is_empty_for_a_while(world: World) -> None:
    keeper = world.keep(cache=True)
    keeper.mend(NEED_CONNECTION, 1)
    world.located = no_room
    keeper.drop("a job needs the memory")
    for asked in (1, 2):
        keeper.mend(NEED_CONNECTION, 1)
        assert world.link is empty.full_link()
        assert keeper.vacant == "no donor has room"
        assert world.asked == asked
        world.timers.pop()()
        assert [world.link, keeper.vacant].count(None) == 2
    world.located = lambda: place(epoch=2)
    keeper.mend(NEED_CONNECTION, 1)
    assert isinstance(world.link, TcpLink)
    assert world.timers == []


def test_a_shard_that_has_memory_again_is_told(world: World) -> None:
    keeper = world.keep(cache=True)
    world.located = no_room
    keeper.mend(REVOKED, 1)
    links = [world.link]
    keeper.moved(place(epoch=2))
    links.append(world.link)
    assert links == [empty.full_link(), None]
    keeper.mend(NEED_CONNECTION, 1)
    (again,) = world.timers
    again()
    assert isinstance(world.link, TcpLink)
    assert world.asked == 1


def test_only_a_cache_is_empty_for_want_of_room(world: World) -> None:
    world.located = no_room
    with pytest.raises(CapacityError):
        world.keeper.mend(REVOKED, 1)
