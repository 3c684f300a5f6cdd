"""The broker's tables in any order of events, against a model of the world."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memfaas.errors import LeaseLost, TransportError, UnknownStore
from memfaas.messages import OnReclaim
from memfaas.server.records import DONOR_GRACE_S, MOVE_MARGIN_S, REMEMBER_S, Lease, Outcome, State
from memfaas.server.tables import Tables
from memfaas.units import MIB
from tests.server.world import TTL, Copy, DonorModel, World, cost, new_id, restart_ids, store_spec


@dataclass
class SessionModel:
    tenant: str
    stores: set[bytes] = field(default_factory=set)
    regions: set[bytes] = field(default_factory=set)
    connected: bool = True


DONORS = ("d1", "d2", "d3")
SPILL = "d3"
Doing = Callable[[DonorModel, bytes, Copy], bool]


class TablesMachine(RuleBasedStateMachine):
    """Donors, sessions and the broker come, go, crash and return; the rules hold all the time."""

    def __init__(self) -> None:
        super().__init__()
        restart_ids()
        self.world = World()
        self.sessions: dict[bytes, SessionModel] = {}
        self.granting: list[Lease] = []
        self.over: set[bytes] = set()
        """Leases that the present broker has ended."""
        self.links: set[Copy] = set()
        """Copies that clients were led to; a link stays for as long as its copy is there."""
        self.written: dict[bytes, int] = {}
        """What was last written to a lease; each write writes something new."""
        self.writes = itertools.count(1)

    @property
    def tables(self) -> Tables:
        return self.world.tables

    @initialize()
    def begin(self) -> None:
        for name in DONORS:
            self.world.donor(name, spill=name == SPILL)
        for tenant in ("a", "a", "b"):
            self.open_session(tenant)

    def carry_out(self, outcome: Outcome) -> None:
        self.over |= {one.lease for one in outcome.free if one.lease not in self.tables.leases}
        for one in outcome.tell:
            session = self.sessions.get(one.session)
            if session is not None:
                session.regions.discard(one.lease)
        self.world.carry_out(outcome)

    def pick(self, data: st.DataObject, condition: Callable[[SessionModel], bool]) -> bytes | None:
        fitting = sorted(one for one, model in self.sessions.items() if condition(model))
        return data.draw(st.sampled_from(fitting)) if fitting else None

    # --- sessions

    @rule(tenant=st.sampled_from(["a", "b"]))
    def open_session(self, tenant: str) -> None:
        if len(self.sessions) < 4:
            session = new_id()
            self.tables.open_session(session, tenant, [], [])
            self.sessions[session] = SessionModel(tenant)

    @rule(data=st.data())
    def reconnect_session(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda model: not model.connected)
        if session is not None:
            model = self.sessions[session]
            model.connected = True
            self.carry_out(self.tables.open_session(session, model.tenant, sorted(model.stores), sorted(model.regions)))

    @rule(data=st.data())
    def disconnect_session(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda model: model.connected)
        if session is not None:
            self.sessions[session].connected = False
            self.tables.disconnect_session(session)

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda model: model.connected)
        if session is not None:
            self.sessions[session].regions -= set(self.tables.renew(session, {"shm": 1}))

    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda model: model.connected)
        if session is not None:
            del self.sessions[session]
            self.carry_out(self.tables.close_session(session))

    # --- stores and regions

    def room(self, data: st.DataObject, needed: int, count: int) -> list[str] | None:
        slots = [room.donor for room in self.tables.rooms() for _ in range(room.free // needed)]
        if len(slots) < count:
            return None
        return data.draw(st.permutations(slots))[:count]

    @rule(
        data=st.data(),
        name=st.sampled_from(["x", "y"]),
        shards=st.integers(1, 4),
        persistent=st.booleans(),
        on_reclaim=st.sampled_from(["migrate", "drop"]),
        at_once=st.booleans(),
    )
    def open_store(
        self, data: st.DataObject, name: str, shards: int, persistent: bool, on_reclaim: OnReclaim, at_once: bool
    ) -> None:
        session = self.pick(data, lambda model: model.connected)
        if session is None:
            return
        model = self.sessions[session]
        store = self.tables.find_store(model.tenant, name)
        if store is not None:
            if not self.tables.being_made(store):
                self.tables.use_store(session, store.spec.store)
                model.stores.add(store.spec.store)
            return
        spec = store_spec(name, model.tenant, shards, persistent, on_reclaim)
        donors = self.room(data, cost("shard", spec.shard_size), shards)
        if donors is not None:
            self.granting += self.tables.begin_store(session, spec, donors)
            while at_once and self.granting:
                self.answer(self.granting.pop(), works=True)

    @rule(data=st.data(), size=st.integers(1, 20), at_once=st.booleans())
    def open_region(self, data: st.DataObject, size: int, at_once: bool) -> None:
        session = self.pick(data, lambda model: model.connected)
        donors = self.room(data, size * MIB, 1)
        if session is not None and donors is not None:
            lease = new_id()
            self.granting.append(
                self.tables.begin_region(session, self.sessions[session].tenant, lease, size * MIB, donors[0])
            )
            while at_once and self.granting:
                self.answer(self.granting.pop(), works=True)

    @precondition(lambda self: self.granting)
    @rule(data=st.data(), works=st.sampled_from([True, True, True, False]))
    def donor_answers(self, data: st.DataObject, works: bool) -> None:
        self.answer(self.granting.pop(data.draw(st.integers(0, len(self.granting) - 1))), works)

    def answer(self, lease: Lease, works: bool) -> None:
        spec = lease.spec
        if works and lease.donor in self.tables.donors and self.world.donors[lease.donor].connected:
            self.written.setdefault(spec.lease, 0)
            if self.world.grant(lease) and spec.store is None and spec.session in self.sessions:
                self.sessions[spec.session].regions.add(spec.lease)
            store = spec.store and self.tables.stores.get(spec.store.store)
            if store and not self.tables.being_made(store):
                for session in store.sessions:
                    self.sessions[session].stores.add(store.spec.store)
        elif spec.epoch > 1:
            self.carry_out(self.tables.not_begun_again(lease, "it failed"))
        elif spec.store is not None:
            of = spec.store.store
            self.granting = [one for one in self.granting if one.spec.store is None or one.spec.store.store != of]
            self.carry_out(self.tables.abandon_store(of, "it failed"))
        else:
            self.carry_out(self.tables.abandon_region(spec.lease, "it failed"))

    @rule(data=st.data())
    def close_store(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda model: model.connected and bool(model.stores))
        if session is not None:
            store = data.draw(st.sampled_from(sorted(self.sessions[session].stores)))
            self.sessions[session].stores.discard(store)
            try:
                self.carry_out(self.tables.close_store(session, store))
            except UnknownStore:
                assert session not in getattr(self.tables.stores.get(store), "sessions", ())

    @rule(tenant=st.sampled_from(["a", "b"]), name=st.sampled_from(["x", "y"]))
    def delete_store(self, tenant: str, name: str) -> None:
        try:
            self.carry_out(self.tables.delete_store(tenant, name))
        except UnknownStore:
            assert (tenant, name) not in self.tables.names

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda model: model.connected and bool(model.regions))
        if session is not None:
            region = data.draw(st.sampled_from(sorted(self.sessions[session].regions)))
            self.sessions[session].regions.discard(region)
            try:
                self.carry_out(self.tables.release(session, region))
            except (LeaseLost, TransportError):
                assert region not in self.tables.leases

    # --- donors, the broker, time

    @rule(name=st.sampled_from(DONORS))
    def connect_donor(self, name: str) -> None:
        if not self.world.donors[name].connected:
            self.world.connect(name)

    @rule(name=st.sampled_from(DONORS), dies=st.booleans())
    def disconnect_donor(self, name: str, dies: bool) -> None:
        donor = self.world.donors[name]
        if donor.connected:
            self.world.disconnect(name)
            self.granting_fails(lambda lease: lease.donor == name)
        if dies:
            donor.die()

    def granting_fails(self, condition: Callable[[Lease], bool]) -> None:
        """The broker sees the connection break, and gives up what it had asked for over it."""
        failed = [lease for lease in self.granting if condition(lease)]
        for lease in failed:
            if lease.spec.epoch > 1:
                self.carry_out(self.tables.not_begun_again(lease, "its donor went away"))
            elif lease.spec.store is not None:
                self.carry_out(self.tables.abandon_store(lease.spec.store.store, "its donor went away"))
            else:
                self.carry_out(self.tables.abandon_region(lease.spec.lease, "its donor went away"))
        self.granting = [
            lease
            for lease in self.granting
            if self.tables.leases.get(lease.spec.lease) is lease and lease.state is State.GRANTING
        ]

    # --- leases that move

    def copy(self, data: st.DataObject, condition: Doing) -> tuple[DonorModel, bytes, Copy] | None:
        fitting = [
            (donor, lease, copy)
            for donor in self.world.donors.values()
            for lease, copy in sorted(donor.held.items())
            if condition(donor, lease, copy)
        ]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        found = self.copy(data, lambda _, __, copy: copy in self.links and copy.served)
        if found is not None:
            _, lease, copy = found
            self.written[lease] = copy.value = next(self.writes)

    @rule(data=st.data(), outcome=st.sampled_from(["ready", "ready", "ready", "refused", "unheard"]))
    def relocate(self, data: st.DataObject, outcome: str) -> None:
        def may(donor: DonorModel, lease: bytes, copy: Copy) -> bool:
            known = self.tables.leases.get(lease)
            return donor.connected and copy.sending is None and known is not None and known.donor == donor.name

        found = self.copy(data, may)
        if found is None:
            return
        source, lease, copy = found
        known = self.tables.movable(source.name, lease, copy.spec.epoch)
        rooms = [room.donor for room in self.tables.rooms_for(known) if room.free >= known.cost]
        assert source.name not in rooms
        if not rooms:
            return
        target = data.draw(st.sampled_from(rooms))
        assert not (source.spill and self.world.donors[target].spill)
        if outcome == "ready":
            self.world.relocate(source.name, lease, target)
            return
        move, spec = self.tables.begin_move(known, target, 5.0)
        if outcome == "unheard":
            self.world.donors[target].incoming[lease] = spec
        self.carry_out(self.tables.move_over(known, move, "it was refused"))

    @rule(data=st.data())
    def sending_fails(self, data: st.DataObject) -> None:
        found = self.copy(data, lambda _, __, copy: copy.sending is not None and copy.served)
        if found is not None:
            self.world.fails_to_send(found[0].name, found[1])

    @rule(data=st.data(), arrives=st.sampled_from([True, True, False]))
    def all_is_sent(self, data: st.DataObject, arrives: bool) -> None:
        found = self.copy(data, lambda _, __, copy: copy.sending is not None and copy.served)
        if found is not None:
            self.world.sends_all(found[0].name, found[1], arrives=arrives)

    @rule(data=st.data())
    def source_hears_that_it_moved(self, data: st.DataObject) -> None:
        def may(_: DonorModel, lease: bytes, copy: Copy) -> bool:
            if copy.sending is None or not copy.sending.in_doubt or copy.sending.asked:
                return False
            there = self.world.donors[copy.sending.donor].held.get(lease)
            return there is not None and there.spec.epoch == copy.sending.epoch

        found = self.copy(data, may)
        if found is not None:
            self.world.hears_that_it_moved(found[0].name, found[1])

    @rule(name=st.sampled_from(DONORS))
    def target_says_arrived(self, name: str) -> None:
        if self.world.donors[name].unsaid:
            self.world.says_arrived(name)

    @rule(name=st.sampled_from(DONORS))
    def target_gives_up_waiting(self, name: str) -> None:
        for lease in sorted(self.world.donors[name].incoming)[:1]:
            self.world.gives_up_waiting(name, lease)

    @rule(data=st.data(), heard=st.booleans())
    def settle(self, data: st.DataObject, heard: bool) -> None:
        found = self.copy(data, lambda donor, _, copy: donor.connected and not copy.served)
        if found is not None:
            try:
                self.world.settles(found[0].name, found[1], heard=heard)
            except TransportError:
                assert (
                    copy_target(found[2]) not in self.tables.donors
                    or not self.tables.donors[copy_target(found[2])].connected
                )

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """A function is given up, or its memory is needed at once."""
        found = self.copy(data, lambda donor, _, __: donor.connected)
        if found is not None:
            donor, lease, copy = found
            del donor.held[lease]
            drops = copy.spec.store is not None and copy.spec.store.on_reclaim == "drop"
            self.world.say_gone(donor.name, lease, "its memory was needed", dropped=7 if drops else None)

    @rule(data=st.data(), at_once=st.booleans())
    def regrant(self, data: st.DataObject, at_once: bool) -> None:
        dropped = [lease for lease in self.tables.leases.values() if lease.state is State.DROPPED]
        if not dropped:
            return
        lease = data.draw(st.sampled_from(dropped))
        rooms = [room.donor for room in self.tables.rooms_for(lease) if room.free >= lease.cost]
        if rooms:
            self.tables.begin_again(lease, data.draw(st.sampled_from(rooms)))
            self.written[lease.spec.lease] = 0
            self.granting.append(lease)
            while at_once and self.granting:
                self.answer(self.granting.pop(), works=True)

    # --- the broker, time

    @rule()
    def restart_broker(self) -> None:
        self.forget_what_is_out_of_date()
        self.world.restart()
        self.granting.clear()
        self.over.clear()
        for model in self.sessions.values():
            model.connected = False

    def forget_what_is_out_of_date(self) -> None:
        """The one thing that is not promised: a copy that was overtaken while its donor was cut off, and
        that comes back to a broker which has restarted since, before the newer one does."""
        for donor in self.world.donors.values():
            for lease, copy in list(donor.held.items()):
                newest = max(self.effective(lease, other) for other in self.world.donors.values())
                if copy.value != self.written[lease] or self.effective(lease, donor) < newest:
                    donor.free(lease)

    def effective(self, lease: bytes, donor: DonorModel) -> int:
        """The epoch of a donor's copy; of one that has not yet heard of its new one, the new one."""
        copy = donor.held.get(lease)
        if copy is None:
            return 0
        known = self.tables.leases.get(lease)
        mine = known is not None and known.donor == donor.name and known.state in (State.HELD, State.LOST)
        return max(copy.spec.epoch, known.spec.epoch if known is not None and mine else 0)

    @rule(seconds=st.sampled_from([0.5, 10.0, TTL, DONOR_GRACE_S, REMEMBER_S]))
    def pass_time(self, seconds: float) -> None:
        self.world.now += seconds
        if seconds > 5:  # which is what donors wait
            for name, donor in self.world.donors.items():
                for lease in list(donor.incoming):
                    self.world.gives_up_waiting(name, lease)
        self.granting_fails(lambda lease: seconds >= TTL)  # grants have a deadline
        self.carry_out(self.tables.expire())
        assert self.tables.next_deadline() > self.world.now
        for session in [one for one in self.sessions if one not in self.tables.sessions]:
            if seconds >= TTL:
                del self.sessions[session]

    # --- what always holds

    @invariant()
    def every_store_has_one_name_and_all_its_leases(self) -> None:
        tables = self.tables
        assert sorted(tables.names.values()) == sorted(tables.stores)
        for (tenant, name), identity in tables.names.items():
            spec = tables.stores[identity].spec
            assert (spec.tenant, spec.name) == (tenant, name)
        for store in tables.stores.values():
            assert len(store.leases) == store.spec.shards
            for shard, identity in enumerate(store.leases):
                lease = tables.leases[identity]
                assert lease.spec.store is not None
                assert (lease.spec.store.store, lease.spec.shard) == (store.spec.store, shard)

    @invariant()
    def every_lease_has_somebody_or_an_end(self) -> None:
        tables = self.tables
        for identity, lease in tables.leases.items():
            if lease.spec.store is not None:
                assert lease.spec.store.store in tables.stores
            else:
                holder = tables.sessions.get(lease.spec.session)
                assert (holder is not None and identity in holder.regions) != (lease.until < math.inf)
        for store in tables.stores.values():
            assert store.sessions or store.spec.persistent or store.until < math.inf
        for session in tables.sessions.values():
            assert session.expires < math.inf
            for identity in session.stores:
                assert session.session in tables.stores[identity].sessions
                assert tables.stores[identity].spec.tenant == session.tenant
            for identity in session.regions:
                assert tables.leases[identity].spec.tenant == session.tenant
        for store in tables.stores.values():
            assert all(store.spec.store in tables.sessions[session].stores for session in store.sessions)

    @invariant()
    def every_lease_is_with_its_donor(self) -> None:
        tables = self.tables
        for identity, lease in tables.leases.items():
            nowhere = lease.state in (State.MISSING, State.DROPPED)
            assert (lease.donor == "") == nowhere or lease.state is State.LOST
            if lease.donor:
                assert identity in tables.donors[lease.donor].leases
        for donor in tables.donors.values():
            assert donor.leases.isdisjoint(donor.over)
            for identity in donor.leases:
                assert tables.leases[identity].donor == donor.name
            if not donor.connected:
                assert donor.leases or donor.over or donor.lost_at < math.inf

    @invariant()
    def what_is_over_stays_over(self) -> None:
        assert self.over.isdisjoint(self.tables.leases)

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
        """When everybody is back, and then the sessions leave, all memory is free again."""
        self.granting_fails(lambda lease: True)
        for name, donor in self.world.donors.items():
            if not donor.connected:
                self.world.connect(name)
        self.let_all_moves_end()
        for session in list(self.tables.sessions):
            self.tables.disconnect_session(session)
        self.pass_time(TTL)
        self.pass_time(DONOR_GRACE_S)
        for store in self.tables.stores.values():
            assert store.spec.persistent
        for tenant, name in list(self.tables.names):
            self.carry_out(self.tables.delete_store(tenant, name))
        assert self.tables.leases == {}
        assert self.tables.sessions == {}
        for donor in self.world.donors.values():
            assert donor.held == {}
        for room in self.tables.rooms():
            assert room.free == self.world.donors[room.donor].offered

    def let_all_moves_end(self) -> None:
        for name, donor in self.world.donors.items():
            while donor.unsaid:
                self.world.says_arrived(name)
            for identity in list(donor.incoming):
                self.world.gives_up_waiting(name, identity)
        for name, donor in self.world.donors.items():
            for identity, copy in list(donor.held.items()):
                if not copy.served:
                    self.world.settles(name, identity)
        self.world.now += MOVE_MARGIN_S + 5.0
        self.carry_out(self.tables.expire())
        holders = Counter(lease for donor in self.world.donors.values() for lease in donor.held)
        assert all(count == 1 for count in holders.values())
        for identity, lease in self.tables.leases.items():
            assert lease.moving is None
            assert (lease.state is State.HELD) == (identity in holders)
            assert lease.state in (State.HELD, State.LOST, State.DROPPED, State.MISSING)
        self.clients_find_leases_and_read_what_was_last_written()


def copy_target(copy: Copy) -> str:
    assert copy.sending is not None
    return copy.sending.donor


TestTablesInAnyOrder = TablesMachine.TestCase
TestTablesInAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
