"""Donors with real processes, memory and sockets: serving, restarts, and the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from memfaas import _native, auth, fabric, local_agent, messages, rpc
from memfaas.errors import CapacityError, DeadlineExceeded, LeaseLost, UsageError
from memfaas.server import pressure
from memfaas.server.fds import FdStream
from memfaas.server.records import Room
from memfaas.server.tables import Tables
from memfaas.units import MIB
from tests.server.support import (
    LIMIT_S,
    Client,
    DonorProcess,
    Served,
    client,
    donor_process,
    eventually,
    function_pid,
    open_region,
    open_shard,
    refusal,
    serve_broker,
)

FABRICS: list[fabric.Choice] = ["shm", "tcp"]
JOB_ENDED = messages.Lend(donor="d", holder="job 1")
"""What is taken back for a job outlasts the donor."""


async def links_of(ann: Client, lease: bytes) -> dict[str, int]:
    (info,) = [info for info in (await ann.status()).leases if info.lease == lease]
    return info.links


def has_all_back(served: Served) -> bool:
    memory = served.broker.tables.donors["d"].memory
    return (memory.leased, memory.populated) == (0, 0)


async def until_links(ann: Client, lease: bytes, expected: dict[str, int]) -> None:
    with trio.fail_after(LIMIT_S):
        while await links_of(ann, lease) != expected:  # noqa: ASYNC110  # the broker sends no events of it
            await trio.sleep(0.05)


# --- serving ------------------------------------------------------------------------------------------


async def test_a_lease_is_served_over_both_fabrics_and_freed(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port) as ann:
        assert donor.ready["offered"] == 256 * MIB
        (shard,) = (await ann.open_store(size=16 * MIB)).places
        region = await ann.open_region(3 * MIB + 8)
        near, far = open_shard(shard, "shm"), open_shard(shard, "tcp")
        near.put(b"a", b"1")
        far.put(b"b", b"2" * MIB)
        assert (far.get(b"a"), near.get(b"b")) == (b"1", b"2" * MIB)
        raw, distant = open_region(region, "shm"), open_region(region, "tcp")
        raw.write(3 * MIB, b"8 bytes!")
        assert distant.read(3 * MIB, 8) == b"8 bytes!"
        await until_links(ann, shard.lease, {"shm": 1, "tcp": 1})

        await ann.ask(messages.CloseSession(), messages.Done)
        for store in (near, far):
            with pytest.raises(_native.LinkDown):
                store.get(b"a")
        with pytest.raises(_native.LinkDown):
            raw.read(0, 8)
        assert sorted(path.name for path in donor.home.iterdir()) == ["agent.sock", "lock"]
        await eventually(lambda: has_all_back(served))


async def test_memory_of_a_session_that_died_is_free_again(
    folder: Path, short_waits: None, nursery: trio.Nursery
) -> None:
    served = await serve_broker(nursery, ttl=0.5)
    async with donor_process(served, folder) as donor:
        async with client(served.port) as ann:
            shard = open_shard((await ann.open_store()).places[0])
            shard.put(b"a", b"1")
        await eventually(lambda: sorted(path.name for path in donor.home.iterdir()) == ["agent.sock", "lock"])
        await eventually(lambda: has_all_back(served))
        with pytest.raises(_native.LinkDown):
            shard.get(b"a")


async def test_memory_is_populated_in_the_background(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        await ann.open_store(size=100 * MIB)

        def populated() -> bool:
            memory = served.broker.tables.donors["d"].memory
            return memory.populated == memory.leased >= 100 * MIB

        await eventually(populated)


async def test_a_store_does_not_show_what_was_in_its_memory_before(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        size = 64 * MIB
        region = await ann.open_region(size)
        open_region(region).write(0, b"secret! " * (size // 8))
        await ann.ask(messages.ReleaseLease(lease=region.lease), messages.Done)
        again = open_region(await ann.open_region(size))
        assert again.read(0, size) == bytes(size)


async def test_a_client_that_is_killed_is_cleaned_up_behind(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        (shard,) = (await ann.open_store()).places
        pid = os.fork()
        if pid == 0:
            try:
                store = open_shard(shard)
                store.put(b"a", b"acknowledged")
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = await trio.to_thread.run_sync(os.waitpid, pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        await until_links(ann, shard.lease, {})
        assert open_shard(shard).get(b"a") == b"acknowledged"


async def test_a_link_that_is_closed_is_counted_no_more(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        (shard,) = (await ann.open_store()).places
        stores = [open_shard(shard, choice) for choice in ("shm", "shm", "tcp")]
        await until_links(ann, shard.lease, {"shm": 2, "tcp": 1})
        for store in stores:
            store._set_link(0, None)
        stores.clear()
        await until_links(ann, shard.lease, {})


# --- restarts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", FABRICS)
async def test_a_killed_function_is_running_again_on_the_same_memory(
    served: Served, folder: Path, choice: fabric.Choice
) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        (shard,) = (await ann.open_store()).places
        store = open_shard(shard, choice)
        store.put(b"a", b"before")
        killed = function_pid(shard)
        os.kill(killed, signal.SIGKILL)
        again = open_shard(shard, choice)  # waits in the listener's backlog until somebody serves it
        assert again.get(b"a") == b"before"
        again.put(b"b", b"after")
        assert function_pid(shard) != killed
        if choice == "shm":  # whoever had mapped the memory did not notice
            assert store.get(b"b") == b"after"
            await until_links(ann, shard.lease, {"shm": 2})
        assert ann.gone == []
        await ann.ask(messages.CloseSession(), messages.Done)


async def test_a_client_that_outlives_a_function_is_still_cleaned_up_behind(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        (shard,) = (await ann.open_store()).places
        attached, die = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                store = open_shard(shard)
                os.write(attached[1], b"x")
                os.close(die[1])
                os.read(die[0], 1)
                store.get(b"a")
            finally:
                os._exit(1)
        os.read(attached[0], 1)
        killed = function_pid(shard)
        os.kill(killed, signal.SIGKILL)
        await trio.to_thread.run_sync(open_shard, shard)  # it is up again
        await until_links(ann, shard.lease, {"shm": 1})  # the child's: ours is closed
        for end in (*attached, *die):
            os.close(end)
        await trio.to_thread.run_sync(os.waitpid, pid, 0)
        await until_links(ann, shard.lease, {})


async def kill_functions(place: messages.Place, times: int) -> None:
    """One after the other, as soon as they serve."""
    killed = 0
    with trio.fail_after(LIMIT_S):
        while times:
            try:
                pid = function_pid(place)
            except OSError:
                await trio.sleep(0.01)
                continue
            if pid != killed:
                os.kill(pid, signal.SIGKILL)
                killed = pid
                times -= 1


async def test_functions_that_die_one_after_the_other_cost_no_value(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        (shard,) = (await ann.open_store()).places
        open_shard(shard).put(b"key", b"value")
        await kill_functions(shard, 6)
        store = await trio.to_thread.run_sync(open_shard, shard)
        assert store.get(b"key") == b"value"
        assert ann.gone == []


async def test_a_lease_ends_while_the_next_function_is_put_off(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port) as ann:
        region = await ann.open_region()
        control = donor.home / Path(region.endpoint.unix_path).with_suffix(".ctl").name
        await kill_functions(region, 6)
        await ann.ask(messages.ReleaseLease(lease=region.lease), messages.Done)
        await eventually(lambda: has_all_back(served) and not control.exists())
        assert isinstance(await refusal(ann.locate(region.lease)), LeaseLost)


async def test_a_new_agent_finds_the_functions_of_a_killed_one(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port) as ann:
        store = await ann.open_store(persistent=True)
        (shard,) = store.places
        region = await ann.open_region()
        near, far = open_shard(shard, "shm"), open_shard(shard, "tcp")
        near.put(b"a", b"before")
        functions = function_pid(shard), function_pid(region)
        await donor.kill()
        await eventually(lambda: not served.broker.tables.donors["d"].connected)
        far.put(b"b", b"meanwhile")  # nobody notices
        assert open_shard(shard, "shm").get(b"b") == b"meanwhile"
        await donor.start()
        assert (function_pid(shard), function_pid(region)) == functions
        assert near.get(b"b") == b"meanwhile"
        assert (await ann.locate(shard.lease)).endpoint == shard.endpoint
        assert not (await ann.open_store()).created
        assert ann.gone == []
        os.kill(functions[0], signal.SIGKILL)  # the new agent has what it needs to start another
        assert open_shard(shard, "tcp").get(b"a") == b"before"
        await ann.ask(messages.DeleteStore(name="s"), messages.Done)
        await ann.ask(messages.ReleaseLease(lease=region.lease), messages.Done)
        await eventually(lambda: has_all_back(served))


class Ending:
    """A function that gives its memory back as a new agent comes."""

    async def on_request(self, message: messages.Message) -> messages.Message:
        raise LeaseLost("it is over")

    def on_notice(self, message: messages.Message) -> None: ...


async def test_a_new_agent_lends_only_when_functions_that_were_about_to_end_have_ended(
    served: Served, folder: Path, nursery: trio.Nursery
) -> None:
    donor = DonorProcess(served.port, folder)
    donor.home.mkdir(parents=True, mode=0o700)
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(donor.home / "L.ctl"))
        listener.listen()
        donor.launch()
        with trio.fail_after(LIMIT_S):
            stream, _ = await listener.accept()
        function = rpc.Channel(FdStream(stream), Ending(), "the agent")
        nursery.start_soon(function.run)
        await trio.sleep(0.3)
        assert "d" not in served.broker.tables.donors
        (donor.home / "L.ctl").unlink()
        await function.aclose()
        await eventually(lambda: "d" in served.broker.tables.donors)
    await donor.stop()


async def test_a_lease_whose_function_died_with_the_agent_is_lost_and_said_to_be(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port) as ann:
        store = await ann.open_store(persistent=True)
        region = await ann.open_region()
        pids = [function_pid(store.places[0]), function_pid(region)]
        await donor.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await donor.start()
        await eventually(lambda: {one.lease for one in ann.gone} == {store.places[0].lease, region.lease})
        assert isinstance(await refusal(ann.locate(region.lease)), LeaseLost)
        assert not (await ann.open_store()).created
        assert isinstance(await refusal(ann.locate(store.places[0].lease)), LeaseLost)


async def test_a_broker_that_restarts_finds_real_leases_again(
    served: Served, folder: Path, nursery: trio.Nursery
) -> None:
    async with donor_process(served, folder):
        async with client(served.port) as ann:
            session = ann.session
            store = await ann.open_store(size=16 * MIB)
            region = await ann.open_region()
        shard = open_shard(store.places[0])
        shard.put(b"a", b"before")
        served.kill()
        shard.put(b"b", b"meanwhile")
        served.broker = (await serve_broker(nursery, port=served.port)).broker
        async with client(served.port, session=session, stores=[store.spec.store], leases=[region.lease]) as ann:
            found = await ann.open_store()
            assert not found.created
            assert open_shard(found.places[0], "tcp").get(b"b") == b"meanwhile"
            assert (await ann.locate(region.lease)).endpoint == region.endpoint
            await ann.ask(messages.CloseSession(), messages.Done)


async def test_a_donor_waits_for_its_broker(folder: Path, nursery: trio.Nursery) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    donor = DonorProcess(port, folder)
    donor.launch()
    try:
        await trio.sleep(0.5)  # it has tried in vain
        served = await serve_broker(nursery, port=port)
        await eventually(lambda: "d" in served.broker.tables.donors)
    finally:
        assert await donor.stop() == 0


async def test_a_zygote_that_is_killed_is_replaced(served: Served, folder: Path) -> None:
    async with donor_process(served, folder, warm=0) as donor, client(served.port) as ann:
        first = await ann.open_region()
        assert donor.process is not None
        (zygote,) = children(donor.process.pid)
        os.kill(zygote, signal.SIGKILL)
        second = await ann.open_region()
        open_region(second).write(0, b"x")
        assert open_region(first).read(0, 1) == b"\0"


# --- the end ------------------------------------------------------------------------------------------


async def test_a_donor_that_is_stopped_takes_all_back_and_says_so(served: Served, folder: Path) -> None:
    donor = DonorProcess(served.port, folder)
    await donor.start()
    async with client(served.port) as ann:
        store = await ann.open_store()
        region = await ann.open_region()
        shard = open_shard(store.places[0])
        shard.put(b"a", b"1")
        assert await donor.stop() == 0
        await eventually(lambda: {one.lease for one in ann.gone} == {store.places[0].lease, region.lease})
        with pytest.raises(_native.LinkDown):
            shard.get(b"a")
        await eventually(lambda: not served.broker.tables.donors["d"].connected)
        assert not (folder / "run").exists()


async def test_only_one_agent_runs_in_a_folder(served: Served, folder: Path) -> None:
    async with donor_process(served, folder):
        second = DonorProcess(served.port, folder)
        second.launch()
        assert await second.wait() != 0


async def test_a_donor_with_the_wrong_secret_ends(served: Served, folder: Path) -> None:
    donor = DonorProcess(served.port, folder)
    (folder / "secret").write_text("00" * 32)
    donor.launch()
    assert await donor.wait() != 0
    assert served.broker.tables.donors == {}


async def test_a_donor_ends_that_cannot_listen_where_clients_are_to_reach_it(served: Served, folder: Path) -> None:
    donor = DonorProcess(served.port, folder, listen_host="192.0.2.1")  # nobody has it: it is for documentation
    donor.launch()
    assert await donor.wait() != 0
    assert served.broker.tables.donors == {}


# --- memory -------------------------------------------------------------------------------------------


async def test_a_grant_that_would_cut_into_the_headroom_is_refused(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The donor itself looks, whatever the broker believes."""
    async with donor_process(served, folder, memory="1000TiB"), client(served.port) as ann:
        assert isinstance(await refusal(ann.open_region(1 << 45)), CapacityError)
        room = 1000 << 40
        monkeypatch.setattr(Tables, "_room", lambda self, donor: Room(donor.name, room, False, 0, room))
        error = await refusal(ann.open_region(1 << 45))
        assert isinstance(error, CapacityError)
        await ann.open_region()


async def test_nobody_takes_memory_back_in_the_name_of_the_donors_own_watch(served: Served, folder: Path) -> None:
    requests: list[tuple[messages.Message, type[messages.Message]]] = [
        (messages.Reclaim(donor="d", size=MIB, deadline=1.0, holder=pressure.HOLDER), messages.Reclaimed),
        (messages.Lend(donor="d", holder=pressure.HOLDER), messages.Done),
    ]
    async with donor_process(served, folder) as donor, client(served.port, tenant=auth.OPERATOR) as operator:
        for message, reply in requests:
            with pytest.raises(UsageError, match="'pressure'"):
                await operator.ask(message, reply)
            with pytest.raises(UsageError, match="'pressure'"):
                await local_agent.ask(donor.home, message, reply, LIMIT_S)
        (info,) = (await operator.status()).donors
        assert (info.memory.offered, info.reclaimed) == (256 * MIB, {})


@pytest.mark.parametrize("holder", ["", "  ", "two\nlines", "\x1b[2J", "x" * 256])
async def test_a_holder_has_a_name_that_can_be_shown(served: Served, folder: Path, holder: str) -> None:
    async with donor_process(served, folder) as donor, client(served.port, tenant=auth.OPERATOR) as operator:
        request = messages.Reclaim(donor="d", size=MIB, deadline=1.0, holder=holder)
        for ask in (
            operator.ask(request, messages.Reclaimed),
            local_agent.ask(donor.home, request, messages.Reclaimed, LIMIT_S),
            operator.ask(messages.Lend(donor="d", holder=holder), messages.Lent),
        ):
            error = await refusal(ask)
            assert isinstance(error, UsageError)
            assert "holder's name" in str(error)
        (info,) = (await operator.status()).donors
        assert (info.memory.offered, info.reclaimed) == (256 * MIB, {})


async def test_the_answers_say_what_was_wanted_and_what_is_lent_again(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port, tenant=auth.OPERATOR) as operator:
        request = messages.Reclaim(donor="d", size=1 << 40, deadline=1.5, holder="job 1")
        taken = await operator.ask(request, messages.Reclaimed)
        assert (taken.wanted, taken.asked, taken.deadline) == (1 << 40, 256 * MIB, 1.5)
        again = await operator.ask(request, messages.Reclaimed)
        assert (again.wanted, again.asked, again.in_time) == (1 << 40, 0, True)
        for size in (256 * MIB, 0):
            assert (await operator.ask(messages.Lend(donor="d", holder="job 1"), messages.Lent)).size == size


async def test_a_reclaim_that_its_asker_gave_up_is_not_done_later(served: Served, folder: Path) -> None:
    def reclaim(size: int) -> messages.Reclaim:
        return messages.Reclaim(donor="d", size=size, deadline=1.0, holder="job 1")

    async with donor_process(served, folder) as donor, client(served.port, tenant=auth.OPERATOR) as operator:
        assert donor.process is not None
        donor.process.send_signal(signal.SIGSTOP)
        try:
            async with client(served.port, tenant=auth.OPERATOR) as another:
                with trio.move_on_after(0.5):
                    await another.ask(reclaim(100 * MIB), messages.Reclaimed)
            await eventually(lambda: another.session not in served.broker.courier.sessions)
        finally:
            donor.process.send_signal(signal.SIGCONT)
        assert (await operator.ask(reclaim(MIB), messages.Reclaimed)).held == MIB
        await operator.ask(JOB_ENDED, messages.Lent)


async def test_a_lease_that_is_freed_while_it_is_granted_is_gone(served: Served, folder: Path) -> None:
    spec = messages.LeaseSpec(lease=b"L" * 16, tenant="ann", kind="region", size=MIB, epoch=1)
    async with donor_process(served, folder) as donor, trio.open_nursery() as nursery:
        channel = served.broker.courier.donors["d"]
        nursery.start_soon(channel.request, messages.Grant(spec=spec), messages.Granted, LIMIT_S)
        await trio.testing.wait_all_tasks_blocked()
        freed = await channel.request(messages.Free(lease=spec.lease, reason="no"), messages.Freed, LIMIT_S)
        assert freed.memory.leased == 0
        assert sorted(path.name for path in donor.home.iterdir()) == ["agent.sock", "lock"]


@pytest.mark.parametrize("ask", ["grant", "receive"])
async def test_a_lease_that_its_asker_gave_up_is_not_granted_later(served: Served, folder: Path, ask: str) -> None:
    spec = messages.LeaseSpec(lease=b"L" * 16, tenant="ann", kind="region", size=MIB, epoch=1)
    request = messages.Grant(spec=spec) if ask == "grant" else messages.Receive(spec=spec, timeout=60)
    async with donor_process(served, folder) as donor:
        assert donor.process is not None
        channel = served.broker.courier.donors["d"]
        donor.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceeded):
                await served.broker.courier.ask("d", request, messages.Granted, 0.1, withdraw=True)
        finally:
            donor.process.send_signal(signal.SIGCONT)
        freed = await channel.request(messages.Free(lease=b"?" * 16, reason="no"), messages.Freed, LIMIT_S)
        assert freed.memory.leased == 0
        assert sorted(path.name for path in donor.home.iterdir()) == ["agent.sock", "lock"]


async def test_the_broker_counts_what_programs_of_the_node_took_back(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port, tenant=auth.OPERATOR) as operator:
        for size in (0, 3 * MIB):  # 0 only asks
            request = messages.Reclaim(donor="d", size=size, deadline=1.0, holder="job 1")
            answer = await local_agent.ask(donor.home, request, messages.Reclaimed, LIMIT_S)
            assert answer.held == size

        async def told() -> messages.DonorUsage:
            return (await operator.ask(messages.AskUsage(), messages.UsageReport)).donors[0]

        with trio.fail_after(LIMIT_S):
            while (account := await told()).reclaims == 0:  # noqa: ASYNC110  # the broker sends no events of it
                await trio.sleep(0.01)
        assert (account.reclaims, account.reclaimed, account.in_time) == (1, 3 * MIB, 1)
        await operator.ask(JOB_ENDED, messages.Lent)


@pytest.mark.parametrize("end", ["killed", "stopped"])
async def test_what_is_taken_back_for_a_job_is_not_lent_by_the_next_agent(
    served: Served, folder: Path, end: str
) -> None:
    async with donor_process(served, folder) as donor, client(served.port, tenant=auth.OPERATOR) as operator:
        if end == "killed":
            async with client(served.port) as ann:
                await ann.open_region(200 * MIB)
                with trio.move_on_after(0.3):  # whoever asked does not live to see the end of it
                    await local_agent.ask(donor.home, taken_back(200 * MIB, 30.0), messages.Reclaimed, LIMIT_S)
                await donor.kill()
        else:
            await local_agent.ask(donor.home, taken_back(200 * MIB, 1.0), messages.Reclaimed, LIMIT_S)
            await donor.stop()
        await donor.start()
        with trio.fail_after(LIMIT_S):
            while not (donors := (await operator.status()).donors)[0].reclaimed:  # noqa: ASYNC110  # told by another process
                await trio.sleep(0.01)  # its first report comes after it has registered
        assert (donors[0].memory.offered, donors[0].reclaimed) == (56 * MIB, {"job 1": 200 * MIB})
        await operator.ask(JOB_ENDED, messages.Lent)
        await donor.stop()
        await donor.start()
        (info,) = (await operator.status()).donors
        assert (info.memory.offered, info.reclaimed) == (256 * MIB, {})


async def test_an_agent_that_is_killed_amid_a_reclaim_goes_on_with_it_by_itself(served: Served, folder: Path) -> None:
    async with (
        donor_process(served, folder) as donor,
        client(served.port) as ann,
        client(served.port, tenant=auth.OPERATOR) as operator,
    ):
        region = await ann.open_region(200 * MIB)
        with trio.move_on_after(0.3):  # nor does whoever asked live to see the end of it
            await local_agent.ask(donor.home, taken_back(200 * MIB, 3.0), messages.Reclaimed, LIMIT_S)
        await donor.kill()
        await donor.start()
        await eventually(lambda: bool(ann.gone))  # there is no other donor for it to go to
        assert [notice.lease for notice in ann.gone] == [region.lease]

        async def account() -> messages.DonorUsage:
            return (await operator.ask(messages.AskUsage(), messages.UsageReport)).donors[0]

        with trio.fail_after(LIMIT_S):
            while (counted := await account()).reclaims == 0:  # noqa: ASYNC110  # the broker sends no events of it
                await trio.sleep(0.01)
            while (memory := (await operator.status()).donors[0].memory).leased:  # noqa: ASYNC110  # told by another process
                await trio.sleep(0.01)
        assert counted.reclaims == 1
        assert memory.offered == 56 * MIB
        await operator.ask(JOB_ENDED, messages.Lent)


def taken_back(size: int, deadline: float) -> messages.Reclaim:
    return messages.Reclaim(donor="d", size=size, deadline=deadline, holder="job 1")


async def test_an_agent_that_has_nothing_to_lend_says_so(served: Served, folder: Path) -> None:
    donor = DonorProcess(served.port, folder, memory="auto", headroom="1000TiB")
    donor.launch()
    assert await donor.wait() != 0


async def test_auto_lends_what_is_available_beyond_the_headroom(served: Served, folder: Path) -> None:
    async with donor_process(served, folder, memory="auto", headroom="1GiB") as donor:
        memory = served.broker.tables.donors["d"].memory
        assert donor.ready["offered"] == memory.offered
        assert 0 < memory.offered <= memory.available


async def test_auto_lends_as_much_as_before_when_it_starts_anew_while_a_job_uses_its_memory(
    served: Served, folder: Path
) -> None:
    async with donor_process(served, folder) as donor, client(served.port, tenant=auth.OPERATOR) as operator:
        await operator.ask(taken_back(100 * MIB, 1.0), messages.Reclaimed)
        await donor.kill()
        donor._given |= {"memory": "auto", "headroom": "1GiB"}
        saved = json.loads((donor.home / "reclaimed.json").read_text())
        assert saved["nominal"] == 256 * MIB
        # As if a job used so much that without it nothing could be lent.
        saved |= {"nominal": 1 << 50, "asked": {"job 1": 1 << 49}}
        (donor.home / "reclaimed.json").write_text(json.dumps(saved))
        await donor.start()
        (info,) = (await operator.status()).donors
        assert info.memory.offered > 0
        assert (await operator.ask(JOB_ENDED, messages.Lent)).size == 1 << 49


@pytest.mark.slow
async def test_a_lease_that_uses_what_was_taken_back_from_it_has_to_go(served: Served, folder: Path) -> None:
    async with (
        donor_process(served, folder),
        client(served.port) as ann,
        client(served.port, tenant=auth.OPERATOR) as operator,
    ):
        (shard,) = (await ann.open_store(size=64 * MIB)).places
        stays = await ann.open_region(MIB)
        request = messages.Reclaim(donor="d", size=220 * MIB, deadline=5.0, holder="job 1")
        answer = await operator.ask(request, messages.Reclaimed)
        assert [step.how for step in answer.steps] == ["unlent", "punched"]
        # What any of its clients can do: it writes that nothing is punched, and stores values there.
        data, control = memory_of(function_pid(shard))
        _native.Memory(data, control).unpunch()
        os.close(data)
        os.close(control)
        store = open_shard(shard)
        with contextlib.suppress(CapacityError):
            for number in range(64):
                store.put(b"%d" % number, b"x" * MIB)
        with trio.fail_after(4 * LIMIT_S):
            while not ann.gone:  # noqa: ASYNC110  # the donor looks every ten seconds
                await trio.sleep(0.1)
        assert {(notice.lease, "taken back" in notice.reason) for notice in ann.gone} == {(shard.lease, True)}
        assert open_region(stays).read(0, 1) == b"\0"
        await operator.ask(JOB_ENDED, messages.Lent)


def memory_of(pid: int) -> list[int]:
    """Descriptors of the data and control memory of a function."""
    names = {os.readlink(one): one for one in Path(f"/proc/{pid}/fd").iterdir() if "memfd:memfaas" in os.readlink(one)}
    control = next(name for name in names if ":control" in name)
    data = next(name for name in names if ":control" not in name)
    return [os.open(names[name], os.O_RDWR) for name in (data, control)]


@pytest.mark.slow
async def test_an_idle_donor_costs_no_processor_time_and_little_memory(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port) as ann:
        (shard,) = (await ann.open_store(size=32 * MIB)).places
        store = open_shard(shard)
        store.put(b"a", b"1")
        function = function_pid(shard)
        assert donor.process is not None
        (zygote,) = children(donor.process.pid)
        pids = [donor.process.pid, zygote, *children(zygote)]
        assert function in pids
        await trio.sleep(2)  # memory is populated, the pool filled, all reported
        before = {pid: ticks(pid) for pid in pids}
        await trio.sleep(10)
        spent = {pid: ticks(pid) - before[pid] for pid in pids}
        # Hundredths of a second, of a thousand: nothing polls. What it is to a hair `memfaas bench idle` tells.
        assert sum(spent.values()) <= 5
        assert own_memory(function) <= 15 * MIB


def children(pid: int) -> list[int]:
    """Of every thread of a process."""
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def own_memory(pid: int) -> int:
    """Proportional set size, without the memory that is lent."""
    total, lent = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            lent = "memfd:memfaas" in line
        elif words[0] == "Pss:" and not lent:
            total += int(words[1]) * 1024
    return total
