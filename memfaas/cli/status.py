"""`memfaas status`: what the broker knows."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import click
import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from memfaas.cli.listing import make_console, make_table
from memfaas.cli.options import SESSION, load, settings_options
from memfaas.client.session import Session
from memfaas.config import ClientSettings
from memfaas.errors import TransportError
from memfaas.messages import LeaseInfo, Message, StatusReport, StoreInfo, short
from memfaas.units import format_duration, format_size

WATCH_EVERY_S = 1.0
_WATCH_TIMEOUT_S = 2.0
"""A broker that is away is soon said to be."""
_STATES = {"held": "green", "granting": "yellow", "moving": "yellow", "dropped": "yellow"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON object; bytes and seconds.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@settings_options(ClientSettings, only=SESSION)
def status(as_json: bool, watch: bool, **given: Any) -> None:
    """Show donors, stores, leases, sessions, and the fabrics in use.

    A tenant sees all donors, its own stores, leases and sessions, and its quota. The tenant `operator`
    sees those of all. In a narrow terminal some columns are left out.

    \b
    Examples:
        memfaas status --watch
        memfaas status --tenant operator
        memfaas status --json | jq '.donors[] | {donor, free: (.memory.offered - .memory.leased)}'
    """
    settings = load(ClientSettings, given)
    if watch and not as_json:
        settings = replace(settings, timeout=min(settings.timeout, _WATCH_TIMEOUT_S))
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


def _watch(session: Session, address: str) -> None:
    report: StatusReport | None = None
    seen = time.monotonic()
    with _quiet(), Live(auto_refresh=False, screen=True, console=make_console()) as live:
        while True:
            try:
                report, trouble = session.status(), ""
                seen = time.monotonic()
            except TransportError as error:  # it may come back
                trouble = str(error)
            live.update(_screen(report, address, trouble, time.monotonic() - seen), refresh=True)
            time.sleep(WATCH_EVERY_S)


def _screen(report: StatusReport | None, address: str, trouble: str, age: float) -> RenderableType:
    """The last report that there is. With `trouble` it is as old as `age` says, in seconds."""
    parts: list[RenderableType] = []
    if trouble:
        old = f", figures of {format_duration(round(age))} ago" if report is not None else ""
        parts.append(Text(f"broker away{old}: {trouble}", "bold red"))
    if report is not None:
        parts.append(tables(report, address))
    return Group(*parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Log lines do not scroll into the screen; those that go to a file are written."""
    if sys.stderr.isatty():
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def as_builtins(message: Message) -> Any:
    """For JSON: identities are hexadecimal."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.hex() if isinstance(value, bytes) else value

    return plain(msgspec.to_builtins(message, builtin_types=(bytes,)))


# --- the tables -----------------------------------------------------------------------------------------


def tables(report: StatusReport, address: str) -> RenderableType:
    """All of it, for people."""
    parts: list[RenderableType] = [
        Text.assemble("broker ", (address, "bold"), f", up {format_duration(report.uptime)}"),
        donor_table(report),
        _store_table(report),
        lease_table(report),
        _session_table(report),
    ]
    if report.tenants:
        parts.append(_tenant_table(report))
    return Group(*parts)


def donor_table(report: StatusReport) -> Table:
    table = make_table(
        "donors",
        *("donor", "host", "lends", ">offered", ">leased", ">populated", ">available", ">headroom", ">leases"),
        *("RDMA", "taken back"),
        spare=("host", "headroom", "populated", "lends", "leases"),
        fold=("taken back",),
    )
    for one in report.donors:
        memory = one.memory
        amounts = (memory.offered, memory.leased, memory.populated, memory.available, memory.headroom)
        name = Text(one.donor) if one.connected else Text(f"{one.donor} (away)", "red")
        kind = "disk" if one.spill else "memory"
        taken = (
            ", ".join(f"{format_size(size)} by {holder}" for holder, size in sorted(one.reclaimed.items()) if size)
            or "-"
        )
        table.add_row(name, one.host, kind, *map(format_size, amounts), str(one.leases), one.device or "-", taken)
    return table


def _store_table(report: StatusReport) -> Table:
    table = make_table(
        "stores",
        *("store", "tenant", ">size", ">shards", ">sessions", "kind", "state"),
        spare=("sessions", "tenant"),
        fold=("kind", "state"),
    )
    away = _away(report)
    for one in report.stores:
        spec = one.spec
        kind = "persistent" if spec.persistent else "for its sessions"
        kind += "" if spec.compression == "none" else f", {spec.compression}"
        kind += ", a cache" if spec.on_reclaim == "drop" else ""
        leases = [lease for lease in report.leases if lease.tenant == spec.tenant and lease.store == spec.name]
        table.add_row(
            spec.name,
            spec.tenant,
            format_size(spec.size),
            str(spec.shards),
            str(one.sessions),
            kind,
            _store_state(one, leases, away),
        )
    return table


def _store_state(store: StoreInfo, leases: list[LeaseInfo], away: set[str]) -> Text:
    """Which of its shards are not there, and why."""
    lacking: dict[str, Sequence[int | None]] = {
        "lost": store.lost_shards,
        "missing": [one.shard for one in leases if one.state == "missing"],
        "dropped": [one.shard for one in leases if one.state == "dropped"],
        "with a donor that is away": [one.shard for one in leases if _is_away(one, away)],
    }
    parts = [
        Text(f"shards {what}: {', '.join(map(str, shards))}", "yellow" if what == "dropped" else "red")
        for what, shards in lacking.items()
        if shards
    ]
    if any(one.state == "granting" for one in leases):
        parts.append(Text("being made", "yellow"))
    parts = parts or [Text("complete", "green")]
    if store.dropped:
        parts.append(Text(f"{store.dropped} keys dropped", "yellow"))
    return Text(", ").join(parts)


def lease_table(report: StatusReport) -> Table:
    table = make_table(
        "leases",
        *("lease", "of", ">shard", ">size", "donor", "state", ">epoch", ">sessions", "expires in", "links"),
        spare=("epoch", "sessions", "links", "expires in"),
        fold=("of", "state"),
    )
    away = _away(report)
    for one in report.leases:
        expires = "never" if one.expires_in is None else format_duration(one.expires_in)
        owner = one.tenant if one.store is None else f"store {one.store}"
        table.add_row(
            short(one.lease),
            owner,
            "-" if one.shard is None else str(one.shard),
            format_size(one.size),
            one.donor or Text("none", "red"),
            _lease_state(one, away),
            str(one.epoch),
            str(one.sessions),
            expires,
            _counts(one.links),
        )
    return table


def _lease_state(lease: LeaseInfo, away: set[str]) -> Text:
    state = Text(lease.state, _STATES.get(lease.state, "red"))
    if _is_away(lease, away):
        state = Text("donor away", "red")
    if lease.borrowed:
        state.append(", borrowed", "yellow")
    return state


def _away(report: StatusReport) -> set[str]:
    return {one.donor for one in report.donors if not one.connected}


def _is_away(lease: LeaseInfo, away: set[str]) -> bool:
    return lease.state == "held" and lease.donor in away


def _session_table(report: StatusReport) -> Table:
    table = make_table("sessions", "session", "tenant", ">leases", "links", "state", fold=("links",))
    for one in report.sessions:
        state = Text("connected", "green") if one.connected else Text("away", "red")
        table.add_row(short(one.session), one.tenant, str(one.leases), _counts(one.fabrics), state)
    return table


def _tenant_table(report: StatusReport) -> Table:
    table = make_table("tenants", "tenant", ">leased", ">quota", ">borrowed", ">priority")
    for one in report.tenants:
        table.add_row(
            one.tenant,
            format_size(one.leased),
            "none" if one.quota is None else format_size(one.quota),
            Text(format_size(one.borrowed), "yellow" if one.borrowed else ""),
            str(one.priority),
        )
    return table


def _counts(links: dict[str, int]) -> str:
    return ", ".join(f"{count} {fabric}" for fabric, count in sorted(links.items()) if count) or "-"
