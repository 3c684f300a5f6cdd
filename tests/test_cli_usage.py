"""`memfaas usage`: what it prints, and how it subtracts an earlier report."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import msgspec
import pytest

from memfaas.cli import main
from memfaas.cli import usage as command
from memfaas.cli.listing import make_console
from memfaas.errors import UsageError
from memfaas.messages import DonorUsage, Usage, UsageReport
from memfaas.units import GIB

HOUR = 3600.0


def used(tenant: str, donor: str, gib_hours: float) -> Usage:
    return Usage(tenant=tenant, donor=donor, leased=gib_hours * GIB * HOUR, populated=gib_hours * GIB * HOUR / 2)


def lent(donor: str, gib_hours: float, reclaims: int = 0) -> DonorUsage:
    return DonorUsage(
        donor=donor,
        offered=2 * gib_hours * GIB * HOUR,
        leased=gib_hours * GIB * HOUR,
        reclaims=reclaims,
        reclaimed=reclaims * GIB,
        in_time=reclaims,
    )


EARLIER = UsageReport(since=1e9, now=1e9 + 100, tenants=[used("ann", "d0", 1)], donors=[lent("d0", 1, 3)])
LATER = UsageReport(
    since=1e9,
    now=1e9 + 300,
    tenants=[used("ann", "d0", 1.5), used("ann", "d1", 4), used("bob", "d1", 0)],
    donors=[lent("d0", 1.5, 5), lent("d1", 4)],
)


def printed(report: UsageReport) -> list[list[str]]:
    """The words of each line."""
    console = make_console()
    with console.capture() as capture:
        console.print(command.tables(report))
    return [line.split() for line in capture.get().splitlines()]


def test_the_table_has_gib_hours_and_the_sum_of_a_tenant_with_several_donors() -> None:
    lines = printed(LATER)
    assert ["ann", "d0", "1.500", "0.750"] in lines
    assert ["ann", "d1", "4.000", "2.000"] in lines
    assert ["ann", "all", "5.500", "2.750"] in lines
    assert ["d0", "3.000", "1.500", "5", "5", "5", "GiB"] in lines
    assert not any("bob" in line for line in lines)


def test_a_tenant_gets_no_table_of_donors() -> None:
    assert not any("lent," in line for line in printed(msgspec.structs.replace(LATER, donors=[])))


def test_an_earlier_report_is_subtracted() -> None:
    report = command.difference(LATER, EARLIER)
    assert (report.since, report.now) == (EARLIER.now, LATER.now)
    assert report.tenants == [used("ann", "d0", 0.5), used("ann", "d1", 4), used("bob", "d1", 0)]
    assert report.donors == [lent("d0", 0.5, 2), lent("d1", 4)]


def test_little_is_shown_with_three_digits_that_count() -> None:
    lines = printed(msgspec.structs.replace(LATER, tenants=[used("ann", "d0", 0.0246), used("bob", "d0", 2.5e-6)]))
    assert ["ann", "d0", "0.0246", "0.0123"] in lines
    assert ["bob", "d0", "0.00000250", "0.00000125"] in lines


def test_a_report_of_another_tenant_is_refused() -> None:
    of_ann = msgspec.structs.replace(EARLIER, tenant="ann")
    with pytest.raises(UsageError, match=r"of tenant 'ann', this one of all tenants.*--tenant ann "):
        command.difference(LATER, of_ann)
    with pytest.raises(UsageError, match=r"of all tenants, this one of tenant 'bob'.*--tenant operator "):
        command.difference(msgspec.structs.replace(LATER, tenant="bob"), EARLIER)
    again = msgspec.structs.replace(LATER, tenant="ann")
    assert command.difference(again, of_ann).tenant == "ann"


def test_a_report_of_another_count_is_refused() -> None:
    anew = msgspec.structs.replace(LATER, since=EARLIER.now + 1)
    with pytest.raises(UsageError, match="counted anew"):
        command.difference(anew, EARLIER)
    with pytest.raises(UsageError, match="counted anew"):
        command.difference(EARLIER, LATER)


def test_what_json_prints_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "march.json"
    file.write_text(json.dumps(msgspec.to_builtins(EARLIER)))
    assert command.read(file) == EARLIER


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "march.json").write_text("[]")
    with pytest.raises(UsageError, match=r"march\.json"):
        command.read(tmp_path / "march.json")


def test_a_file_that_is_missing_is_named() -> None:
    result = click.testing.CliRunner().invoke(main, ["usage", "--since", "/none.json"])
    assert result.exit_code == 2
    assert "/none.json" in result.output
