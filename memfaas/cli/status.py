"""`memfaas status`: what the broker knows."""

from __future__ import annotations

import json
import time
from typing import Any

import click
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from memfaas.cli.options import SESSION, load, settings_options
from memfaas.client.session import Session
from memfaas.config import ClientSettings
from memfaas.errors import TransportError
from memfaas.messages import Message, StatusReport
from memfaas.units import format_duration, format_size

WATCH_EVERY_S = 1.0
_WIDTH_OF_A_FILE = 200
_STATES = {"held": "green", "granting": "yellow", "moving": "yellow", "dropped": "yellow"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON object; bytes and seconds.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@settings_options(ClientSettings, only=SESSION)
def status(as_json: bool, watch: bool, **given: Any) -> None:
    """Show donors, stores, leases, sessions, and the fabrics in use.

    A tenant sees all donors, and its own stores, leases and sessions. The tenant `operator` sees
    those of all.

    \b
    Examples:
        memfaas status --watch
        memfaas status --tenant operator
        memfaas status --json | jq '.donors[] | {donor, free: (.memory.offered - .memory.leased)}'
    """
    settings = load(ClientSettings, given)
    with Session.open(settings) as session:
        if not watch:
            report = session.status()
            if as_json:
                click.echo(json.dumps(as_builtins(report)))
            else:
                make_console().print(tables(report, str(settings.broker)))
        elif as_json:
            while True:
                click.echo(json.dumps(as_builtins(session.status())))
                time.sleep(WATCH_EVERY_S)
        else:
            _watch(session, str(settings.broker))


def make_console() -> Console:
    """A file or pipe is as wide as the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_A_FILE
    return console


def _watch(session: Session, address: str) -> None:
    with Live(auto_refresh=False, screen=True) as live:
        while True:
            try:
                shown: RenderableType = tables(session.status(), address)
            except TransportError as error:  # it may come back
                shown = Text(str(error), style="red")
            live.update(shown, refresh=True)
            time.sleep(WATCH_EVERY_S)


def as_builtins(message: Message) -> Any:
    """For JSON: identities are hexadecimal."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.hex() if isinstance(value, bytes) else value

    return plain(msgspec.to_builtins(message, builtin_types=(bytes,)))


def tables(report: StatusReport, address: str) -> RenderableType:
    """All of it, for people."""
    return Group(
        Text.assemble("broker ", (address, "bold"), f", up {format_duration(report.uptime)}"),
        donor_table(report),
        _store_table(report),
        lease_table(report),
        _session_table(report),
    )


def donor_table(report: StatusReport) -> Table:
    sizes = (">offered", ">leased", ">populated", ">available", ">headroom")
    table = make_table("donors", "donor", "host", "lends", *sizes, ">leases", "taken back")
    for one in report.donors:
        memory = one.memory
        amounts = (memory.offered, memory.leased, memory.populated, memory.available, memory.headroom)
        name = Text(one.donor) if one.connected else Text(f"{one.donor} (away)", "red")
        kind = "disk" if one.spill else "memory"
        taken = ", ".join(f"{format_size(size)} by {holder}" for holder, size in sorted(one.reclaimed.items())) or "-"
        table.add_row(name, one.host, kind, *map(format_size, amounts), str(one.leases), taken)
    return table


def _store_table(report: StatusReport) -> Table:
    table = make_table("stores", "store", "tenant", ">size", ">shards", ">sessions", "kind", "state")
    for one in report.stores:
        spec = one.spec
        kind = "persistent" if spec.persistent else "for its sessions"
        kind += "" if spec.compression == "none" else f", {spec.compression}"
        kind += ", a cache" if spec.on_reclaim == "drop" else ""
        lost = f"shards lost: {', '.join(map(str, one.lost_shards))}"
        state = Text(lost, "red") if one.lost_shards else Text("complete", "green")
        if one.dropped:
            state.append(f", {one.dropped} keys dropped", "yellow")
        table.add_row(
            spec.name,
            spec.tenant,
            format_size(spec.size),
            str(spec.shards),
            str(one.sessions),
            kind,
            state,
        )
    return table


def lease_table(report: StatusReport) -> Table:
    table = make_table("leases", "lease", "of", ">size", "donor", "state", ">epoch", ">sessions", "expires in", "links")
    for one in report.leases:
        expires = "never" if one.expires_in is None else format_duration(one.expires_in)
        owner = one.tenant if one.store is None else f"store {one.store}"
        table.add_row(
            one.lease.hex()[:8],
            owner,
            format_size(one.size),
            one.donor or Text("none", "red"),
            Text(one.state, _STATES.get(one.state, "red")),
            str(one.epoch),
            str(one.sessions),
            expires,
            _counts(one.links),
        )
    return table


def _session_table(report: StatusReport) -> Table:
    table = make_table("sessions", "session", "tenant", ">leases", "links", "state")
    for one in report.sessions:
        state = Text("connected", "green") if one.connected else Text("away", "red")
        table.add_row(one.session.hex()[:8], one.tenant, str(one.leases), _counts(one.fabrics), state)
    return table


def _counts(links: dict[str, int]) -> str:
    return ", ".join(f"{count} {fabric}" for fabric, count in sorted(links.items()) if count) or "-"


def make_table(title: str, *columns: str) -> Table:
    """A column whose name begins with > is aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", no_wrap=True, header_style="dim"
        )
    return table
