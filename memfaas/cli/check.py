"""`memfaas doctor`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from rich.text import Text

from memfaas import doctor as checks
from memfaas.cli.listing import make_console, make_table
from memfaas.cli.options import load, settings_options
from memfaas.config import ClientSettings, DonorSettings

_STYLES = {"ok": "green", "slow": "yellow", "missing": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@settings_options(ClientSettings, only=("device",))
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool, **given: Any) -> None:
    """Say what on this node is missing or slow, and the command that mends it.

    Nothing is changed. Where there are RDMA devices, a page is written and read through the one that
    is used. The exit status is 1 when something is missing that memfaas cannot do
    without, and 0 otherwise.
    """
    found = checks.examine(
        checks.Node(backing=load(DonorSettings, {}).backing, device=load(ClientSettings, given).device)
    )
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in found], indent=2))
    else:
        _print(found)
    if any(check.required and check.state == "missing" for check in found):
        ctx.exit(1)


def _print(found: list[checks.Check]) -> None:
    console = make_console()
    table = make_table(None, "check", "state", "found", "so", fold=("found", "so"))
    for check in found:
        table.add_row(check.name, Text(check.state, _STYLES[check.state]), check.found, check.meaning)
    console.print(table)
    remedies = [check for check in found if check.remedy]
    if remedies:
        console.print("\nTo mend it:", style="bold")
    for check in remedies:
        # As it is, on one line, so that it can be copied.
        console.print(Text(f"  {check.name}:"), Text(f"    {check.remedy}"), sep="\n", soft_wrap=True)
