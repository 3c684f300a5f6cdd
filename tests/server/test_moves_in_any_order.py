"""Leases that move, in any order of events: what clients read is what was last written."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memfaas.errors import TransportError
from memfaas.messages import OnReclaim
from memfaas.server.records import DONOR_GRACE_S, MOVE_MARGIN_S, Lease, Outcome, State
from memfaas.server.tables import Tables
from memfaas.units import MIB
from tests.server.world import TTL, Copy, DonorModel, World, restart_ids

DONORS = ("d1", "d2", "d3")
SPILL = "d3"
WAIT_S = 5.0
"""How long a target waits for a copy."""
SELDOM = st.sampled_from([False, False, False, True])
Doing = Callable[[DonorModel, bytes, Copy], bool]


def sending(_: DonorModel, __: bytes, copy: Copy) -> bool:
    return copy.sending is not None and copy.served


def in_doubt(donor: DonorModel, _: bytes, copy: Copy) -> bool:
    return donor.connected and not copy.served


def anywhere(_: DonorModel, __: bytes, ___: Copy) -> bool:
    return True


class MovesMachine(RuleBasedStateMachine):
    """Sources, targets, the broker and what they say to each other go astray at any step of a move."""

    def __init__(self) -> None:
        super().__init__()
        restart_ids()
        self.world = World()
        self.session = b""
        self.regions: set[bytes] = set()
        self.granting: list[Lease] = []
        self.links: set[Copy] = set()
        """Copies that clients were led to; a link stays for as long as its copy is there."""
        self.written: dict[bytes, int] = {}
        """What was last written to a lease; each write writes something new."""
        self.writes = itertools.count(1)
        self.names = itertools.count(1)
        self.steps = self.troubled_at = 0

    @property
    def tables(self) -> Tables:
        return self.world.tables

    @initialize()
    def begin(self) -> None:
        for name in DONORS:
            self.world.donor(name, spill=name == SPILL)
        self.session = self.world.session()
        self.make_store("migrate")
        self.make_store("drop")
        self.make_region()

    def carry_out(self, outcome: Outcome) -> None:
        self.world.carry_out(outcome)

    def copies(self, condition: Doing) -> list[tuple[DonorModel, bytes, Copy]]:
        return [
            (donor, lease, copy)
            for donor in self.world.donors.values()
            for lease, copy in sorted(donor.held.items())
            if condition(donor, lease, copy)
        ]

    def linked(self, _: DonorModel, __: bytes, copy: Copy) -> bool:
        return copy in self.links and copy.served

    def movable(self, donor: DonorModel, lease: bytes, copy: Copy) -> bool:
        known = self.tables.leases.get(lease)
        return donor.connected and copy.sending is None and known is not None and known.donor == donor.name

    def has_arrived(self, _: DonorModel, lease: bytes, copy: Copy) -> bool:
        if copy.sending is None or not copy.sending.in_doubt or copy.sending.asked:
            return False
        there = self.world.donors[copy.sending.donor].held.get(lease)
        return there is not None and there.spec.epoch == copy.sending.epoch

    def dropped(self) -> list[Lease]:
        return [lease for lease in self.tables.leases.values() if lease.state is State.DROPPED]

    def roomy(self) -> list[str]:
        """Donors on which a lease may begin, those with most room first."""
        rooms = [room for room in self.tables.rooms() if room.free >= 16 * MIB]
        return [room.donor for room in sorted(rooms, key=lambda room: -room.free)]

    @precondition(lambda self: self.few_leases() and self.roomy())
    @rule(on_reclaim=st.sampled_from(["migrate", "drop"]))
    def make_store(self, on_reclaim: OnReclaim) -> None:
        name = f"store {next(self.names)}"
        spec = self.world.store(self.session, self.roomy()[:2], persistent=True, name=name, on_reclaim=on_reclaim)
        self.written.update((lease, 0) for lease in self.tables.stores[spec.store].leases)

    @precondition(lambda self: self.few_leases() and self.roomy())
    @rule()
    def make_region(self) -> None:
        region = self.world.region(self.session, self.roomy()[0])
        self.regions.add(region)
        self.written[region] = 0

    def few_leases(self) -> bool:
        return sum(lease.state is State.HELD for lease in self.tables.leases.values()) < 3

    @precondition(lambda self: self.copies(self.linked))
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        _, lease, copy = data.draw(st.sampled_from(self.copies(self.linked)))
        self.written[lease] = copy.value = next(self.writes)

    @precondition(lambda self: self.copies(self.movable))
    @rule(data=st.data(), outcome=st.sampled_from(["ready", "sent", "sent", "sent", "vanished", "refused", "unheard"]))
    def relocate(self, data: st.DataObject, outcome: str) -> None:
        source, lease, copy = data.draw(st.sampled_from(self.copies(self.movable)))
        known = self.tables.movable(source.name, lease, copy.spec.epoch)
        rooms = [room.donor for room in self.tables.rooms_for(known) if room.free >= known.cost]
        assert source.name not in rooms
        if not rooms:
            return
        target = data.draw(st.sampled_from(rooms))
        assert not (source.spill and self.world.donors[target].spill)
        if outcome in ("ready", "sent", "vanished"):
            self.world.relocate(source.name, lease, target)
            if outcome != "ready":
                self.world.sends_all(source.name, lease, arrives=outcome == "sent")
            return
        move, spec = self.tables.begin_move(known, target, WAIT_S)
        if outcome == "unheard":
            self.world.donors[target].arriving[lease] = spec
        self.carry_out(self.tables.move_over(known, move, "it was refused"))

    @precondition(lambda self: self.copies(sending))
    @rule(data=st.data())
    def sending_fails(self, data: st.DataObject) -> None:
        source, lease, _ = data.draw(st.sampled_from(self.copies(sending)))
        self.world.fails_to_send(source.name, lease)

    @precondition(lambda self: self.copies(sending))
    @rule(data=st.data(), arrives=st.sampled_from([True, True, False]))
    def all_is_sent(self, data: st.DataObject, arrives: bool) -> None:
        source, lease, _ = data.draw(st.sampled_from(self.copies(sending)))
        self.world.sends_all(source.name, lease, arrives=arrives)

    @precondition(lambda self: self.copies(self.has_arrived))
    @rule(data=st.data())
    def source_hears_that_it_moved(self, data: st.DataObject) -> None:
        source, lease, _ = data.draw(st.sampled_from(self.copies(self.has_arrived)))
        self.world.hears_that_it_moved(source.name, lease)

    @precondition(lambda self: any(donor.unsaid for donor in self.world.donors.values()))
    @rule(name=st.sampled_from(DONORS))
    def target_says_arrived(self, name: str) -> None:
        if self.world.donors[name].unsaid:
            self.world.says_arrived(name)

    @precondition(lambda self: any(donor.arriving for donor in self.world.donors.values()))
    @rule(name=st.sampled_from(DONORS))
    def target_gives_up_waiting(self, name: str) -> None:
        for lease in sorted(self.world.donors[name].arriving)[:1]:
            self.world.gives_up_waiting(name, lease)

    @precondition(lambda self: self.copies(in_doubt))
    @rule(data=st.data(), heard=st.booleans())
    def settle(self, data: st.DataObject, heard: bool) -> None:
        source, lease, copy = data.draw(st.sampled_from(self.copies(in_doubt)))
        assert copy.sending is not None
        target = self.tables.donors.get(copy.sending.donor)
        try:
            self.world.settles(source.name, lease, heard=heard)
        except TransportError:
            assert target is None or not target.connected

    @precondition(lambda self: self.calm() and self.copies(anywhere))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """A function is given up, or its memory is needed at once."""
        self.trouble()
        donor, lease, _ = data.draw(st.sampled_from(self.copies(anywhere)))
        self.world.evict(donor.name, lease)

    @precondition(lambda self: self.dropped())
    @rule(data=st.data(), at_once=st.booleans())
    def regrant(self, data: st.DataObject, at_once: bool) -> None:
        lease = data.draw(st.sampled_from(self.dropped()))
        rooms = [room.donor for room in self.tables.rooms_for(lease) if room.free >= lease.cost]
        if rooms:
            self.tables.begin_again(lease, data.draw(st.sampled_from(rooms)))
            self.written[lease.spec.lease] = 0
            self.granting.append(lease)
            while at_once and self.granting:
                self.answer(self.granting.pop(), works=True)

    @precondition(lambda self: self.granting)
    @rule(data=st.data(), works=st.sampled_from([True, True, True, False]))
    def donor_answers(self, data: st.DataObject, works: bool) -> None:
        self.answer(self.granting.pop(data.draw(st.integers(0, len(self.granting) - 1))), works)

    def answer(self, lease: Lease, works: bool) -> None:
        donor = self.world.donors.get(lease.donor)
        if works and donor is not None and donor.connected:
            self.world.grant(lease)
        else:
            self.carry_out(self.tables.not_begun_again(lease, "it failed"))

    # --- donors, the broker, time

    def calm(self) -> bool:
        """Trouble leaves time for moves to get somewhere in between."""
        return self.steps - self.troubled_at > 3

    def trouble(self) -> None:
        self.troubled_at = self.steps

    @invariant()
    def steps_are_counted(self) -> None:
        self.steps += 1

    @precondition(lambda self: not all(donor.connected for donor in self.world.donors.values()))
    @rule(name=st.sampled_from(DONORS))
    def connect_donor(self, name: str) -> None:
        if not self.world.donors[name].connected:
            self.world.connect(name)

    @precondition(lambda self: self.calm())
    @rule(name=st.sampled_from(DONORS), dies=SELDOM)
    def disconnect_donor(self, name: str, dies: bool) -> None:
        self.trouble()
        donor = self.world.donors[name]
        if donor.connected:
            self.world.disconnect(name)
            self.granting_fails(lambda lease: lease.donor == name)
        if dies:
            epochs = {lease: copy.spec.epoch for lease, copy in donor.held.items()}
            donor.die()
            for lease, epoch in epochs.items():
                known = self.tables.leases.get(lease)
                if known is None or known.spec.epoch < epoch:  # the broker never saw it, perhaps in this life
                    self.forget_what_is_out_of_date(told=True)  # it does not end with the broker here

    def granting_fails(self, condition: Callable[[Lease], bool]) -> None:
        """The broker sees the connection break, and gives up what it had asked for over it."""
        for lease in [lease for lease in self.granting if condition(lease)]:
            self.granting.remove(lease)
            self.answer(lease, works=False)

    @precondition(lambda self: self.calm())
    @rule(order=st.permutations(DONORS), back=st.sampled_from([3, 3, 2, 1, 0]))
    def restart_broker(self, order: list[str], back: int) -> None:
        self.trouble()
        self.forget_what_is_out_of_date()
        self.world.restart()
        self.granting.clear()
        self.open_sessions_again()
        for name in order[:back]:
            self.world.connect(name)

    def open_sessions_again(self) -> None:
        self.tables.open_session(self.session, "t", [], sorted(self.regions))

    def forget_what_is_out_of_date(self, *, told: bool = False) -> None:
        """What is not promised, as it takes three failures at once: that of a copy which was overtaken while
        its donor was cut off, a broker that has restarted since knows that it was, before it sees the newer
        one, or when that one is no more."""
        for donor in self.world.donors.values():
            for lease, copy in list(donor.held.items()):
                newest = max(self.effective(lease, other) for other in self.world.donors.values())
                overtaken = self.effective(lease, donor) < newest
                if (overtaken and copy.served) or (copy.value != self.written[lease] and not self.is_kept(lease)):
                    if told and donor.connected:
                        self.world.evict(donor.name, lease)
                    else:
                        donor.free(lease)

    def is_kept(self, lease: bytes) -> bool:
        """Whether what was last written to it is still there."""
        copies = [donor.held[lease] for donor in self.world.donors.values() if lease in donor.held]
        return self.written[lease] in [copy.value for copy in copies]

    def effective(self, lease: bytes, donor: DonorModel) -> int:
        """The epoch of a donor's copy; of one that has not yet heard of its new one, the new one."""
        copy = donor.held.get(lease)
        if copy is None:
            return 0
        known = self.tables.leases.get(lease)
        mine = known is not None and known.donor == donor.name and known.state in (State.HELD, State.LOST)
        return max(copy.spec.epoch, known.spec.epoch if known is not None and mine else 0)

    @precondition(lambda self: self.calm())
    @rule(seconds=st.sampled_from([0.5, 0.5, WAIT_S + 1, 2 * WAIT_S + MOVE_MARGIN_S, DONOR_GRACE_S]))
    def pass_time(self, seconds: float) -> None:
        self.trouble()
        while seconds > 0:
            step = min(seconds, TTL / 2)
            seconds -= step
            self.world.now += step
            self.waiting_ends(step)
            self.granting_fails(lambda lease, step=step: step >= TTL / 2)  # type: ignore[misc]  # grants have a deadline
            self.regions -= set(self.tables.renew(self.session, {}))
            self.carry_out(self.tables.expire())
            assert self.tables.next_deadline() > self.world.now

    def waiting_ends(self, seconds: float) -> None:
        if seconds > WAIT_S:
            for name, donor in self.world.donors.items():
                for lease in list(donor.arriving):
                    self.world.gives_up_waiting(name, lease)

    # --- what always holds

    @invariant()
    def clients_find_leases_and_read_what_was_last_written(self) -> None:
        for lease in self.tables.leases.values():
            if lease.state is State.HELD:
                copy = self.world.donors[lease.donor].held.get(lease.spec.lease)
                if copy is not None and copy.spec.epoch == lease.spec.epoch:
                    self.links.add(copy)
        for donor in self.world.donors.values():
            for identity, copy in donor.held.items():
                if copy in self.links and copy.served:
                    assert copy.value == self.written[identity]

    @invariant()
    def what_was_last_written_is_not_thrown_away(self) -> None:
        for identity, lease in self.tables.leases.items():
            if lease.state is State.HELD and self.world.donors[lease.donor].connected:
                assert self.is_kept(identity)

    @invariant()
    def no_two_donors_hold_the_newest(self) -> None:
        for identity in {lease for donor in self.world.donors.values() for lease in donor.held}:
            epochs = sorted(self.effective(identity, donor) for donor in self.world.donors.values())
            assert epochs[-1] > epochs[-2]

    @invariant()
    def a_connected_donor_holds_what_the_broker_thinks(self) -> None:
        for name, model in self.world.donors.items():
            if not model.connected:
                continue
            known = self.tables.donors[name]
            for identity in known.leases:
                lease = self.tables.leases[identity]
                if lease.state is State.HELD:
                    copy = model.held[identity]
                    assert copy.spec.epoch == lease.spec.epoch or (
                        copy.spec.epoch < lease.spec.epoch and not copy.served
                    )
            for identity in model.held.keys() - known.leases:
                assert identity in model.unsaid or identity in known.over

    @invariant()
    def what_is_on_its_way_is_counted_once(self) -> None:
        tables = self.tables
        for name, donor in tables.donors.items():
            for identity in donor.arriving:
                move = tables.leases[identity].moving
                assert move is not None
                assert move.donor == name
            assert donor.left <= donor.over.keys()
        for identity, lease in tables.leases.items():
            if lease.moving is not None:
                assert lease.moving.donor != lease.donor
                assert lease.moving.until < math.inf
                target = tables.donors.get(lease.moving.donor)
                assert target is None or identity in target.arriving

    def teardown(self) -> None:
        """When everybody is back, each lease is in one place, or known to be gone."""
        self.granting_fails(lambda lease: True)
        self.connect_all()
        self.let_all_moves_end()

    def connect_all(self) -> None:
        for name, donor in self.world.donors.items():
            if not donor.connected:
                self.world.connect(name)

    def let_all_moves_end(self) -> None:
        for name, donor in self.world.donors.items():
            while donor.unsaid:
                self.world.says_arrived(name)
            for identity in list(donor.arriving):
                self.world.gives_up_waiting(name, identity)
        for name, donor in self.world.donors.items():
            for identity, copy in list(donor.held.items()):
                if not copy.served:
                    self.world.settles(name, identity)
        self.world.now += MOVE_MARGIN_S + WAIT_S
        self.carry_out(self.tables.expire())
        holders = Counter(lease for donor in self.world.donors.values() for lease in donor.held)
        assert all(count == 1 for count in holders.values())
        for identity, lease in self.tables.leases.items():
            assert lease.moving is None
            assert (lease.state is State.HELD) == (identity in holders)
            assert lease.state in (State.HELD, State.LOST, State.DROPPED, State.MISSING)
        self.clients_find_leases_and_read_what_was_last_written()


TestMovesInAnyOrder = MovesMachine.TestCase
TestMovesInAnyOrder.settings = settings(max_examples=500, stateful_step_count=50, deadline=None)
