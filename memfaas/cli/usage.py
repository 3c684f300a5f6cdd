"""`memfaas usage`: who used how much of whose memory."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfaas.auth import OPERATOR
from memfaas.cli.listing import make_console, make_table
from memfaas.cli.options import SESSION, load, settings_options
from memfaas.client.session import Session
from memfaas.config import ClientSettings
from memfaas.errors import UsageError
from memfaas.messages import DonorUsage, Usage, UsageReport
from memfaas.units import GIB, format_duration, format_size

_GIB_HOURS = GIB * 3600.0
_PLACES = 3
_DIGITS = 3

U = TypeVar("U", Usage, DonorUsage)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON object; bytes, seconds, byte-seconds.")
@click.option(
    "--since",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Only what came after the report in this file, which --json had printed.",
)
@settings_options(ClientSettings, only=SESSION)
def usage(as_json: bool, since: Path | None, **given: Any) -> None:
    """Show how much memory was used and lent, and for how long.

    A tenant sees what its own leases took of each donor, in GiB times hours. The tenant `operator`
    sees that of all, and what each donor lent and gave back, so that a centre can credit who lent.

    \b
    Examples:
        memfaas usage
        memfaas usage --tenant operator --json >march.json
        memfaas usage --tenant operator --since march.json
    """
    with Session.open(load(ClientSettings, given)) as session:
        report = session.usage()
    if since is not None:
        report = difference(report, read(since))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report)))
    else:
        make_console().print(tables(report))


def read(file: Path) -> UsageReport:
    """Raises UsageError for a file that `--json` did not print."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=UsageReport)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} has no report of `memfaas usage --json`: {error}") from error


def difference(later: UsageReport, earlier: UsageReport) -> UsageReport:
    """What was counted between two reports. Raises UsageError when the later does not go on from the earlier."""
    if later.tenant != earlier.tenant:
        raise UsageError(
            f"that report is of {_whose(earlier)}, this one of {_whose(later)}: nothing can be subtracted; "
            f"with --tenant {earlier.tenant or OPERATOR} it can"
        )
    if later.since > earlier.now or later.now < earlier.now:
        raise UsageError(
            "the broker has counted anew since that report was made, so there is nothing to subtract it from; "
            "with the setting usage_file its counts outlive a restart"
        )
    used = {(one.tenant, one.donor): one for one in earlier.tenants}
    lent = {one.donor: one for one in earlier.donors}
    return UsageReport(
        since=earlier.now,
        now=later.now,
        tenant=later.tenant,
        tenants=[_less(one, used.get((one.tenant, one.donor))) for one in later.tenants],
        donors=[_less(one, lent.get(one.donor)) for one in later.donors],
    )


def _whose(report: UsageReport) -> str:
    return "all tenants" if report.tenant is None else f"tenant {report.tenant!r}"


def _less(later: U, earlier: U | None) -> U:
    if earlier is None:
        return later
    counts = {
        name: value - getattr(earlier, name)
        for name, value in msgspec.structs.asdict(later).items()
        if not isinstance(value, str)
    }
    return msgspec.structs.replace(later, **counts)


def tables(report: UsageReport) -> RenderableType:
    """For people; what came to nothing is left out."""
    begun = datetime.fromtimestamp(report.since).isoformat(" ", "seconds")
    parts: list[RenderableType] = [Text(f"since {begun}, for {format_duration(max(0.0, report.now - report.since))}")]
    parts.append(_used(report))
    if report.donors:
        parts.append(_lent(report))
    return Group(*parts)


def _used(report: UsageReport) -> Table:
    table = make_table("used, in GiB·h", "tenant", "donor", ">leased", ">populated")
    for tenant in dict.fromkeys(one.tenant for one in report.tenants):
        rows = [one for one in report.tenants if one.tenant == tenant and one.leased > 0]
        for one in rows:
            table.add_row(tenant, one.donor, _gib_hours(one.leased), _gib_hours(one.populated))
        if len(rows) > 1:
            sums = (sum(one.leased for one in rows), sum(one.populated for one in rows))
            table.add_row(tenant, Text("all", "bold"), *map(_gib_hours, sums), style="bold")
    return table


def _lent(report: UsageReport) -> Table:
    table = make_table("lent, in GiB·h", "donor", ">offered", ">leased", ">reclaims", ">in time", ">given back")
    for one in report.donors:
        table.add_row(
            one.donor,
            _gib_hours(one.offered),
            _gib_hours(one.leased),
            str(one.reclaims),
            str(one.in_time),
            format_size(one.reclaimed),
        )
    return table


def _gib_hours(byte_seconds: float) -> str:
    """To the thousandth, and what is less with three digits that count: in the first minutes it is little."""
    amount = byte_seconds / _GIB_HOURS
    places = _PLACES if amount <= 0 else max(_PLACES, _DIGITS - 1 - math.floor(math.log10(amount)))
    return f"{amount:.{places}f}"
