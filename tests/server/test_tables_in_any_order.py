"""The broker's tables in any order of events, against a model of the world."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from memfaas.errors import LeaseLost, TransportError, UnknownStore
from memfaas.messages import OnReclaim
from memfaas.server.records import DONOR_GRACE_S, REMEMBER_S, Lease, Outcome, State
from memfaas.units import MIB
from tests.server.test_moves_in_any_order import DONORS, SPILL, MovesMachine
from tests.server.world import TTL, cost, new_id, store_spec


@dataclass
class SessionModel:
    tenant: str
    stores: set[bytes] = field(default_factory=set)
    regions: set[bytes] = field(default_factory=set)
    connected: bool = True


class TablesMachine(MovesMachine):
    """Donors, sessions and the broker come, go, crash and return; the rules hold all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[bytes, SessionModel] = {}
        self.over: set[bytes] = set()
        """Leases that the present broker has ended."""

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

    def few_leases(self) -> bool:
        return False  # sessions make their own

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

    def answer(self, lease: Lease, works: bool) -> None:
        spec = lease.spec
        donor = self.world.donors[lease.donor]
        if self.tables.leases.get(spec.lease) is not lease and donor.leased() + lease.cost > donor.offered:
            return  # it ended meanwhile, its room went to another, and so the donor refuses it
        if works and lease.donor in self.tables.donors and donor.connected:
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

    # --- the broker, time

    def open_sessions_again(self) -> None:
        self.over.clear()
        for model in self.sessions.values():
            model.connected = False

    def something_moves(self) -> bool:
        donors = self.world.donors.values()
        return any(
            donor.unsaid or donor.arriving or not all(copy.served for copy in donor.held.values()) for donor in donors
        )

    @rule(seconds=st.sampled_from([0.5, 10.0, TTL, DONOR_GRACE_S, REMEMBER_S]))
    def pass_time(self, seconds: float) -> None:
        if seconds >= REMEMBER_S and self.something_moves():
            seconds = DONOR_GRACE_S  # no donor is in doubt for a whole day
        self.world.now += seconds
        self.waiting_ends(seconds)
        self.granting_fails(lambda lease: seconds >= TTL)  # grants have a deadline
        self.carry_out(self.tables.expire())
        if seconds >= DONOR_GRACE_S:  # of donors that it has never seen, a broker remembers nothing for longer
            self.over &= {lease for donor in self.tables.donors.values() for lease in donor.over}
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

    def teardown(self) -> None:
        """When everybody is back, and then the sessions leave, all memory is free again."""
        self.granting_fails(lambda lease: True)
        self.connect_all()
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


TestTablesInAnyOrder = TablesMachine.TestCase
TestTablesInAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
