"""`memfaas fs`: what can be done with the file system in a store besides mounting it."""

from __future__ import annotations

import json
from typing import Any

import click

from memfaas.cli.options import SESSION, load, settings_options
from memfaas.client.session import Session
from memfaas.config import ClientSettings
from memfaas.errors import UsageError


@click.group()
def fs() -> None:
    """Look after the file system in a store. `memfaas mount` shows it."""


@fs.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON object.")
@settings_options(ClientSettings, only=SESSION)
@click.pass_context
def check(ctx: click.Context, /, store: str, as_json: bool, **given: Any) -> None:
    """Say whether names, inodes and data of the file system in STORE fit together.

    It reads all of the metadata, and completes what a killed mount left half done. Nobody may change files meanwhile.
    The exit status is 1 when something is wrong. An inode without a name, of 150 bytes, which a mount leaves that is
    killed while it makes a file, is not wrong.

    \b
    Example:
        memfaas fs check scratch
    """
    from memfaas.fs import check as checks
    from memfaas.fs.cells import Cells
    from memfaas.fs.records import SUPERBLOCK

    with Session.open(load(ClientSettings, given)) as session:
        opened = session.store(store)
        if Cells(opened).read(SUPERBLOCK) is None:
            raise UsageError(f"there is no file system in store {store!r}")
        findings = checks.check(opened)
    leaked = sorted(findings.leaked)
    if as_json:
        click.echo(json.dumps({"store": store, "wrong": findings.wrong, "leaked": leaked}))
    else:
        for line in findings.wrong:
            click.echo(line)
        if leaked:
            click.echo(f"without a name, which is harmless: inodes {', '.join(map(str, leaked))}")
        click.echo(f"{len(findings.wrong)} things are wrong" if findings.wrong else "everything is as it should be")
    if findings.wrong:
        ctx.exit(1)
