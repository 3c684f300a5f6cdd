"""The rules of the broker's tables, one by one."""

from __future__ import annotations

import math

import pytest

from memfaas.errors import AccessError, LeaseLost, TransportError, UnknownStore
from memfaas.messages import DonorReport, LeaseGone, Memory, short
from memfaas.server.records import DONOR_GRACE_S, REMEMBER_S, State, shard_lease
from memfaas.units import MIB
from tests.server.world import HEADROOM, TTL, World, new_id


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


def test_after_a_restart_a_store_waits_for_the_others_that_use_it(world: World) -> None:
    donor = world.donor("d")
    early, late = world.session(), world.session()
    spec = world.store(early, ["d"])
    world.tables.use_store(late, spec.store)
    world.restart()
    world.connect("d")
    world.tables.open_session(early, "t", [spec.store], [])
    world.carry_out(world.tables.close_session(early))  # before the other is back
    world.pass_time(TTL - 1)
    world.tables.open_session(late, "t", [spec.store], [])
    world.pass_time(TTL - 1)
    assert set(donor.held) == {shard_lease(spec.store, 0)}
    world.carry_out(world.tables.close_session(late))
    assert donor.held == {}


def test_after_a_restart_a_store_that_its_last_session_leaves_is_freed_after_one_ttl(world: World) -> None:
    donor = world.donor("d")
    session = world.session()
    spec = world.store(session, ["d"])
    world.restart()
    world.connect("d")
    world.tables.open_session(session, "t", [spec.store], [])
    world.carry_out(world.tables.close_store(session, spec.store))
    assert donor.held
    world.pass_time(TTL)
    assert donor.held == {}


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
    away = 0.0
    while away + TTL - 1 < DONOR_GRACE_S:
        world.pass_time(TTL - 1)
        away += TTL - 1
        world.tables.renew(session, {})
        assert world.tables.locate("t", region).donor == "d"  # not lost yet
    world.pass_time(DONOR_GRACE_S - away)
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


def lose_all(world: World, donor: str) -> None:
    world.disconnect(donor)
    world.donors[donor].held.clear()
    world.connect(donor)


def test_a_persistent_store_that_lost_every_shard_is_lost_until_it_is_deleted(world: World) -> None:
    world.donor("d")
    session = world.session()
    spec = world.store(session, ["d", "d"], persistent=True)
    lose_all(world, "d")
    assert len(set(world.told)) == 2
    world.carry_out(world.tables.close_session(session))
    world.pass_time(10 * DONOR_GRACE_S)
    assert world.tables.lost_shards(world.tables.stores[spec.store]) == [0, 1]
    with pytest.raises(LeaseLost):
        world.tables.locate("t", shard_lease(spec.store, 0))
    world.carry_out(world.tables.delete_store("t", "s"))
    assert world.tables.leases == {}
    world.store(world.session(), ["d"], persistent=True)


def test_a_store_that_lost_every_shard_ends_with_its_last_session(world: World) -> None:
    world.donor("d")
    sessions = [world.session() for _ in range(2)]
    spec = world.store(sessions[0], ["d"])
    world.tables.use_store(sessions[1], spec.store)
    lose_all(world, "d")
    world.carry_out(world.tables.close_store(sessions[0], spec.store))
    assert world.tables.lost_shards(world.tables.stores[spec.store]) == [0]
    world.carry_out(world.tables.close_session(sessions[1]))
    assert (world.tables.stores, world.tables.leases) == ({}, {})


def test_a_donor_that_holds_nothing_is_away_for_a_while_before_it_is_forgotten(world: World) -> None:
    world.donor("d")
    world.disconnect("d")
    world.pass_time(DONOR_GRACE_S - 1.0)
    assert not world.tables.donors["d"].connected
    world.pass_time(2.0)
    assert world.tables.donors == {}


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
    assert world.tables.names["t", f"s~{short(old.store)}"] == old.store


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
    memory = Memory(offered=64 * MIB, leased=0, populated=0, available=110 * MIB, headroom=HEADROOM)
    world.tables.report("d", DonorReport(memory=memory, links={}))
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


# --- what a donor lost while the broker was away ------------------------------------------------------


def test_a_new_broker_learns_what_a_donor_lost_before(world: World) -> None:
    for name in ("d", "e"):
        world.donor(name)
    session = world.session()
    spec = world.store(session, ["d", "e"])
    region = world.region(session, "d")
    lost, kept = (shard_lease(spec.store, shard) for shard in (0, 1))
    for order in ("de", "ed"):
        world.restart()
        world.tables.open_session(session, "t", [spec.store], [region])
        for lease in (lost, region):
            if lease in world.donors["d"].held:
                world.evict("d", lease)
        said = list(world.donors["d"].unsaid_gone)
        for name in order:
            world.connect(name)
        for lease in (lost, region):
            with pytest.raises(LeaseLost):
                world.tables.locate("t", lease)
        assert world.tables.lost_shards(world.tables.stores[spec.store]) == [0]
        assert world.tables.locate("t", kept).donor == "e"
        assert {lease for to, lease in world.told if to == session} == {lost, region}
        assert set(world.tables.renew(session, {})) == {lost, region}
        world.told.clear()
        world.donors["d"].unsaid_gone = said


def test_a_new_broker_gives_a_cache_anew_what_was_dropped_before(world: World) -> None:
    for name in ("d", "e"):
        world.donor(name)
    session = world.session()
    spec = world.store(session, ["d", "e"], on_reclaim="drop")
    world.restart()
    world.tables.open_session(session, "t", [spec.store], [])
    world.evict("d", shard_lease(spec.store, 0), dropped=42)
    world.connect("d")
    world.connect("e")
    lease = world.tables.locate("t", shard_lease(spec.store, 0))
    assert lease.state is State.DROPPED
    assert world.tables.stores[spec.store].dropped == 42


def test_a_store_of_which_nothing_is_left_is_lost_for_a_new_broker(world: World) -> None:
    world.donor("d")
    session = world.session()
    spec = world.store(session, ["d", "d"], persistent=True)
    world.restart()
    for shard in (0, 1):
        world.evict("d", shard_lease(spec.store, shard))
    world.connect("d")
    assert world.tables.lost_shards(world.tables.stores[spec.store]) == [0, 1]
    for shard in (0, 1):
        with pytest.raises(LeaseLost):
            world.tables.locate("t", shard_lease(spec.store, shard))


def test_what_did_not_arrive_or_has_moved_is_not_lost_for_a_new_broker(world: World) -> None:
    for name in ("d", "e"):
        world.donor(name)
    session = world.session()
    moved, stayed = world.region(session, "d"), world.region(session, "d")
    for lease in (moved, stayed):
        world.relocate("d", lease, "e")
    world.restart()
    world.tables.open_session(session, "t", [], [moved, stayed])
    world.fails_to_send("d", stayed)
    world.sends_all("d", moved)
    world.hears_that_it_moved("d", moved)
    said = {name: world.donors[name].unsaid_gone for name in ("d", "e")}
    assert [one.lease for one in said["d"] + said["e"]] == [moved, stayed]
    for order in ("de", "ed"):
        world.restart()
        world.tables.open_session(session, "t", [], [moved, stayed])
        for name in order:
            world.donors[name].unsaid_gone = list(said[name])
        world.connect(order[0])
        with pytest.raises(TransportError):
            world.tables.locate("t", {"d": moved, "e": stayed}[order[0]])
        world.connect(order[1])
        assert world.tables.locate("t", moved).donor == "e"
        assert world.tables.locate("t", stayed).donor == "d"
        assert world.tables.renew(session, {}) == []


def test_a_lease_that_was_served_to_the_end_is_not_looked_for_at_its_target(world: World) -> None:
    source, target = world.donor("d"), world.donor("e")
    session = world.session()
    region = world.region(session, "d")
    world.relocate("d", region, "e")
    world.evict("d", region)
    with pytest.raises(LeaseLost):
        world.tables.locate("t", region)
    assert (source.held, target.arriving) == ({}, {})
    assert world.tables.renew(session, {}) == [region]


def test_a_lease_that_may_have_been_sent_is_looked_for_at_its_target(world: World) -> None:
    world.donor("d")
    world.donor("e")
    session = world.session()
    region = world.region(session, "d")
    world.relocate("d", region, "e")
    world.sends_all("d", region)
    world.evict("d", region)
    with pytest.raises(TransportError):
        world.tables.locate("t", region)
    world.says_arrived("e")
    assert world.tables.locate("t", region).donor == "e"


# --- caches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stopped", "started again", "after the broker"])
def test_a_caches_shard_that_its_donor_has_lost_is_granted_anew(world: World, how: str) -> None:
    source, other = world.donor("d"), world.donor("e")
    session = world.session()
    spec = world.store(session, ["d", "e"], on_reclaim="drop")
    identity = shard_lease(spec.store, 0)
    if how == "after the broker":
        world.restart()
        world.connect("e")
        world.tables.open_session(session, "t", [spec.store], [])
    elif how == "started again":
        world.disconnect("d")
        world.pass_time(TTL - 1)
    lost = source.held.pop(identity)
    if how != "started again":
        world.say("d", LeaseGone(lease=identity, reason="it was stopped", spec=lost.spec))
    if how != "stopped":
        world.connect("d")
    lease = world.tables.locate("t", identity)
    assert lease.state is State.DROPPED
    assert world.tables.lost_shards(world.tables.stores[spec.store]) == []
    assert "e" in [room.donor for room in world.tables.rooms_for(lease)]
    world.tables.begin_again(lease, "e")
    assert world.grant(lease)
    assert other.held[identity].spec.epoch > lost.spec.epoch


def test_whoever_asks_for_a_lost_shard_learns_which_donor_had_it_and_why_it_is_lost(world: World) -> None:
    world.donor("d7")
    world.donor("e")
    session = world.session()
    spec = world.store(session, ["d7", "e"])
    lease = shard_lease(spec.store, 0)
    del world.donors["d7"].held[lease]
    world.say_gone("d7", lease, "the node needs its memory")
    with pytest.raises(LeaseLost, match=r"is lost: the node needs its memory \(it was on donor d7\)"):
        world.tables.locate("t", lease)


def test_a_caches_shard_whose_donor_stays_away_is_lost_until_that_is_back(world: World) -> None:
    """It may still serve clients who would not see what others put into a new shard."""
    world.donor("d")
    world.donor("e")
    session = world.session()
    spec = world.store(session, ["d", "e"], on_reclaim="drop")
    world.disconnect("d")
    for _ in range(12):
        world.pass_time(DONOR_GRACE_S / 11)
        world.tables.renew(session, {})
    with pytest.raises(LeaseLost):
        world.tables.locate("t", shard_lease(spec.store, 0))
    copy = world.donors["d"].held.pop(shard_lease(spec.store, 0))
    world.connect("d")  # after its node was started again
    assert world.tables.locate("t", shard_lease(spec.store, 0)).state is State.DROPPED
    world.restart()
    world.donors["d"].held[copy.spec.lease] = copy
    for name in ("d", "e"):
        world.connect(name)
    assert world.tables.locate("t", shard_lease(spec.store, 0)).state is State.HELD
