"""`memfaas reclaim` and `lend`: taking a donor's memory back, and letting it lend again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
import trio
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfaas import auth, local_agent
from memfaas.cli.listing import make_console, make_table
from memfaas.cli.options import load, settings_options
from memfaas.cli.status import as_builtins
from memfaas.client.session import Session
from memfaas.config import ClientSettings, DonorSettings
from memfaas.errors import UsageError
from memfaas.messages import FreedBytes, Lend, Lent, Reclaim, Reclaimed
from memfaas.units import format_duration, format_size, parse_duration, parse_size

TOO_LATE = 50
"""Exit status: not all of the memory was free by the deadline. It is no error of memfaas.errors."""
_LEND_S = 5.0
_MEANINGS = {
    "unlent": "nobody had leased it",
    "punched": "cut out of shards, which go on with less room",
    "migrated": "moved to another donor",
    "spilled": "moved to a spill donor",
    "dropped": "dropped, as the store asked for",
    "lost": "LOST",
}

_node_option = click.option("--node", metavar="NAME", help="Name of the donor.  [with --local: this host's name]")
_holder_option = click.option(
    "--holder",
    default=auth.OPERATOR,
    show_default=True,
    metavar="TEXT",
    help="Who needs the memory, such as 'job 17'; `memfaas lend` with the same holder ends it.",
)
_local_option = click.option(
    "--local", is_flag=True, help="Ask the donor on this node itself, over its socket: no broker is needed."
)


def _connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those of a client, who always is the operator, and where a donor on this node is found."""
    command = settings_options(DonorSettings, only=("runtime_dir",))(command)
    return settings_options(ClientSettings, only=("broker", "secret_file", "timeout"))(command)


@click.command()
@_node_option
@click.option("--bytes", "size", required=True, metavar="SIZE", help="How much; all that it lends if that is less.")
@click.option(
    "--deadline",
    default="500ms",
    show_default=True,
    metavar="DURATION",
    help="By when it shall be free. Then it is taken, whatever is in it.",
)
@_holder_option
@_local_option
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON object; bytes and seconds.")
@_connection_options
def reclaim(
    node: str | None,
    size: str,
    deadline: str,
    holder: str,
    local: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Take memory of a donor back, for whoever needs it on its node.

    The donor gives back what nobody has leased, then cuts free parts out of shards, and then moves
    whole leases to other donors, to spill donors if there is no room in memory. Their users go on
    without an error. What cannot be moved by the deadline is lost, and named here. From now on the
    donor lends so much less, until `memfaas lend`.

    The exit status is 0 when all of it was free by the deadline, and 50 when it was not. A donor that
    lends less than that gives all it has; with --json, `wanted` is then more than `asked`.

    \b
    Examples:
        memfaas reclaim --node node7 --bytes 2GiB --deadline 500ms --holder 'job 17'
        memfaas lend --node node7 --holder 'job 17'
        memfaas reclaim --local --bytes 2GiB          (on node7 itself, also without a broker)
    """
    amount, seconds = parse_size(size), parse_duration(deadline)
    if amount == 0:
        raise UsageError("--bytes: there is nothing to take back; at least 1 byte")
    if local:
        at = _donor_here(node, given)
        request = Reclaim(donor=at.name, size=amount, deadline=seconds, holder=holder)
        answer = trio.run(local_agent.ask, at.home, request, Reclaimed, request.patience)
    else:
        with _operator(given) as session:
            answer = session.reclaim(_named(node), amount, seconds, holder)
    if as_json:
        click.echo(json.dumps(as_builtins(answer)))
    else:
        make_console().print(report(answer))
    if not answer.in_time:
        click.get_current_context().exit(TOO_LATE)


@click.command()
@_node_option
@_holder_option
@_local_option
@_connection_options
def lend(node: str | None, holder: str, local: bool, **given: Any) -> None:
    """Let a donor lend again what was taken back from it by the same holder.

    It says how much that is; nothing happens if that holder had taken nothing.

    \b
    Example:
        memfaas lend --node node7 --holder 'job 17'
    """
    if local:
        at = _donor_here(node, given)
        donor = at.name
        lent = trio.run(local_agent.ask, at.home, Lend(donor=donor, holder=holder), Lent, _LEND_S).size
    else:
        donor = _named(node)
        with _operator(given) as session:
            lent = session.lend(donor, holder)
    click.echo(f"{donor} lends {format_size(lent)} again" if lent else f"{holder!r} had taken nothing from {donor}")


def _operator(given: dict[str, Any]) -> Session:
    theirs = {name: value for name, value in given.items() if name != "runtime_dir"}
    return Session.open(load(ClientSettings, {**theirs, "tenant": auth.OPERATOR}))


def _donor_here(node: str | None, given: dict[str, Any]) -> DonorSettings:
    return load(DonorSettings, {"name": node, "runtime_dir": given["runtime_dir"]})


def _named(node: str | None) -> str:
    if node is None:
        raise UsageError("which donor? Give its name with --node, or --local for the one on this node")
    return node


# --- what came of it ----------------------------------------------------------------------------------


def report(answer: Reclaimed) -> RenderableType:
    """For people."""
    held = f"; {format_size(answer.held)} taken back in all by this holder"
    short = f"asked for {format_size(answer.wanted)}; it had "
    if answer.asked == 0:
        return Text.assemble(f"donor {answer.donor}: ", (f"{short}nothing left to lend", "yellow"), held)
    verdict = Text("in time", "green") if answer.in_time else Text("TOO LATE", "bold red")
    parts: list[RenderableType] = [Text.assemble(f"donor {answer.donor}: {_amounts(answer)}, ", verdict, held)]
    if answer.wanted > answer.asked:
        parts.append(Text(f"{short}only {format_size(answer.asked)} left to lend", "yellow"))
    if answer.steps:
        parts.append(_steps(answer.steps))
    lost = [step.what for step in answer.steps if step.how == "lost"]
    if lost:
        parts.append(Text(f"lost: {', '.join(lost)}", "bold red"))
    return Group(*parts)


def _amounts(answer: Reclaimed) -> str:
    """How much was free when. Leases leave whole, so that it may be more than was asked; that is not counted."""
    asked = format_size(answer.asked)
    if answer.freed >= answer.asked:
        return f"{asked} of {asked} free after {format_duration(answer.seconds)}"
    text = f"{format_size(answer.freed)} of {asked} free by the deadline ({format_duration(answer.deadline)})"
    later = min(sum(step.size for step in answer.steps), answer.asked)
    if later > answer.freed:
        text += f", {'all' if later == answer.asked else format_size(later)} after {format_duration(answer.seconds)}"
    return text


def _steps(steps: list[FreedBytes]) -> Table:
    table = make_table(None, "how", ">size", ">after", ">pause", "what", fold=("how", "what"))
    for step in steps:
        moved = step.how in ("migrated", "spilled")
        table.add_row(
            Text(_MEANINGS[step.how], "bold red" if step.how == "lost" else ""),
            format_size(step.size),
            format_duration(step.seconds),
            format_duration(step.pause) if moved else "-",
            step.what or "-",
        )
    return table
