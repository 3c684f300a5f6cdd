"""The broker moves leases between donors that only pretend to have memory, over real connections."""

from __future__ import annotations

import pytest
import trio

from memfaas import auth, messages
from memfaas.errors import (
    AccessError,
    CapacityError,
    DeadlineExceeded,
    LeaseLost,
    TransportError,
    UsageError,
)
from memfaas.server import homecoming
from memfaas.server.records import State
from memfaas.units import MIB
from tests.server.support import (
    SECRET,
    Client,
    FakeDonor,
    Served,
    client,
    eventually,
    refusal,
    serve_broker,
    start_donors,
)


def relocate(lease: bytes, epoch: int = 1, timeout: float = 10.0, avoid: list[str] | None = None) -> messages.Relocate:
    return messages.Relocate(lease=lease, epoch=epoch, timeout=timeout, avoid=avoid or [])


async def region_on(ann: Client, donor: FakeDonor, served: Served, nursery: trio.Nursery) -> messages.Place:
    """A region, with this donor alone to put it on."""
    await start_donors(nursery, served, donor)
    return await ann.open_region()


async def settle(donor: FakeDonor, lease: bytes, target: str, epoch: int = 2) -> messages.Settled:
    return await donor.ask(messages.Settle(lease=lease, epoch=epoch, donor=target), messages.Settled)


# --- finding a target -------------------------------------------------------------------------------


async def test_a_lease_that_moves_is_found_at_its_new_place(served: Served, nursery: trio.Nursery) -> None:
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, target)
        found = await source.ask(relocate(region.lease), messages.Target)
        assert (found.place.donor, found.place.epoch, found.spill) == ("target", 2, False)
        auth.check_ticket(found.place.ticket, lease=region.lease, epoch=2, tenant="ann", donor="target")
        assert found.place.proof_key == auth.proof_key(auth.ticket_key(SECRET, "target"), found.place.ticket)
        assert target.arriving[region.lease].spec.epoch == 2
        assert (await ann.locate(region.lease)).donor == "source"  # until all of it has come
        assert [one.state for one in (await ann.status()).leases] == ["moving"]
        await target.arrives(region.lease)
        await eventually(lambda: len(ann.moved) == 1)
        (place,) = ann.moved
        assert (place.donor, place.epoch) == ("target", 2)
        auth.check_ticket(place.ticket, lease=region.lease, epoch=2, tenant="ann", donor="target")
        assert (await ann.locate(region.lease)).epoch == 2
        assert source.freed == []  # it knows by itself
        assert (await settle(source, region.lease, "target")).moved
        del source.held[region.lease]
        await source.say(messages.LeaseGone(lease=region.lease, reason="it moved", moved_to="target"))
        await eventually(lambda: not served.broker.tables.donors["source"].over)
        assert ann.gone == []
        await ann.ask(messages.CloseSession(), messages.Done)
        assert target.held == {}


async def test_a_target_that_refuses_is_replaced_and_frees_what_it_made(served: Served, nursery: trio.Nursery) -> None:
    source, bad, good = FakeDonor("source"), FakeDonor("bad"), FakeDonor("good", offered=64 * MIB)

    async def refuse(message: messages.Receive) -> None:
        bad.make(message.spec, bad.arriving)
        raise UsageError("out of order")

    bad.before_receive = refuse
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, bad, good)
        found = await source.ask(relocate(region.lease), messages.Target)
        assert found.place.donor == "good"
        assert found.place.epoch == good.arriving[region.lease].spec.epoch
        await eventually(lambda: bad.arriving == {})
        assert isinstance(
            await refusal(source.ask(relocate(region.lease, avoid=["good", "bad"]), messages.Target)), CapacityError
        )


async def test_a_target_that_hangs_costs_only_a_part_of_the_time(served: Served, nursery: trio.Nursery) -> None:
    source, hung, good = FakeDonor("source"), FakeDonor("hung"), FakeDonor("good", offered=64 * MIB)

    async def hang(_: messages.Receive) -> None:
        await trio.sleep_forever()

    hung.before_receive = hang
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, hung, good)
        found = await source.ask(relocate(region.lease, timeout=3.0), messages.Target)
        assert found.place.donor == "good"


class StoppedDonor(FakeDonor):
    """Answers nothing about leases until `goes_on`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.goes_on = trio.Event()
        self.receives = 0

    async def on_request(self, message: messages.Message) -> messages.Message:
        self.receives += isinstance(message, messages.Receive)
        await self.goes_on.wait()
        return await super().on_request(message)


async def test_a_target_that_hangs_is_left_alone_until_it_answers(served: Served, nursery: trio.Nursery) -> None:
    source, stopped, good = FakeDonor("source"), StoppedDonor("stopped"), FakeDonor("good", offered=64 * MIB)
    async with client(served.port) as ann:
        await start_donors(nursery, served, source)
        leases = [(await ann.open_region()).lease for _ in range(3)]
        await start_donors(nursery, served, stopped, good)
        for lease in leases[:2]:
            assert (await source.ask(relocate(lease, timeout=1.0), messages.Target)).place.donor == "good"
        assert stopped.receives == 1
        stopped.goes_on.set()
        await eventually(lambda: not served.broker.courier.silent)
        assert (await source.ask(relocate(leases[2]), messages.Target)).place.donor == "stopped"


async def test_a_slow_target_has_all_the_time_when_there_is_no_other(served: Served, nursery: trio.Nursery) -> None:
    source, slow = FakeDonor("source"), FakeDonor("slow")

    async def take_time(_: messages.Receive) -> None:
        await trio.sleep(1.0)

    slow.before_receive = take_time
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, slow)
        assert (await source.ask(relocate(region.lease, timeout=2.0), messages.Target)).place.donor == "slow"


async def test_only_its_donor_may_move_a_lease(served: Served, nursery: trio.Nursery) -> None:
    source, other = FakeDonor("source"), FakeDonor("other")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, other)
        assert isinstance(await refusal(other.ask(relocate(region.lease), messages.Target)), LeaseLost)
        assert isinstance(await refusal(source.ask(relocate(region.lease, epoch=2), messages.Target)), UsageError)
        assert isinstance(await refusal(source.ask(relocate(b"x" * 16), messages.Target)), LeaseLost)
        assert isinstance(await refusal(source.ask(relocate(region.lease, timeout=0), messages.Target)), UsageError)
        error = await refusal(source.ask(relocate(region.lease, avoid=["other"]), messages.Target))
        assert isinstance(error, CapacityError)


async def test_a_spill_donor_takes_only_what_nobody_else_can(served: Served, nursery: trio.Nursery) -> None:
    source, disk, memory = FakeDonor("source"), FakeDonor("disk", spill=True), FakeDonor("memory", offered=16 * MIB)
    another = FakeDonor("another-disk", spill=True)
    async with client(served.port) as ann:
        await start_donors(nursery, served, source)
        small, large = await ann.open_region(4 * MIB), await ann.open_region(40 * MIB)
        await start_donors(nursery, served, disk, memory, another)
        assert (await source.ask(relocate(small.lease), messages.Target)).place.donor == "memory"
        found = await source.ask(relocate(large.lease), messages.Target)
        assert found.spill
        taken = disk if found.place.donor == "disk" else another
        await taken.arrives(large.lease)
        await eventually(lambda: len(ann.moved) == 1)
        source.offered = 0
        await source.say(messages.DonorReport(memory=source.memory(), links={}))
        await eventually(lambda: served.broker.tables.donors["source"].memory.offered == 0)
        error = await refusal(taken.ask(relocate(large.lease, epoch=2), messages.Target))
        assert isinstance(error, CapacityError)  # there is the other disk, but what would be gained
        assert {one.donor: one.spill for one in (await ann.status()).donors}[taken.name]


# --- when something fails -----------------------------------------------------------------------------


async def test_a_lease_whose_copy_broke_off_stays_and_may_move_again(served: Served, nursery: trio.Nursery) -> None:
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, target)
        await source.ask(relocate(region.lease), messages.Target)
        target.arriving.clear()
        await target.say(messages.LeaseGone(lease=region.lease, reason="the copy broke off"))
        await eventually(lambda: not served.broker.tables.donors["target"].arriving)
        assert (await ann.locate(region.lease)).donor == "source"
        assert (await source.ask(relocate(region.lease), messages.Target)).place.epoch == 3
        assert ann.gone == []


async def test_a_copy_that_is_voided_is_refused_when_it_comes_late(served: Served, nursery: trio.Nursery) -> None:
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, target)
        await source.ask(relocate(region.lease), messages.Target)
        copy = target.arriving[region.lease]
        for _ in range(2):  # the answer may get lost
            settled = await settle(source, region.lease, "target")
            assert (settled.moved, settled.epoch) == (False, 3)
        await eventually(lambda: target.arriving == {})
        target.held[region.lease] = copy
        await target.say(messages.Arrived(held=copy))
        await eventually(lambda: target.held == {})
        place = await ann.locate(region.lease)
        assert (place.donor, place.epoch) == ("source", 3)
        assert ann.moved == []


async def test_a_region_whose_source_is_gone_is_waited_for_at_its_target(served: Served, nursery: trio.Nursery) -> None:
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, target)
        await source.ask(relocate(region.lease), messages.Target)
        source.held.clear()
        await source.say(messages.LeaseGone(lease=region.lease, reason="its memory was needed"))
        await eventually(lambda: served.broker.tables.leases[region.lease].state is State.MISSING)
        places: list[messages.Place] = []

        async def find() -> None:
            places.append(await ann.locate(region.lease))

        async with trio.open_nursery() as finding:
            finding.start_soon(find)
            await target.arrives(region.lease)
        assert [(place.donor, place.epoch) for place in places] == [("target", 2)]
        assert ann.gone == []


async def test_a_region_whose_source_and_copy_are_gone_is_lost(served: Served, nursery: trio.Nursery) -> None:
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, target)
        await source.ask(relocate(region.lease), messages.Target)
        for donor in (source, target):
            donor.held.clear()
            donor.arriving.clear()
            await donor.say(messages.LeaseGone(lease=region.lease, reason="its memory was needed"))
        await eventually(lambda: [one.lease for one in ann.gone] == [region.lease])
        assert isinstance(await refusal(ann.locate(region.lease)), LeaseLost)
        assert not served.broker.tables.donors["target"].arriving


async def test_a_lease_that_ends_on_its_way_is_freed_at_both_ends(served: Served, nursery: trio.Nursery) -> None:
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        region = await region_on(ann, source, served, nursery)
        await start_donors(nursery, served, target)
        await source.ask(relocate(region.lease), messages.Target)
        await ann.ask(messages.ReleaseLease(lease=region.lease), messages.Done)
        assert (source.held, target.arriving) == ({}, {})
        assert isinstance(await refusal(settle(source, region.lease, "target")), LeaseLost)


async def test_a_broker_that_restarted_settles_by_what_the_target_shows(nursery: trio.Nursery) -> None:
    served = await serve_broker(nursery)
    source, target = FakeDonor("source"), FakeDonor("target")
    async with client(served.port) as ann:
        session = ann.session
        region = await region_on(ann, source, served, nursery)
        store = await ann.open_store(persistent=True)
        await start_donors(nursery, served, target)
        leases = [region.lease, store.places[0].lease]
        for lease in leases:
            await source.ask(relocate(lease), messages.Target)
    target.kill()
    target.held[region.lease] = target.arriving.pop(region.lease)  # it had all of that, but could not say so
    target.arriving.clear()
    served.kill()
    served = await serve_broker(nursery, port=served.port)
    await eventually(lambda: "source" in served.broker.tables.donors)
    async with client(served.port, session=session, stores=[store.spec.store], leases=[region.lease]) as ann:
        for lease in leases:
            assert isinstance(await refusal(settle(source, lease, "target")), TransportError)  # it has to ask again
        await start_donors(nursery, served, target)
        await eventually(lambda: region.lease not in source.held)  # it is told that this is an older copy
        assert (await ann.locate(region.lease)).donor == "target"
        settled = await settle(source, leases[1], "target")
        assert (settled.moved, settled.epoch) == (False, 3)
        assert (await ann.locate(leases[1])).donor == "source"


# --- caches -----------------------------------------------------------------------------------------------


async def test_a_dropped_shard_is_granted_anew_when_it_is_wanted(served: Served, nursery: trio.Nursery) -> None:
    source, other = FakeDonor("source"), FakeDonor("other")
    await start_donors(nursery, served, source)
    async with client(served.port) as ann:
        store = await ann.open_store(on_reclaim="drop")
        (shard,) = store.places
        source.held.clear()
        source.offered = 0
        await source.say(messages.DonorReport(memory=source.memory(), links={}))
        await source.say(messages.LeaseGone(lease=shard.lease, reason="its memory was needed", dropped=42))
        await eventually(lambda: [one.dropped for one in ann.gone] == [42])
        (info,) = (await ann.status()).stores
        assert (info.dropped, info.lost_shards) == (42, [])
        assert [one.state for one in (await ann.status()).leases] == ["dropped"]
        assert (await ann.ask(messages.Renew(fabrics={}), messages.Renewed)).gone == []
        assert isinstance(await refusal(ann.locate(shard.lease)), CapacityError)
        (unplaced,) = (await ann.open_store(size=None)).places  # it opens all the same
        assert unplaced.ticket == b""
        await start_donors(nursery, served, other)
        places: list[messages.Place] = []

        async def find() -> None:
            places.append(await ann.locate(shard.lease))

        async with trio.open_nursery() as finding:
            for _ in range(3):
                finding.start_soon(find)
        assert {place.donor for place in places} == {"other"}
        assert all(place.epoch > 1 for place in places)
        assert list(other.held) == [shard.lease]


async def test_opening_a_store_grants_its_dropped_shards_anew(served: Served, nursery: trio.Nursery) -> None:
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        (shard,) = (await ann.open_store(on_reclaim="drop")).places
        donor.held.clear()
        await donor.say(messages.LeaseGone(lease=shard.lease, reason="its memory was needed", dropped=1))
        await eventually(lambda: len(ann.gone) == 1)
        (again,) = (await ann.open_store(size=None)).places
        assert again.donor == "d"
        assert donor.held[shard.lease].spec.epoch == again.epoch > shard.epoch


# --- reclaims by way of the broker --------------------------------------------------------------------------


def reclaim(donor: str, size: int = MIB, deadline: float = 1.0) -> messages.Reclaim:
    return messages.Reclaim(donor=donor, size=size, deadline=deadline, holder="job 17")


async def test_an_operator_asks_a_donor_for_its_memory(served: Served, nursery: trio.Nursery) -> None:
    donor, other = FakeDonor("d"), FakeDonor("other")
    await start_donors(nursery, served, donor, other)
    async with client(served.port, auth.OPERATOR) as operator:
        answer = await operator.ask(reclaim("d"), messages.Reclaimed)
        assert (answer.donor, answer.freed, answer.in_time) == ("d", MIB, True)
        assert (await operator.ask(messages.Lend(donor="d", holder="job 17"), messages.Lent)).size == MIB
        assert donor.asked == [reclaim("d"), messages.Lend(donor="d", holder="job 17")]
        assert other.asked == []
        error = await refusal(operator.ask(reclaim("nobody"), messages.Reclaimed))
        assert isinstance(error, UsageError)
        assert "d, other" in str(error)
        assert isinstance(await refusal(operator.ask(reclaim("d", size=0), messages.Reclaimed)), UsageError)
        assert isinstance(await refusal(operator.ask(reclaim("d", deadline=-1), messages.Reclaimed)), UsageError)
        await donor.say(messages.DonorReport(memory=donor.memory(), links={}, reclaimed={"job 17": MIB}))
        await eventually(lambda: served.broker.tables.donors["d"].reclaimed != {})
        status = await operator.status()
        assert [one.reclaimed for one in status.donors if one.donor == "d"] == [{"job 17": MIB}]
        await operator.open_region()
        for each in (donor, other):
            each.kill()
        await eventually(lambda: not any(one.connected for one in served.broker.tables.donors.values()))
        for name in served.broker.tables.donors:  # the one that holds the region
            assert isinstance(await refusal(operator.ask(reclaim(name), messages.Reclaimed)), TransportError)


async def test_a_refusal_names_only_a_few_donors(served: Served, nursery: trio.Nursery) -> None:
    donors = [FakeDonor(f"d{index}") for index in range(9)]
    await start_donors(nursery, served, *donors)
    async with client(served.port, auth.OPERATOR) as operator:
        error = str(await refusal(operator.ask(reclaim("nobody"), messages.Reclaimed)))
        assert error.endswith(" and 4 more")
        assert sum(one.name in error for one in donors) == 5


async def test_tenants_do_not_take_memory_back(served: Served, nursery: trio.Nursery) -> None:
    donor = FakeDonor("d")
    await start_donors(nursery, served, donor)
    async with client(served.port) as ann:
        assert isinstance(await refusal(ann.ask(reclaim("d"), messages.Reclaimed)), AccessError)
        assert isinstance(await refusal(ann.ask(messages.Lend(donor="d", holder="x"), messages.Done)), AccessError)
    assert donor.asked == []


async def test_a_donor_that_does_not_answer_a_reclaim_is_not_waited_for(
    served: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfaas.server.sessions._ANSWER_S", 0.1)

    class Hung(FakeDonor):
        async def on_request(self, message: messages.Message) -> messages.Message:
            await trio.sleep_forever()
            raise AssertionError

    await start_donors(nursery, served, Hung("d"))
    async with client(served.port, auth.OPERATOR) as operator:
        error = await refusal(operator.ask(reclaim("d", deadline=0.1), messages.Reclaimed))
        assert isinstance(error, DeadlineExceeded)


# --- home from spill donors ---------------------------------------------------------------------------------


async def test_leases_on_a_spill_donor_come_home_one_by_one(
    served: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homecoming, "LASTING_S", 0.05)
    monkeypatch.setattr(homecoming, "LOOK_S", 0.02)
    disk, memory = FakeDonor("disk", spill=True), FakeDonor("memory")
    await start_donors(nursery, served, disk)
    async with client(served.port) as ann:
        places = [await ann.open_region(size) for size in (8 * MIB, 4 * MIB)]
        await trio.sleep(0.2)
        assert disk.asked == []  # there is no memory to come home to
        await start_donors(nursery, served, memory)
        for place in sorted(places, key=lambda place: place.size):
            await eventually(lambda place=place: messages.MoveAway(lease=place.lease) in disk.asked)  # type: ignore[misc]
            epoch = disk.held[place.lease].spec.epoch
            found = await disk.ask(relocate(place.lease, epoch), messages.Target)
            assert (found.place.donor, found.spill) == ("memory", False)
            asked = len(disk.asked)
            await trio.sleep(0.2)
            assert len(disk.asked) == asked  # one at a time
            await memory.arrives(place.lease)
            await eventually(lambda place=place: place.lease in [one.lease for one in ann.moved])  # type: ignore[misc]
            del disk.held[place.lease]
            await disk.say(messages.LeaseGone(lease=place.lease, reason="it moved", moved_to="memory"))
        assert set(memory.held) == {place.lease for place in places}
