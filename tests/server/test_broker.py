"""The broker over real connections, with donors that only pretend to have memory."""

from __future__ import annotations

import pytest
import trio

from memfaas import auth, messages, rpc
from memfaas.errors import (
    AccessError,
    CapacityError,
    LeaseLost,
    ProtocolError,
    TransportError,
    UnknownStore,
    UsageError,
)
from memfaas.units import MIB
from tests.server.support import (
    LIMIT_S,
    SECRET,
    FakeDonor,
    Served,
    client,
    eventually,
    refusal,
    serve_broker,
    start_donors,
)

# --- stores and regions -------------------------------------------------------------------------------


async def test_a_store_is_spread_and_its_tenant_finds_it(served: Served, nursery: trio.Nursery) -> None:
    donors = [FakeDonor(f"d{i}") for i in range(3)]
    await start_donors(nursery, served, *donors)
    async with client(served.port) as ann, client(served.port) as again:
        made = await ann.open_store(size=60 * MIB)
        assert made.created
        assert made.spec.shards == 3
        assert {place.donor for place in made.places} == {"d0", "d1", "d2"}
        assert all(len(donor.held) == 1 for donor in donors)
        found = await again.open_store(size=None)
        assert not found.created
        assert found.spec == made.spec
        assert [place.lease for place in found.places] == [place.lease for place in made.places]
        for place in found.places:
            ticket = auth.check_ticket(place.ticket, lease=place.lease, epoch=1, tenant="ann", donor=place.donor)
            assert ticket.uid is None
            assert place.proof_key == auth.proof_key(auth.ticket_key(SECRET, place.donor), place.ticket)


async def test_closing_sessions_frees_memory_before_it_is_answered(served: Served, nursery: trio.Nursery) -> None:
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        await ann.open_store()
        await ann.open_region()
        place = await ann.open_region()
        assert len(donor.held) == 3
        await ann.ask(messages.ReleaseLease(lease=place.lease), messages.Done)
        assert len(donor.held) == 2
        assert isinstance(
            await refusal(ann.ask(messages.ReleaseLease(lease=place.lease), messages.Done)), TransportError | LeaseLost
        )
        await ann.ask(messages.CloseSession(), messages.Done)
        assert donor.held == {}
        assert isinstance(await refusal(ann.open_region()), UsageError)


async def test_a_session_that_dies_loses_its_leases_after_the_ttl(short_waits: None, nursery: trio.Nursery) -> None:
    served = await serve_broker(nursery, ttl=0.3)
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        await ann.open_store()
        kept = await ann.open_store("kept", persistent=True)
        await ann.open_region()
    await eventually(lambda: set(donor.held) == {kept.places[0].lease})
    async with client(served.port) as bob:
        assert not (await bob.open_store("kept")).created
        assert isinstance(await refusal(bob.open_store("s", size=None)), UnknownStore)


async def test_renewals_keep_the_leases(short_waits: None, nursery: trio.Nursery) -> None:
    served = await serve_broker(nursery, ttl=0.5)
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        place = await ann.open_region()
        for _ in range(10):
            await trio.sleep(0.1)
            renewed = await ann.ask(messages.Renew(fabrics={"shm": 2}), messages.Renewed)
            assert renewed.gone == []
        assert set(donor.held) == {place.lease}
        assert [s.fabrics for s in (await ann.status()).sessions] == [{"shm": 2}]
        await eventually(lambda: [one.lease for one in ann.gone] == [place.lease])  # no more renewals
        renewed = await ann.ask(messages.Renew(fabrics={}), messages.Renewed)
        assert renewed.gone == [place.lease]
        assert donor.held == {}


async def test_a_session_that_waits_for_a_slow_grant_does_not_expire_meanwhile(
    short_waits: None, nursery: trio.Nursery
) -> None:
    served = await serve_broker(nursery, ttl=0.1)
    donor = FakeDonor("d")

    async def slowly(_: messages.Grant) -> None:
        await trio.sleep(0.5)

    donor.before_grant = slowly
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        opened = await ann.open_store()
        assert opened.created
        assert set(donor.held) == {place.lease for place in opened.places}
        region = await ann.open_region()
        assert region.lease in donor.held
        assert (donor.freed, ann.gone) == ([], [])


async def test_a_store_that_is_deleted_during_its_grant_is_made_again_on_the_same_donor(
    served: Served, nursery: trio.Nursery
) -> None:
    donor = FakeDonor("d")
    deleted = trio.Event()

    async def delete(_: messages.Grant) -> None:
        donor.before_grant = None
        served.broker.courier.in_background(served.broker.tables.delete_store("ann", "s"))
        deleted.set()
        raise LeaseLost("it is over")

    donor.before_grant = delete
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        opened = await ann.open_store()
        assert deleted.is_set()
        assert set(donor.held) == {place.lease for place in opened.places}


async def test_two_sessions_that_create_one_store_get_the_same(served: Served, nursery: trio.Nursery) -> None:
    donor = FakeDonor("d")
    asked = trio.Event()
    go_on = trio.Event()

    async def slowly(_: messages.Grant) -> None:
        asked.set()
        await go_on.wait()

    donor.before_grant = slowly
    await start_donors(nursery, served, donor)
    opened: list[messages.StoreOpened] = []

    async def open_one() -> None:
        async with client(served.port) as ann:
            opened.append(await ann.open_store())

    async with trio.open_nursery() as both:
        both.start_soon(open_one)
        await asked.wait()
        both.start_soon(open_one)
        await eventually(lambda: len(served.broker.tables.sessions) == 2)
        go_on.set()
    assert sorted(one.created for one in opened) == [False, True]
    assert opened[0].spec == opened[1].spec


# --- capacity -------------------------------------------------------------------------------------------


async def test_too_large_a_store_says_what_would_fit(served: Served, nursery: trio.Nursery) -> None:
    async with client(served.port) as ann:
        assert "no donor is connected" in str(await refusal(ann.open_store()))
        await start_donors(nursery, served, FakeDonor("d", offered=64 * MIB), FakeDonor("e", offered=64 * MIB))
        error = await refusal(ann.open_store(size=1000 * MIB))
        assert isinstance(error, CapacityError)
        assert "1000 MiB" in str(error)
        assert "128 MiB in all" in str(error)
        largest = int(str(error).split("fits now has ")[1].split()[0])
        assert (await ann.open_store(size=largest)).created
        error = await refusal(ann.open_region(100 * MIB))
        assert isinstance(error, CapacityError)
        assert isinstance(await refusal(ann.open_store("zero", size=0)), UsageError)


async def test_when_one_grant_fails_the_others_are_given_back(served: Served, nursery: trio.Nursery) -> None:
    good, bad = FakeDonor("good", offered=64 * MIB), FakeDonor("bad", offered=64 * MIB)

    async def refuse(_: messages.Grant) -> None:
        raise UsageError("out of order")

    bad.before_grant = refuse
    await start_donors(nursery, served, good, bad)
    async with client(served.port) as ann:
        error = await refusal(ann.open_store(size=100 * MIB))
        assert isinstance(error, CapacityError)
        assert "bad" in str(error)
        assert good.held == {}
        assert len(good.freed) == 1
        assert (await ann.open_store(size=40 * MIB)).places[0].donor == "good"  # the other is left out


async def test_a_donor_that_vanishes_during_a_grant_is_replaced(served: Served, nursery: trio.Nursery) -> None:
    steady = FakeDonor("steady", offered=32 * MIB)
    fleeting = FakeDonor("fleeting", offered=64 * MIB)  # has more room, so it is chosen first

    async def vanish(_: messages.Grant) -> None:
        fleeting.before_grant = None
        assert fleeting.channel is not None
        await fleeting.channel.aclose()

    fleeting.before_grant = vanish
    await start_donors(nursery, served, steady, fleeting)
    async with client(served.port) as ann:
        assert (await ann.open_region()).donor == "steady"
        await eventually(lambda: served.broker.tables.donors["fleeting"].connected and fleeting.held == {})


async def test_a_client_that_leaves_during_a_grant_leaves_nothing_behind(
    short_waits: None, nursery: trio.Nursery
) -> None:
    served = await serve_broker(nursery, ttl=0.3)
    donor = FakeDonor("d")
    asked, go_on = trio.Event(), trio.Event()

    async def slowly(_: messages.Grant) -> None:
        asked.set()
        await go_on.wait()

    donor.before_grant = slowly
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann, trio.open_nursery() as asking:
        asking.start_soon(ann.open_store)
        await asked.wait()
        asking.cancel_scope.cancel()
    go_on.set()
    await eventually(lambda: len(donor.freed) == 1)
    await eventually(lambda: served.broker.tables.sessions == {})
    assert donor.held == {}


# --- who may do what --------------------------------------------------------------------------------------


async def test_a_tenant_sees_and_touches_only_its_own(served: Served, nursery: trio.Nursery) -> None:
    await start_donors(nursery, served, FakeDonor("d"))
    async with client(served.port, "ann") as ann, client(served.port, "bob") as bob:
        store = await ann.open_store()
        region = await ann.open_region()
        for lease in (store.places[0].lease, region.lease):
            assert isinstance(await refusal(bob.locate(lease)), AccessError)
            assert isinstance(await refusal(bob.ask(messages.ReleaseLease(lease=lease), messages.Done)), AccessError)
        assert isinstance(await refusal(bob.open_store(size=None)), UnknownStore)
        assert isinstance(await refusal(bob.ask(messages.DeleteStore(name="s"), messages.Done)), UnknownStore)
        assert isinstance(
            await refusal(bob.ask(messages.CloseStore(store=store.spec.store), messages.Done)), UnknownStore
        )
        taking_over = messages.OpenSession(session=ann.session)
        assert isinstance(await refusal(bob.ask(taking_over, messages.SessionOpened)), UsageError)
        status = await bob.status()
        assert (status.leases, status.stores, len(status.sessions), len(status.donors)) == ([], [], 1, 1)
        assert len((await ann.status()).leases) == 2
        own = await bob.open_store(size=8 * MIB)
        assert own.created
        assert own.spec.store != store.spec.store
    async with client(served.port, auth.OPERATOR) as operator:
        status = await operator.status()
        assert {lease.tenant for lease in status.leases} == {"ann", "bob"}


async def test_a_session_of_another_tenant_cannot_be_taken_over(served: Served) -> None:
    async with client(served.port, "ann") as ann:
        with pytest.RaisesGroup(pytest.RaisesExc(AccessError)):
            async with client(served.port, "bob", session=ann.session):
                pass


async def test_a_wrong_secret_is_refused(served: Served) -> None:
    for role in ("session", "donor"):
        wrong = auth.Credentials("ann", b"x" * 32)
        assert isinstance(await refusal(rpc.dial("127.0.0.1", served.port, role, wrong)), AccessError)


async def test_a_tenants_key_does_not_open_another_tenant_or_a_donor(served: Served) -> None:
    key = auth.Credentials.of_tenant(SECRET, "ann").key
    for role, name in (("session", "bob"), ("donor", "ann")):
        error = await refusal(rpc.dial("127.0.0.1", served.port, role, auth.Credentials(name, key)))
        assert isinstance(error, AccessError)


async def test_two_donors_of_one_name_are_not_mixed_up(served: Served, nursery: trio.Nursery) -> None:
    first, second = FakeDonor("same"), FakeDonor("same")
    await start_donors(nursery, served, first)
    stream = await rpc.dial("127.0.0.1", served.port, "donor", auth.Credentials.of_donor(SECRET, "same"))
    channel = rpc.Channel(stream, second, "broker")
    nursery.start_soon(channel.run)
    register = messages.Register(donor="same", node="n", host="h", memory=second.memory(), held=[])
    assert isinstance(await refusal(channel.request(register, messages.Registered, LIMIT_S)), UsageError)
    register = messages.Register(donor="other", node="n", host="h", memory=second.memory(), held=[])
    assert isinstance(await refusal(channel.request(register, messages.Registered, LIMIT_S)), AccessError)
    async with client(served.port) as ann:
        await ann.open_region()
    assert len(first.held) == 1


# --- restarts ---------------------------------------------------------------------------------------------


async def test_a_restarted_broker_learns_everything_back(nursery: trio.Nursery) -> None:
    served = await serve_broker(nursery)
    donors = [FakeDonor("d"), FakeDonor("e")]
    await start_donors(nursery, served, *donors)
    async with client(served.port) as ann:
        session = ann.session
        store = await ann.open_store(size=32 * MIB)
        region = await ann.open_region()
    held = {lease for donor in donors for lease in donor.held}
    served.kill()
    served = await serve_broker(nursery, port=served.port, ttl=1.0)
    async with client(served.port, session=session, stores=[store.spec.store], leases=[region.lease]) as ann:
        # At once, before the donors are back: these wait for them.
        found = await ann.open_store(size=32 * MIB)
        assert not found.created
        assert [place.lease for place in found.places] == [place.lease for place in store.places]
        assert all(place.endpoint.node for place in found.places)
        assert (await ann.locate(region.lease)).donor == region.donor
        assert (await ann.ask(messages.Renew(fabrics={}), messages.Renewed)).gone == []
        assert {lease for donor in donors for lease in donor.held} == held
        await ann.ask(messages.CloseSession(), messages.Done)
    await eventually(lambda: all(donor.held == {} for donor in donors))  # others may have used the store


async def test_a_request_for_room_waits_for_a_donor_that_is_coming_back(nursery: trio.Nursery) -> None:
    served = await serve_broker(nursery)
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    served.kill()
    served = await serve_broker(nursery, port=served.port)
    async with client(served.port) as ann:
        assert (await ann.open_region()).donor == "d"
        assert donor.channel is not None
        await donor.channel.aclose()
        await eventually(lambda: not served.broker.tables.donors["d"].connected)
        assert (await ann.open_store()).created


async def test_a_lease_freed_while_its_donor_is_away_is_dropped_when_it_returns(nursery: trio.Nursery) -> None:
    served = await serve_broker(nursery)
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        await ann.open_region()
        donor.kill()
        await eventually(lambda: not served.broker.tables.donors["d"].connected)
        await ann.ask(messages.CloseSession(), messages.Done)
    assert len(donor.held) == 1
    await start_donors(nursery, served, donor)
    await eventually(lambda: donor.held == {} and not served.broker.tables.donors["d"].over)


# --- bad peers ----------------------------------------------------------------------------------------------


async def test_silent_strangers_neither_stay_nor_disturb(
    served: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "HANDSHAKE_TIMEOUT_S", 2.0)
    await start_donors(nursery, served, FakeDonor("d"))
    silent = [await trio.open_tcp_stream("127.0.0.1", served.port) for _ in range(1000)]
    async with client(served.port) as ann:
        await ann.open_region()
        with trio.fail_after(LIMIT_S):
            for stream in silent:
                try:
                    assert await stream.receive_some() == b""
                except trio.BrokenResourceError:
                    pass
                await stream.aclose()
        await ann.open_region()


async def test_a_session_that_speaks_out_of_turn_is_cut_off(served: Served, nursery: trio.Nursery) -> None:
    await start_donors(nursery, served, FakeDonor("d"))
    async with client(served.port) as ann:
        assert isinstance(await refusal(ann.ask(messages.Adopt(), messages.Serving)), ProtocolError)
        await ann.channel.notify(messages.LeaseGone(lease=b"", reason=""))
        assert isinstance(await refusal(ann.open_region()), TransportError)
    async with client(served.port) as ann:
        await ann.open_region()
