"""The broker's tables: their rules one by one, and in any order of events against a model of the world."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memfaas.errors import AccessError, LeaseLost, TransportError, UnknownStore
from memfaas.messages import Endpoint, HeldLease, Kind, LeaseSpec, Memory, StoreSpec
from memfaas.server.tables import DONOR_GRACE_S, REMEMBER_S, Lease, Outcome, State, Tables, shard_lease
from memfaas.units import MIB

TTL = 30.0
HEADROOM = 100 * MIB
_ids = itertools.count(1)


def new_id() -> bytes:
    return next(_ids).to_bytes(16, "big")


def cost(kind: Kind, size: int) -> int:
    return size + (MIB if kind == "shard" else 0)


def store_spec(name: str = "s", tenant: str = "t", shards: int = 1, persistent: bool = False) -> StoreSpec:
    return StoreSpec(
        store=new_id(),
        name=name,
        tenant=tenant,
        size=shards * 8 * MIB,
        shards=shards,
        shard_size=8 * MIB,
        persistent=persistent,
        compression="none",
        on_reclaim="migrate",
    )


@dataclass
class DonorModel:
    """What is true on a donor's node, whatever the broker thinks."""

    name: str
    offered: int
    connected: bool = False
    held: dict[bytes, HeldLease] = field(default_factory=dict)

    def leased(self) -> int:
        return sum(cost(one.spec.kind, one.spec.size) for one in self.held.values())

    def memory(self) -> Memory:
        return Memory(
            offered=self.offered,
            leased=self.leased(),
            populated=self.leased(),
            available=self.offered + HEADROOM - self.leased(),
            headroom=HEADROOM,
        )

    def serve(self, spec: LeaseSpec) -> Endpoint:
        endpoint = Endpoint(node=self.name, unix_path=f"/{spec.lease.hex()}", host=self.name, port=1)
        self.held[spec.lease] = HeldLease(spec=spec, endpoint=endpoint)
        assert self.leased() <= self.offered, "more was granted than the donor offers"
        return endpoint


@dataclass
class SessionModel:
    tenant: str
    stores: set[bytes] = field(default_factory=set)
    regions: set[bytes] = field(default_factory=set)
    connected: bool = True


class World:
    """Tables, and donors that do what they are told, as the broker would have it done."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.donors: dict[str, DonorModel] = {}
        self.told: list[tuple[bytes, bytes]] = []
        self.tables = self.new_tables()

    def new_tables(self) -> Tables:
        return Tables(lambda: self.now, TTL, cost)

    def donor(self, name: str, offered: int = 64 * MIB) -> DonorModel:
        self.donors[name] = DonorModel(name, offered)
        self.connect(name)
        return self.donors[name]

    def connect(self, name: str) -> None:
        donor = self.donors[name]
        donor.connected = True
        outcome = self.tables.register(name, name, name, donor.memory(), list(donor.held.values()))
        for one in [one for one in outcome.free if one.donor == name]:  # what `Registered.drop` carries
            outcome.free.remove(one)
            del donor.held[one.lease]
            self.carry_out(self.tables.lost(name, one.lease, "dropped"))
            self.tables.report(name, donor.memory(), {})
        self.carry_out(outcome)

    def disconnect(self, name: str) -> None:
        self.donors[name].connected = False
        self.tables.disconnect_donor(name)

    def carry_out(self, outcome: Outcome) -> None:
        self.told += [(one.session, one.lease) for one in outcome.tell]
        for one in outcome.free:
            donor = self.donors[one.donor]
            if donor.connected:
                donor.held.pop(one.lease, None)
                self.tables.freed(one.donor, one.lease, donor.memory())

    def grant(self, lease: Lease) -> bool:
        donor = self.donors[lease.donor]
        endpoint = donor.serve(lease.spec)
        kept = self.tables.granted(lease.donor, lease.spec.lease, endpoint, donor.memory())
        if not kept:
            del donor.held[lease.spec.lease]
            self.tables.freed(donor.name, lease.spec.lease, donor.memory())
        return kept

    def session(self, tenant: str = "t") -> bytes:
        session = new_id()
        self.tables.open_session(session, tenant, [], [])
        return session

    def store(self, session: bytes, donors: list[str], *, persistent: bool = False, name: str = "s") -> StoreSpec:
        tenant = self.tables.sessions[session].tenant
        spec = store_spec(name, tenant, len(donors), persistent)
        for lease in self.tables.begin_store(session, spec, donors):
            assert self.grant(lease)
        return spec

    def region(self, session: bytes, donor: str) -> bytes:
        lease = new_id()
        tenant = self.tables.sessions[session].tenant
        assert self.grant(self.tables.begin_region(session, tenant, lease, 8 * MIB, donor))
        return lease

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.tables.expire())

    def restart(self) -> None:
        self.tables = self.new_tables()
        for donor in self.donors.values():
            donor.connected = False


@pytest.fixture
def world() -> World:
    return World()


# --- one rule at a time -----------------------------------------------------------------------------


def test_a_session_that_is_not_renewed_loses_its_leases(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    world.store(session, ["d"])
    world.region(session, "d")
    world.tables.disconnect_session(session)
    world.pass_time(TTL - 1)
    assert len(donor.held) == 2
    world.pass_time(1)
    assert donor.held == {}
    assert world.tables.leases == {}
    assert world.tables.sessions == {}


def test_renewals_keep_leases_and_a_connected_session_is_told_of_its_expiry(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    spec = world.store(session, ["d"])
    region = world.region(session, "d")
    for _ in range(5):
        world.pass_time(TTL - 1)
        assert world.tables.renew(session, {}) == []
    assert len(donor.held) == 2
    world.pass_time(TTL)
    assert donor.held == {}
    gone = {shard_lease(spec.store, 0), region}
    assert {lease for to, lease in world.told if to == session} == gone
    assert set(world.tables.renew(session, {})) == gone
    assert world.tables.renew(session, {}) == []


def test_a_store_lives_until_its_last_session_closes_it(world: World) -> None:
    donor = world.donor("d")
    first, second = world.session(), world.session()
    spec = world.store(first, ["d"])
    world.tables.use_store(second, spec.store)
    world.carry_out(world.tables.close_store(first, spec.store))
    assert donor.held
    world.carry_out(world.tables.close_store(second, spec.store))
    assert not donor.held
    assert world.tables.find_store("t", "s") is None


def test_a_persistent_store_outlives_its_session_until_it_is_deleted(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    world.store(session, ["d"], persistent=True)
    world.carry_out(world.tables.close_session(session))
    world.pass_time(10 * TTL)
    assert donor.held
    world.carry_out(world.tables.delete_store("t", "s"))
    assert not donor.held


def test_deleting_a_store_tells_its_sessions(world: World) -> None:
    world.donor("d")
    first, second = world.session(), world.session()
    spec = world.store(first, ["d", "d"])
    world.tables.use_store(second, spec.store)
    world.carry_out(world.tables.delete_store("t", "s"))
    leases = {shard_lease(spec.store, 0), shard_lease(spec.store, 1)}
    assert set(world.told) == {(session, lease) for session in (first, second) for lease in leases}
    world.pass_time(DONOR_GRACE_S)
    with pytest.raises(LeaseLost):
        world.tables.locate("t", shard_lease(spec.store, 0))


def test_a_tenant_cannot_touch_anothers(world: World) -> None:
    world.donor("d")
    mine, theirs = world.session("mine"), world.session("theirs")
    spec = world.store(mine, ["d"])
    region = world.region(mine, "d")
    for lease in (region, shard_lease(spec.store, 0)):
        with pytest.raises(AccessError):
            world.tables.locate("theirs", lease)
        with pytest.raises(AccessError):
            world.tables.release(theirs, lease)
    with pytest.raises(UnknownStore):
        world.tables.delete_store("theirs", "s")
    with pytest.raises(UnknownStore):
        world.tables.close_store(theirs, spec.store)
    with pytest.raises(AccessError):
        world.tables.open_session(mine, "theirs", [], [])
    assert world.tables.find_store("theirs", "s") is None
    world.tables.open_session(theirs, "theirs", [spec.store], [region])
    assert world.tables.sessions[theirs].stores == set()
    assert world.tables.renew(theirs, {}) == [region]
    assert world.tables.stores[spec.store].sessions == {mine}


def test_a_broker_that_restarts_learns_all_back(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    spec = world.store(session, ["d", "d"])
    region = world.region(session, "d")
    held = set(donor.held)
    world.restart()
    world.tables.open_session(session, "t", [spec.store], [region])  # either may come first
    world.connect("d")
    for _ in range(10):
        world.pass_time(TTL - 1)
        assert world.tables.renew(session, {}) == []
    assert set(donor.held) == held
    assert set(world.tables.leases) == held
    assert world.tables.sessions[session].stores == {spec.store}


def test_after_a_restart_what_no_session_claims_is_freed_after_one_ttl(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    world.store(session, ["d"])
    world.region(session, "d")
    kept = world.store(session, ["d"], persistent=True, name="kept")
    world.restart()
    world.connect("d")
    world.tables.open_session(session, "t", [], [])  # it comes back, but no longer uses them
    world.pass_time(TTL - 1)
    world.tables.renew(session, {})
    assert len(donor.held) == 3
    world.pass_time(1)
    assert set(donor.held) == {shard_lease(kept.store, 0)}


def test_a_claim_that_no_donor_shows_is_reported_gone(world: World) -> None:
    world.donor("d")
    session = world.session()
    region = world.region(session, "d")
    world.restart()
    world.tables.open_session(session, "t", [], [region])
    with pytest.raises(TransportError):  # its donor may yet come
        world.tables.locate("t", region)
    assert world.tables.renew(session, {}) == []
    world.now += DONOR_GRACE_S
    assert world.tables.renew(session, {}) == [region]
    with pytest.raises(LeaseLost):
        world.tables.locate("t", region)


def test_a_lease_that_ended_while_its_donor_was_away_is_dropped_and_not_learned(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    region = world.region(session, "d")
    spec = world.store(session, ["d"])
    world.disconnect("d")
    world.carry_out(world.tables.release(session, region))
    world.carry_out(world.tables.close_store(session, spec.store))
    assert len(donor.held) == 2
    world.connect("d")
    assert donor.held == {}
    assert world.tables.leases == {}
    assert world.tables.rooms()[0].free == donor.offered


def test_a_donor_that_stays_away_loses_its_leases_and_sessions_are_told(world: World) -> None:
    for name in ("d", "e"):
        world.donor(name)
    session = world.session()
    spec = world.store(session, ["d", "e"])
    region = world.region(session, "d")
    world.disconnect("d")
    world.pass_time(TTL - 1)
    world.tables.renew(session, {})
    assert world.tables.locate("t", region).donor == "d"  # not lost yet
    world.pass_time(TTL - 1)
    world.tables.renew(session, {})
    world.pass_time(DONOR_GRACE_S - 2 * TTL + 2)
    lost = shard_lease(spec.store, 0)
    assert set(world.told) == {(session, lost), (session, region)}
    assert world.tables.lost_shards(world.tables.stores[spec.store]) == [0]
    for lease in (lost, region):
        with pytest.raises(LeaseLost):
            world.tables.locate("t", lease)


def test_a_shard_whose_donor_comes_back_late_is_found_again_but_a_region_is_not(world: World) -> None:
    for name in ("d", "e"):
        world.donor(name)
    session = world.session()
    spec = world.store(session, ["d", "e"], persistent=True)
    region = world.region(session, "d")
    world.disconnect("d")
    world.tables.disconnect_session(session)
    world.pass_time(DONOR_GRACE_S)
    world.connect("d")
    assert world.tables.lost_shards(world.tables.stores[spec.store]) == []
    assert world.tables.locate("t", shard_lease(spec.store, 0)).state is State.HELD
    assert region not in world.donors["d"].held


def test_a_store_that_lost_every_shard_is_gone_and_its_name_free(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    world.store(session, ["d", "d"], persistent=True)
    world.disconnect("d")
    donor.held.clear()
    world.connect("d")
    assert world.tables.find_store("t", "s") is None
    assert len(set(world.told)) == 2
    world.store(session, ["d"], persistent=True)


def test_two_stores_of_one_name_are_both_kept(world: World) -> None:
    """One was made while the broker, freshly started, did not know of the other."""
    world.donor("d")
    world.donor("e")
    old = world.store(world.session(), ["d"], persistent=True)
    world.restart()
    world.connect("e")
    new = world.store(world.session(), ["e"], persistent=True)
    world.connect("d")
    assert world.tables.names["t", "s"] == new.store
    assert world.tables.names["t", f"s~{old.store.hex()[:8]}"] == old.store


def test_a_reconnected_session_gives_up_what_it_does_not_name(world: World) -> None:
    """It closed a store or released a region while the broker was out of its reach."""
    donor = world.donor("d")
    session = world.session()
    kept = world.store(session, ["d"], name="kept")
    world.store(session, ["d"], name="closed")
    world.region(session, "d")
    world.tables.disconnect_session(session)
    world.carry_out(world.tables.open_session(session, "t", [kept.store], []))
    assert set(donor.held) == {shard_lease(kept.store, 0)}


def test_a_lease_that_ends_while_it_is_granted_is_not_kept(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    lease = world.tables.begin_region(session, "t", new_id(), 8 * MIB, "d")
    world.carry_out(world.tables.close_session(session))
    assert not world.grant(lease)
    assert donor.held == {}


def test_room_counts_grants_that_are_under_way_and_memory_that_is_not_yet_freed(world: World) -> None:
    donor = world.donor("d", offered=64 * MIB)
    session = world.session()

    def free() -> int:
        (room,) = world.tables.rooms()
        return room.free

    assert free() == 64 * MIB
    lease = world.tables.begin_region(session, "t", new_id(), 40 * MIB, "d")
    assert free() == 24 * MIB
    world.grant(lease)
    assert free() == 24 * MIB
    outcome = world.tables.release(session, lease.spec.lease)
    assert free() == 24 * MIB
    world.carry_out(outcome)
    assert free() == 64 * MIB
    world.tables.report(
        "d", Memory(offered=64 * MIB, leased=0, populated=0, available=110 * MIB, headroom=HEADROOM), {}
    )
    assert free() == 10 * MIB
    assert donor.held == {}


def test_what_is_remembered_for_a_dead_donor_is_forgotten_in_the_end(world: World) -> None:
    world.donor("d")
    session = world.session()
    world.region(session, "d")
    world.disconnect("d")
    world.pass_time(DONOR_GRACE_S)
    world.tables.disconnect_session(session)
    world.pass_time(REMEMBER_S)
    assert world.tables.donors == {}
    assert world.tables.next_deadline() == math.inf


# --- in any order -----------------------------------------------------------------------------------

DONORS = ("d1", "d2", "d3")


class TablesMachine(RuleBasedStateMachine):
    """Donors, sessions and the broker come, go, crash and return; the rules hold all the time."""

    def __init__(self) -> None:
        super().__init__()
        global _ids
        _ids = itertools.count(1)  # an example must be the same each time it runs
        self.world = World()
        self.sessions: dict[bytes, SessionModel] = {}
        self.granting: list[Lease] = []
        self.over: set[bytes] = set()
        """Leases that the present broker has ended."""

    @property
    def tables(self) -> Tables:
        return self.world.tables

    @initialize()
    def begin(self) -> None:
        for name in DONORS:
            self.world.donor(name)
        for tenant in ("a", "a", "b"):
            self.open_session(tenant)

    def carry_out(self, outcome: Outcome) -> None:
        self.over |= {one.lease for one in outcome.free}
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
        at_once=st.booleans(),
    )
    def open_store(self, data: st.DataObject, name: str, shards: int, persistent: bool, at_once: bool) -> None:
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
        spec = store_spec(name, model.tenant, shards, persistent)
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
        if works and self.world.donors[lease.donor].connected:
            if self.world.grant(lease) and spec.store is None and spec.session in self.sessions:
                self.sessions[spec.session].regions.add(spec.lease)
            store = spec.store and self.tables.stores.get(spec.store.store)
            if store and not self.tables.being_made(store):
                for session in store.sessions:
                    self.sessions[session].stores.add(store.spec.store)
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
            donor.held.clear()

    def granting_fails(self, condition: Callable[[Lease], bool]) -> None:
        """The broker sees the connection break, and gives up what it had asked for over it."""
        failed = [lease for lease in self.granting if condition(lease)]
        for lease in failed:
            if lease.spec.store is not None:
                self.carry_out(self.tables.abandon_store(lease.spec.store.store, "its donor went away"))
            else:
                self.carry_out(self.tables.abandon_region(lease.spec.lease, "its donor went away"))
        self.granting = [lease for lease in self.granting if self.tables.leases.get(lease.spec.lease) is lease]

    @rule(name=st.sampled_from(DONORS))
    def function_is_given_up(self, name: str) -> None:
        donor = self.world.donors[name]
        if donor.held and donor.connected:
            lease = min(donor.held)
            del donor.held[lease]
            self.carry_out(self.tables.lost(name, lease, "it kept failing"))
            self.tables.report(name, donor.memory(), {})

    @rule()
    def restart_broker(self) -> None:
        self.world.restart()
        self.granting.clear()
        self.over.clear()
        for model in self.sessions.values():
            model.connected = False

    @rule(seconds=st.sampled_from([0.5, 10.0, TTL, DONOR_GRACE_S, REMEMBER_S]))
    def pass_time(self, seconds: float) -> None:
        self.world.now += seconds
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
            assert (lease.donor == "") == (lease.state is State.MISSING) or lease.state is State.LOST
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
    def a_connected_donor_holds_what_the_broker_thinks(self) -> None:
        for name, model in self.world.donors.items():
            if model.connected:
                known = self.tables.donors[name]
                held = {one for one in known.leases if self.tables.leases[one].state is State.HELD}
                assert held == set(model.held)

    def teardown(self) -> None:
        """When everybody is back, and then the sessions leave, all memory is free again."""
        self.granting_fails(lambda lease: True)
        for name, donor in self.world.donors.items():
            if not donor.connected:
                self.world.connect(name)
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
