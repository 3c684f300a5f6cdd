"""`memfaas slurm`: the hooks of Slurm, and what its nodes lend."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import click
import trio

from memfaas import _accept as accept
from memfaas import auth
from memfaas.cli.listing import make_console, make_table
from memfaas.cli.options import load, settings_options
from memfaas.config import ClientSettings, DonorSettings
from memfaas.errors import MemfaasError, UsageError
from memfaas.units import format_size

if TYPE_CHECKING:
    from memfaas.server.slurm.nodes import Scan

_SLURM_CONF = "/etc/slurm/slurm.conf"
_KEYS = "/run/memfaas-jobs"
_LONGEST_DEADLINE_S = 3600


@click.group()
def slurm() -> None:
    """Work with the batch system Slurm."""


@slurm.command()
@click.option("--dir", "folder", required=True, metavar="DIR", help="Where to write the hooks.")
@click.option(
    "--deadline",
    default="10s",
    show_default=True,
    metavar="DURATION",
    help="How long donors have to free a job's memory. 3 s later a hook gives up, and lets the job start.",
)
@click.option(
    "--slurm-conf",
    envvar="SLURM_CONF",
    default=_SLURM_CONF,
    show_default=True,
    metavar="FILE",
    help="Slurm's settings on the controller. This command does not change it.",
)
@click.option(
    "--stores",
    "with_stores",
    is_flag=True,
    help="Also give stores to jobs that ask `#BB_LUA pool=memfaas capacity=4GiB`.",
)
@click.option(
    "--keys", default=_KEYS, show_default=True, metavar="DIR", help="With --stores: where each node keeps jobs' keys."
)
@settings_options(DonorSettings, only=("broker", "runtime_dir", "secret_file"))
def install(folder: str, deadline: str, slurm_conf: str, with_stores: bool, keys: str, **given: Any) -> None:
    """Write the hooks of Slurm, and print what slurm.conf must have to use them.

    The hooks must be found under the same path on the controller and on all nodes, and so must this
    installation of memfaas and the cluster's secret. Run it again to change something, or after
    memfaas was moved.

    \b
    Examples:
        memfaas slurm install --dir /etc/slurm/memfaas --broker node1 >> /etc/slurm/slurm.conf
        memfaas slurm install --dir /etc/slurm/memfaas --broker node1 --stores
    """
    from memfaas.server.slurm import files, stores

    settings = load(DonorSettings, given)
    plan = files.Plan(
        folder=accept.path(folder),
        broker=settings.broker,
        secret_file=settings.secret_path,
        runtime_dir=settings.runtime_dir,
        deadline=accept.duration(0.01, _LONGEST_DEADLINE_S)(deadline),
        slurm_conf=accept.path(slurm_conf),
        keys=accept.path(keys) if with_stores else None,
    )
    lines = files.install(plan)
    click.echo(f"memfaas: wrote the hooks to {plan.folder}; slurm.conf needs these lines:", err=True)
    click.echo("\n".join(lines))
    if with_stores:
        try:
            secret = auth.read_secret(plan.secret_file)
            trio.run(stores.Stores(plan.broker, secret, plan.state).write_pools, plan.pools)
        except MemfaasError as error:
            click.echo(f"memfaas: the pool is empty until the broker answers: {error}", err=True)
    click.echo(f"memfaas: start the donors with --runtime-dir {plan.runtime_dir}", err=True)


@slurm.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON list with an object for each node; bytes.")
@click.option("--publish", is_flag=True, help="Write what each node lends into its comment and extra in Slurm.")
@click.option(
    "--start",
    metavar="COMMAND",
    help="Run this for each idle node without a donor, with the node's name in the place of {}.",
)
@settings_options(ClientSettings, only=("broker", "secret_file"))
def scan(as_json: bool, publish: bool, start: str | None, **given: Any) -> None:
    """Show what Slurm's nodes lend, and which idle nodes could.

    Run it now and then (cron, or a timer). Memory that is still taken back for a job that Slurm no
    longer knows is lent again. Needs the cluster's secret.

    \b
    Examples:
        memfaas slurm scan
        memfaas slurm scan --publish --start 'ssh {} systemctl start memfaas-donor'
    """
    from memfaas.server.slurm import nodes

    words = None if start is None else _words(start)
    settings = load(ClientSettings, given)
    credentials = auth.read_credentials(settings.secret_path, auth.OPERATOR)
    found = trio.run(nodes.scan, settings.broker, credentials)
    trio.run(nodes.lend_again, settings.broker, credentials, found.ended)
    if as_json:
        click.echo(json.dumps(_facts(found)))
    else:
        _show(found)
    failures = trio.run(nodes.publish, found) if publish else {}
    if words is not None:
        failures |= {node.name: reason for node in found.willing if (reason := _start(words, node.name))}
    if failures:
        raise MemfaasError("; ".join(f"{node}: {reason}" for node, reason in failures.items()))


def _words(command: str) -> list[str]:
    """Raises UsageError for what is no command."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--start {command!r}: {error}") from error
    if not words:
        raise UsageError(f"--start {command!r}: there is no command in it")
    return words


def _start(command: list[str], node: str) -> str:
    """Runs the operator's command for a node. Returns what is wrong with it, or nothing. Raises UsageError."""
    words = [word.replace("{}", node) for word in command]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--start: cannot run {words[0]!r}: {reason}") from error
    return f"exit status {done.returncode}" if done.returncode else ""


def _facts(found: Scan) -> list[dict[str, Any]]:
    return [
        {
            "node": node.name,
            "state": node.state,
            "memory": node.memory,
            "allocated": node.allocated,
            "could_lend": node in found.willing,
            "lends": None if donor is None else donor.memory.offered,
            "leased": None if donor is None else donor.memory.leased,
            "reclaimed": None if donor is None else donor.reclaimed,
        }
        for node in found.nodes
        for donor in [found.donors.get(node.name)]
    ]


def _show(found: Scan) -> None:
    table = make_table("nodes", "node", "state", ">memory", ">of jobs", ">lent", ">leased", ">taken back", "")
    for node in found.nodes:
        donor = found.donors.get(node.name)
        shown = ["-", "-", "-"]
        if donor is not None:
            amounts = (donor.memory.offered, donor.memory.leased, sum(donor.reclaimed.values()))
            shown = [format_size(amount) for amount in amounts]
        hint = "idle, and could lend" if node in found.willing else ""
        table.add_row(node.name, node.state, format_size(node.memory), format_size(node.allocated), *shown, hint)
    make_console().print(table)
    for donor_name, holder in found.ended:
        click.echo(f"memfaas: {donor_name} lends again what was taken back for {holder}, which has ended", err=True)
