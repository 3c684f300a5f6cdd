"""The broker counts usage, keeps it over a restart, and lends beyond quotas for as long as there is room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from memfaas import auth, messages
from memfaas.config import BrokerSettings
from memfaas.errors import UsageError
from memfaas.server.broker import run_broker
from memfaas.units import MIB
from tests.server.support import LIMIT_S, SECRET, FakeDonor, client, eventually


@pytest.fixture
def given(tmp_path: Path, short_waits: None) -> dict[str, Any]:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text(SECRET.hex())
    return {"listen_port": 0, "secret_file": secret, "usage_file": tmp_path / "usage.json"}


class Running:
    """A broker as its process runs it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._settings = BrokerSettings(**given)
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self.port = 0

    async def run(self, task_status: trio.TaskStatus[Running] = trio.TASK_STATUS_IGNORED) -> None:
        def ready(*, address: str, **_: Any) -> None:
            self.port = int(address.rpartition(":")[2])
            task_status.started(self)

        with self._scope:
            await run_broker(self._settings, ready)
        self._stopped.set()

    async def stop(self) -> None:
        self._scope.cancel()
        with trio.fail_after(LIMIT_S):
            await self._stopped.wait()


async def usage(port: int, tenant: str) -> messages.UsageReport:
    async with client(port, tenant) as session:
        return await session.ask(messages.AskUsage(), messages.UsageReport)


async def test_a_lease_is_counted_for_its_tenant_and_its_donor(given: dict[str, Any], nursery: trio.Nursery) -> None:
    running: Running = await nursery.start(Running(given).run)
    nursery.start_soon(FakeDonor("d").run, running.port)
    async with client(running.port) as ann:
        await ann.open_region(8 * MIB)
        report = await ann.ask(messages.AskUsage(), messages.UsageReport)
        assert [(one.tenant, one.donor) for one in report.tenants] == [("ann", "d")]
        later = await ann.ask(messages.AskUsage(), messages.UsageReport)
        assert later.tenants[0].leased > report.tenants[0].leased
    of_all = await usage(running.port, auth.OPERATOR)
    assert [one.donor for one in of_all.donors] == ["d"]
    assert of_all.donors[0].offered > of_all.donors[0].leased > 0
    of_bob = await usage(running.port, "bob")
    assert (of_bob.tenants, of_bob.donors) == ([], [])


async def test_the_status_has_quotas_and_what_is_borrowed(
    given: dict[str, Any], tmp_path: Path, nursery: trio.Nursery
) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[tenants.ann]\nquota = "12MiB"\npriority = 3\n[tenants.bob]\nquota = 0\n')
    running: Running = await nursery.start(Running({**given, "tenants_file": tenants}).run)
    nursery.start_soon(FakeDonor("d").run, running.port)
    async with client(running.port, "ann") as ann, client(running.port, auth.OPERATOR) as operator:
        first = await ann.open_region(8 * MIB)
        second = await ann.open_region(8 * MIB)
        status = await ann.status()
        (share,) = status.tenants
        assert share.leased > share.borrowed >= 8 * MIB
        assert (share.tenant, share.quota, share.priority) == ("ann", 12 * MIB, 3)
        borrowed = {one.lease: one.borrowed for one in status.leases}
        assert borrowed == {first.lease: False, second.lease: True}
        assert [(one.priority, one.shard) for one in status.leases] == [(3, None)] * 2
        bob = messages.TenantInfo(tenant="bob", leased=0, borrowed=0, quota=0, priority=0)
        assert (await operator.status()).tenants == [share, bob]
        async with client(running.port, "eve") as eve:
            nobody = messages.TenantInfo(tenant="eve", leased=0, borrowed=0, quota=None, priority=0)
            assert (await eve.status()).tenants == [nobody]


async def test_usage_says_whose_it_is(given: dict[str, Any], nursery: trio.Nursery) -> None:
    running: Running = await nursery.start(Running(given).run)
    assert (await usage(running.port, "bob")).tenant == "bob"
    assert (await usage(running.port, auth.OPERATOR)).tenant is None


async def test_usage_outlives_the_broker(given: dict[str, Any], nursery: trio.Nursery) -> None:
    running: Running = await nursery.start(Running(given).run)
    donor = FakeDonor("d")
    nursery.start_soon(donor.run, running.port)
    async with client(running.port) as ann:
        await ann.open_region(8 * MIB)
    before = await usage(running.port, auth.OPERATOR)
    donor.kill()
    await running.stop()
    again: Running = await nursery.start(Running(given).run)
    after = await usage(again.port, auth.OPERATOR)
    assert after.since == before.since
    assert after.tenants[0].leased >= before.tenants[0].leased > 0
    assert after.donors[0].offered >= before.donors[0].offered > 0


async def test_the_file_is_read_and_writable_before_anybody_is_served(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_text("{}")
    with pytest.raises(UsageError, match="move it away"):
        await run_broker(BrokerSettings(**given), lambda **_: pytest.fail("it listened"))
    given["usage_file"] = tmp_path / "none" / "usage.json"
    with pytest.raises(UsageError, match="cannot keep"):
        await run_broker(BrokerSettings(**given), lambda **_: pytest.fail("it listened"))


async def test_what_a_reclaim_gave_back_is_counted(given: dict[str, Any], nursery: trio.Nursery) -> None:
    class Giving(FakeDonor):
        async def on_request(self, message: messages.Message) -> messages.Message:
            if isinstance(message, messages.Reclaim):
                return messages.Reclaimed(
                    donor=self.name, asked=message.size, freed=message.size, seconds=0.1, in_time=True, steps=[]
                )
            return await super().on_request(message)

    running: Running = await nursery.start(Running(given).run)
    donor = Giving("d")
    nursery.start_soon(donor.run, running.port)
    await eventually(lambda: donor.channel is not None)
    async with client(running.port, auth.OPERATOR) as operator:
        request = messages.Reclaim(donor="d", size=5 * MIB, deadline=1.0, holder="job 1")
        await operator.ask(request, messages.Reclaimed)
    assert donor.channel is not None
    await donor.channel.notify(  # of its own accord
        messages.Reclaimed(donor="d", asked=4 * MIB, freed=3 * MIB, seconds=1.0, in_time=False, steps=[])
    )
    with trio.fail_after(LIMIT_S):
        while (one := (await usage(running.port, auth.OPERATOR)).donors[0]).reclaims < 2:  # noqa: ASYNC110  # the notice comes on another connection
            await trio.sleep(0.01)
    assert (one.reclaims, one.reclaimed, one.in_time) == (2, 8 * MIB, 1)


async def test_leases_beyond_the_quota_are_granted_and_borrowed(
    given: dict[str, Any], nursery: trio.Nursery, tmp_path: Path
) -> None:
    given["tenants_file"] = tmp_path / "tenants.toml"
    given["tenants_file"].write_text('[tenants.ann]\nquota = "20MiB"\npriority = 3\n')
    running: Running = await nursery.start(Running(given).run)
    donor = FakeDonor("d")
    nursery.start_soon(donor.run, running.port)
    async with client(running.port) as ann, client(running.port, "bob") as bob:
        within = await ann.open_region(8 * MIB)
        beyond = await ann.open_region(16 * MIB)
        of_bob = await bob.open_region(32 * MIB)
        standing = {lease: (held.spec.priority, held.spec.borrowed) for lease, held in donor.held.items()}
    assert standing == {within.lease: (3, False), beyond.lease: (3, True), of_bob.lease: (0, False)}


async def test_a_file_of_quotas_that_makes_no_sense_stops_the_start(given: dict[str, Any], tmp_path: Path) -> None:
    given["tenants_file"] = tmp_path / "tenants.toml"
    given["tenants_file"].write_text("[tenants.ann]\nquotas = 5\n")
    with pytest.raises(UsageError, match=r"tenants\.toml"):
        await run_broker(BrokerSettings(**given), lambda **_: pytest.fail("it listened"))


async def test_what_is_saved_is_the_report(given: dict[str, Any], nursery: trio.Nursery, tmp_path: Path) -> None:
    running: Running = await nursery.start(Running(given).run)
    await running.stop()
    assert set(json.loads((tmp_path / "usage.json").read_text())) == set(messages.UsageReport.__struct_fields__)
