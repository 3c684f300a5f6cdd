"""`memfaas up`, `broker`, `donor`, `tenant`: what lends the memory, and who may use it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import click
import trio

from memfaas import auth, config
from memfaas.addresses import DEFAULT_PORT, Address, parse_address
from memfaas.auth import DEFAULT_SECRET_FILE
from memfaas.cli.options import load, settings_options
from memfaas.config import BrokerSettings, DonorSettings
from memfaas.errors import MemfaasError, UsageError
from memfaas.units import format_size

_DONORS_LEAVE_S = 20.0

_until_eof = click.option("--until-eof", is_flag=True, hidden=True, help="End when the standard input does.")


def _end_at_eof() -> threading.Event:
    """For a parent that must not leave us behind, however it ends. The event says that it did."""
    ended = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        ended.set()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="until-eof", daemon=True).start()
    return ended


def _remove(folder: Path) -> None:
    """Removes a folder when its donors have left their own in it, as they do when they stop."""
    deadline = time.monotonic() + _DONORS_LEAVE_S
    while any((folder / "run").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


@click.command()
@_until_eof
@click.option(
    "--folder", type=click.Path(path_type=Path), hidden=True, help="With --until-eof: a folder to remove at the end."
)
@settings_options(BrokerSettings)
def broker(until_eof: bool, folder: Path | None, **given: Any) -> None:
    """Run the broker of a cluster, in the foreground.

    It prints one line of JSON when it is ready. It keeps nothing on disk but, with --usage-file, who used
    how much: when it was killed and is started again, donors and sessions tell it what there is, and no
    data is lost. The secret file is made if there is none; copy it to every node of the cluster.

    \b
    Example:
        memfaas broker --listen-host 0.0.0.0
    """
    from memfaas.server import broker as server

    settings = load(BrokerSettings, given)
    auth.create_secret(settings.secret_file)
    orphaned = _end_at_eof() if until_eof else None
    server.main(settings)
    if folder is not None and orphaned is not None and orphaned.is_set():
        _remove(folder)


@click.command()
@_until_eof
@settings_options(DonorSettings)
def donor(until_eof: bool, **given: Any) -> None:
    """Lend memory of this node, in the foreground.

    It prints one line of JSON when it is ready. A donor that is stopped (Ctrl-C or SIGTERM) takes its
    memory back, and what is there is lost: `memfaas reclaim` all of it first, and its leases move to other
    donors. One that was killed and is started again finds its memory functions, which have gone
    on serving, and nothing is lost.

    \b
    Examples:
        memfaas donor --broker node1:7411 --memory 16GiB
        memfaas donor --broker node1 --memory auto --headroom 4GiB
        memfaas donor --broker node1 --name $(hostname)-disk --backing /scratch/memfaas --memory 64GiB

    The last one is a spill donor: it lends files in a folder of local scratch. It is chosen last, and what
    lies there goes back to memory when a donor has room again. Without --backing, memory is lent.
    """
    from memfaas.server import donor as server

    settings = load(DonorSettings, given)
    if until_eof:
        _end_at_eof()
    server.main(settings)


@click.command()
@settings_options(BrokerSettings)
@settings_options(DonorSettings, only=("name", "memory", "headroom", "backing", "device", "runtime_dir", "warm"))
def up(**given: Any) -> None:
    """Run a broker and a donor on this machine, in the foreground.

    Ctrl-C stops both and gives all memory back.

    \b
    Example:
        memfaas up --memory 4GiB
    """
    from memfaas.server import process

    settings = load(BrokerSettings, {option.name: given.pop(option.name) for option in config.options(BrokerSettings)})
    auth.create_secret(settings.secret_file)
    trio.run(process.until_signal, lambda: _up(settings, given))
    click.echo("memfaas: stopped; all memory is free again", err=True)


async def _up(settings: BrokerSettings, given: dict[str, Any]) -> None:
    from memfaas.server import broker, donor

    failures: list[MemfaasError] = []  # as they are, not in the nursery's group
    listening: list[str] = []
    ready = trio.Event()

    def broker_is_ready(*, address: str, **_: Any) -> None:
        listening.append(address)
        ready.set()

    async with trio.open_nursery() as nursery:
        # The donor ends first: it tells the broker what it takes back.
        broker_scope = trio.CancelScope(shield=True)

        async def serve() -> None:
            try:
                with broker_scope:
                    await broker.run_broker(settings, broker_is_ready)
            except MemfaasError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        nursery.start_soon(serve)
        try:
            await ready.wait()
            place = parse_address(listening[0])
            host = "127.0.0.1" if place.host in ("0.0.0.0", "::") else place.host
            near = Address(host, place.port, settings.secret_file)
            lends = load(DonorSettings, {**given, "broker": near})
            await donor.run_donor(lends, lambda **facts: _say_up(near, **facts))
        except MemfaasError as error:
            failures.append(error)
        finally:
            broker_scope.cancel()
    if failures:
        raise failures[0]


def _say_up(address: Address, *, offered: int, **_: Any) -> None:
    default = address.secret_file == DEFAULT_SECRET_FILE.expanduser() and address.port == DEFAULT_PORT
    click.echo(f"memfaas is up at {address.host}:{address.port} and lends {format_size(offered)}. In another shell:\n")
    if not default:
        click.echo(f"    export MEMFAAS_BROKER='{address}'")
    click.echo("    echo hello | memfaas put greeting")
    click.echo("    memfaas get greeting\n")
    click.echo("Ctrl-C stops it.")


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@settings_options(BrokerSettings, only=("secret_file",))
def tenant(name: str, file: Path, **given: Any) -> None:
    """Write a key FILE with which its reader can be the tenant NAME, and nobody else.

    It is made from the cluster's secret, so run it on a node that has it. Whoever has only the key
    file cannot reach what belongs to other tenants. An existing file is not overwritten.

    \b
    Example:
        memfaas tenant alice alice.key
        MEMFAAS_SECRET_FILE=alice.key memfaas ls
    """
    settings = load(BrokerSettings, given)
    secret = auth.read_secret(settings.secret_file)
    try:
        auth.write_tenant_key(file, auth.Credentials.of_tenant(secret, auth.valid_tenant(name)))
    except FileExistsError as error:
        raise UsageError(f"{file}: there is one already, and it is not overwritten; remove it first") from error
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
    click.echo(f"memfaas: wrote the key of tenant {name} to {file}", err=True)
