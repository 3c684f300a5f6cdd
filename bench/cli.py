"""The commands `memfaas bench ...`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from memfaas.bench import bars, idle, kv, lease, pressure, report, result
from memfaas.bench.fs import report as fs_report
from memfaas.bench.fs.bars import FsResult
from memfaas.bench.fs.run import MANY as FS_MANY
from memfaas.bench.fs.run import ROUNDS as FS_ROUNDS
from memfaas.bench.fs.run import measure_fs
from memfaas.bench.peers import SYSTEMS
from memfaas.bench.plan import SIZES
from memfaas.bench.reclaim import report as reclaim_report
from memfaas.bench.reclaim.result import ReclaimResult
from memfaas.bench.reclaim.run import ROUNDS as RECLAIM_ROUNDS
from memfaas.bench.reclaim.run import SIZES as RECLAIM_SIZES
from memfaas.bench.reclaim.run import measure_reclaim
from memfaas.bench.run import LEAST_ROUNDS
from memfaas.bench.trace import jobs, machine, policies
from memfaas.bench.trace import report as trace_report
from memfaas.bench.trace.outcome import Outcome
from memfaas.bench.verbs import report as verbs_report
from memfaas.bench.verbs.bars import VerbsResult
from memfaas.bench.verbs.run import ROUNDS as VERBS_ROUNDS
from memfaas.bench.verbs.run import measure_verbs
from memfaas.config import ClientSettings, load_settings
from memfaas.errors import UsageError
from memfaas.units import format_size, parse_duration, parse_size

QUICK_SECONDS = 15.0
_WIDTH_OF_A_FILE = 200

Report = Callable[[float, str], None]


class _AnySize(click.ParamType[Any]):
    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(str(error), parameter, context)


class _Size(_AnySize):
    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        size = super().convert(value, parameter, context)
        if size not in SIZES:
            self.fail(f"the sizes are {', '.join(format_size(s) for s in SIZES)}", parameter, context)
        return size


class _Duration(click.ParamType[Any]):
    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            return parse_duration(value)
        except UsageError as error:
            self.fail(str(error), parameter, context)


_strict_option = click.option(
    "--strict", is_flag=True, help="Exit with status 1 unless every bar was measured and reached."
)
_output_option = click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Where the figures go.",
)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What `kv` and `compare` have in common."""
    for option in (
        _strict_option,
        _output_option,
        click.option("--quick", is_flag=True, help=f"A first impression in about {QUICK_SECONDS:.0f} s of measuring."),
        click.option(
            "--seconds", type=_Duration(), help="How long to measure; the rounds are repeated until it is over."
        ),
        click.option("--size", "sizes", type=_Size(), multiple=True, help="Only values of this size; may be repeated."),
    ):
        command = option(command)
    return command


@click.group("bench")
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure memfaas, and what you would use instead, on this machine.

    Everything that is measured is started by the benchmark, on the loopback interface and in
    temporary directories, and ended by it. Systems take turns in a new order in each round, so that
    a noisy machine is noisy for all of them: trust the ratios more than the microseconds.
    """
    # Whoever ends us by `kill` wants what we started to end too, as with Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


@bench.command("kv")
@_options
def kv_command(sizes: tuple[int, ...], seconds: float | None, quick: bool, output: Path, strict: bool) -> None:
    """Put and get over each fabric, beside the floors of this machine.

    The floors are a plain memory copy and a bare blocking round trip in C over TCP. Then the time
    from lease to first byte, and what an idle donor costs. Bars that need a peer are named as not
    measured: `compare` runs the peers too.
    """
    _measure("kv", kv.OURS, sizes, seconds, 60.0, quick, output, strict)


@bench.command("compare")
@click.option(
    "--peer",
    "peers",
    type=click.Choice([name for name, system in SYSTEMS.items() if system.kind == "peer"]),
    multiple=True,
    help="Only this peer; may be repeated.",
)
@_options
def compare_command(
    peers: tuple[str, ...], sizes: tuple[int, ...], seconds: float | None, quick: bool, output: Path, strict: bool
) -> None:
    """As `kv`, with Redis, memcached, LMDB, Mooncake Store and DragonHPC beside it in the same run.

    A peer that is not installed or does not start is named as skipped, with the reason. Get them
    with `make peers`.
    """
    names = [name for name, system in SYSTEMS.items() if system.kind != "peer" or not peers or name in peers]
    _measure("compare", names, sizes, seconds, 180.0, quick, output, strict)


@bench.command("lease")
@click.option("--grants", type=click.IntRange(min=1), default=60, show_default=True, help="How many leases to take.")
def lease_command(grants: int) -> None:
    """From the request for a lease to the first byte served, for a region and for a store."""
    with _progress() as progress:
        figures = lease.measure_leases(grants, progress)
    _console().print(report.show_leases(figures))


@bench.command("idle")
@click.option("--seconds", type=_Duration(), default=10.0, show_default=True, help="How long to watch.")
def idle_command(seconds: float) -> None:
    """What a donor and its memory functions cost while nobody asks anything of them."""
    with _progress() as progress:
        figures = idle.measure_idle(seconds, progress)
    _console().print(report.show_idle(figures))


@bench.command("pressure")
@click.option("--seconds", type=_Duration(), default=pressure.SECONDS, show_default=True, help="How long to watch.")
@click.option("--rounds", type=click.IntRange(min=0), default=pressure.ROUNDS, show_default=True, help="How often.")
def pressure_command(seconds: float, rounds: int) -> None:
    """What it costs that a donor watches its node, and how soon a program gets memory that is lent.

    The donor's headroom is chosen so that its node is just above it: there it looks most often.
    """
    try:
        with _progress() as progress:
            figures = pressure.measure_pressure(seconds, rounds, progress)
    except pressure.Disturbed as error:
        raise click.ClickException(str(error)) from error
    for line in figures.lines():
        click.echo(line)


@bench.command("reclaim")
@click.option(
    "--size",
    "sizes",
    type=_AnySize(),
    multiple=True,
    help=f"Take back so much; may be repeated. Otherwise {', '.join(format_size(size) for size in RECLAIM_SIZES)}.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=RECLAIM_ROUNDS, show_default=True, help="How often.")
@_output_option
@_strict_option
def reclaim_command(sizes: tuple[int, ...], rounds: int, output: Path, strict: bool) -> None:
    """How fast lent memory comes back, by each step of a reclaim, beside what is physically possible.

    The limits are measured in the same run, in turns with the steps: bare punch-hole, ftruncate,
    munmap and kill -9 of a process of that size, and a bare copy over the loopback interface. All
    with pages of 4 KiB and of 2 MiB: as root it changes the kernel's choice for shared memory
    meanwhile, and puts it back in the end, however it ends.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        found = measure_reclaim(sizes or RECLAIM_SIZES, rounds, report=progress)
    _tell("reclaim", found, reclaim_report.show(found), output, strict)


@bench.command("verbs")
@click.option("--rounds", type=click.IntRange(min=1), default=VERBS_ROUNDS, show_default=True, help="How often.")
@_output_option
@_strict_option
@click.option("--device", help="RDMA device: NAME[:PORT[:GID]]; else $MEMFAAS_DEVICE, or the first that works.")
def verbs_command(rounds: int, output: Path, strict: bool, device: str | None) -> None:
    """The verbs fabric, beside what the same RDMA device does with nothing around it.

    READ and WRITE beside a bare loop in C that posts and polls, pyverbs, and perftest; get and put
    of 4 KiB beside the fewest operations of the device that they need. Both ends are on this node.
    Then the same over a verbs library that has no device: what is left is the time of the software.
    What is not installed is named as skipped, and without an RDMA device all that needs one.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        found = measure_verbs(load_settings(ClientSettings, {"device": device}).device, rounds, progress)
    _tell("verbs", found, verbs_report.show(found), output, strict)


@bench.command("fs")
@click.option("--rounds", type=click.IntRange(min=1), default=FS_ROUNDS, show_default=True, help="How often.")
@click.option("--seconds", type=_Duration(), default=2.0, show_default=True, help="Of each measurement of data.")
@click.option("--names", type=click.IntRange(min=1), default=FS_MANY, show_default=True, help="In the folder of many.")
@_output_option
@_strict_option
def fs_command(rounds: int, seconds: float, names: int, output: Path, strict: bool) -> None:
    """A mount, beside tmpfs and other file systems through FUSE, in turns.

    The floor is a file system by pyfuse3 that keeps all in a dictionary. nbdkit and nbdfuse take part
    if they are installed. What JuiceFS says of itself is shown beside, and was not measured here.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        found = measure_fs(seconds, rounds, names, progress)
    _tell("fs", found, fs_report.show(found), output, strict)


@bench.command("trace")
@click.option(
    "--trace",
    type=click.Path(exists=True, path_type=Path),
    help="The machine's samples: a CSV file, or the folder data/daint_utilization of the artifact (docs/trace.md). "
    "Without it, a machine with the same statistics.",
)
@click.option("--nodes", type=click.IntRange(min=2), default=1000, show_default=True, help="How large a machine.")
@click.option("--start", type=_Duration(), default=0.0, help="Where in the trace to begin.")
@click.option("--hours", type=click.FloatRange(min=0.1), default=6.0, show_default=True, help="How much of it.")
@click.option(
    "--policy",
    "names",
    multiple=True,
    type=click.Choice([policy.name for policy in policies.variants()]),
    help="Only this policy; may be repeated.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the jobs that are drawn.")
@_output_option
def trace_command(
    trace: Path | None, nodes: int, start: float, hours: float, names: tuple[str, ...], seed: int, output: Path
) -> None:
    """Replay the jobs of a machine on a simulated cluster of thousands of donors.

    The broker, the placement and the policy by which donors take memory back are the real ones, on a
    virtual clock; bytes, and the time that it takes to copy and to free them, are computed. One policy
    stands for the defaults, and each of the others differs from it in one thing.
    """
    from memfaas.cli.replay import replay  # it puts the sides together

    chosen = [policy for policy in policies.variants() if not names or policy.name in names]
    seconds = hours * 3600
    series = (machine.read(trace) if trace else machine.like_daint(start + seconds)).part(start, seconds)
    timeline = jobs.Generator(series, nodes, seed).timeline()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    interrupted = False
    with _progress() as progress:
        for count, policy in enumerate(chosen):
            progress(count / len(chosen), f"policy: {policy.name}")
            try:
                outcomes.append(replay(timeline, policy, series.idle_free, seed))
            except KeyboardInterrupt:  # what was measured so far is not thrown away
                interrupted = True
                break
    if outcomes:
        _show_trace(outcomes, trace, output)
    if interrupted:
        click.echo(f"memfaas: interrupted; {len(outcomes)} of {len(chosen)} policies were replayed", err=True)
        raise KeyboardInterrupt


def _show_trace(outcomes: list[Outcome], trace: Path | None, output: Path) -> None:
    console = _console()
    console.width = max(console.width, trace_report.WIDTH)
    console.print(trace_report.show(outcomes))
    stem = output / f"bench-trace-{datetime.now():%Y%m%d-%H%M%S}"
    table = stem.with_suffix(".json")
    trace_report.write(outcomes, table, trace=str(trace or "like Piz Daint"))
    click.echo(f"figures: {table}")

    def draw(file: Path) -> None:
        from memfaas.bench.trace.plot import plot

        plot(outcomes, file)

    _plot(draw, stem)


def _measure(
    command: str,
    names: tuple[str, ...] | list[str],
    sizes: tuple[int, ...],
    seconds: float | None,
    default_seconds: float,
    quick: bool,
    output: Path,
    strict: bool,
) -> None:
    budget = seconds if seconds is not None else QUICK_SECONDS if quick else default_seconds
    output.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        found = kv.measure_systems(
            names,
            sorted(sizes or SIZES),
            budget,
            command=command,
            least_rounds=1 if quick else LEAST_ROUNDS,
            report=progress,
        )
        if not quick:
            found.leases = lease.measure_leases(lease.GRANTS, progress)
            found.idle = idle.measure_idle(idle.SECONDS, progress)
    found.verdicts = bars.judge(found)
    console = _console()
    console.print(report.show(found))
    stem = output / f"bench-{command}-{datetime.now():%Y%m%d-%H%M%S}"
    _write(found, stem)
    if strict and bars.missed(found.verdicts):
        sys.exit(1)


def _tell(
    name: str, found: ReclaimResult | VerbsResult | FsResult, shown: RenderableType, output: Path, strict: bool
) -> None:
    _console().print(shown)
    table = output / f"bench-{name}-{datetime.now():%Y%m%d-%H%M%S}.json"
    result.write(found, table)
    click.echo(f"figures: {table}")
    if strict and bars.missed(found.verdicts):
        sys.exit(1)


def _write(found: result.Result, stem: Path) -> None:
    table = stem.with_suffix(".json")
    result.write(found, table)
    click.echo(f"figures: {table}")

    def draw(file: Path) -> None:
        from memfaas.bench.plot import plot

        plot(found, file)

    _plot(draw, stem)


def _plot(draw: Callable[[Path], None], stem: Path) -> None:
    file = stem.with_suffix(".png")
    try:
        draw(file)
    except ImportError as error:
        click.echo(f"no plot: {error}; matplotlib comes with the extra memfaas[bench]")
    else:
        click.echo(f"plot: {file}")


def _console() -> Console:
    """A file or pipe is as wide as the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_A_FILE
    return console


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar on the terminal, which is gone when all is done."""
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, doing: progress.update(task, completed=min(1.0, share), description=doing)
