"""`memfaas mount` and `umount`: the files of a store as a folder."""

from __future__ import annotations

import functools
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from memfaas import mounts
from memfaas.cli.background import detach, say_ready
from memfaas.cli.fstab import KERNEL
from memfaas.cli.options import SESSION, load, settings_options
from memfaas.config import ClientSettings
from memfaas.errors import DeadlineExceeded, UsageError
from memfaas.units import parse_duration, parse_size

_END_S = 30.0
_LONGEST_NAME = 200


@click.command()
@click.argument("places", metavar="[STORE] FOLDER", nargs=-1)
@click.option("--size", metavar="SIZE", help="Size of the store, if there is none of that name and it has to be made.")
@click.option("--local", is_flag=True, help="On a small cluster of its own on this machine, which ends with the mount.")
@click.option("--read-only", is_flag=True, help="Refuse changes.")
@click.option("--allow-other", is_flag=True, help="Let other users in, by the files' permissions.")
@click.option("--foreground", is_flag=True, help="Stay, until it is unmounted or Ctrl-C.")
@click.option(
    "--cache",
    metavar="DURATION",
    default="1s",
    show_default=True,
    help="How long names and attributes may be shown after another mount changed them.",
)
@click.option(
    "--log",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to log, when it does not stay in the foreground.  "
    "[default: a file in ~/.local/state/memfaas named after FOLDER]",
)
@click.option(
    "-o",
    "flags",
    metavar="FLAGS",
    default="",
    help=f"What the kernel is to obey, with commas between: {', '.join(KERNEL)}.",
)
@click.option("--ready-fd", type=int, hidden=True)
@settings_options(ClientSettings, only=SESSION)
def mount(
    places: tuple[str, ...],
    size: str | None,
    local: bool,
    read_only: bool,
    allow_other: bool,
    foreground: bool,
    cache: str,
    log: Path | None,
    flags: str,
    ready_fd: int | None,
    **given: Any,
) -> None:
    """Show the files of STORE in FOLDER, as a file system.

    Any number of mounts, on any nodes, share the files of a store. What a program wrote and closed, all of them see
    when they open it. Needs no root, but `fusermount3` (package fuse3).

    \b
    Examples:
        memfaas mount scratch /mnt/scratch --size 64GiB
        memfaas mount --local ~/remote
        memfaas umount /mnt/scratch
    """
    if len(places) == 1 and local:
        places = ("local", *places)
    if len(places) != 2:
        raise click.UsageError("say which STORE (or --local), and on which FOLDER")
    chosen = tuple(filter(None, flags.split(",")))
    for flag in chosen:
        if flag not in KERNEL:
            raise UsageError(f"unknown flag {flag!r}; known are {', '.join(KERNEL)}")
    settings = load(ClientSettings, given)
    folder = Path(os.path.abspath(places[1]))
    kept_size = None if size is None else parse_size(size)
    kept_s = parse_duration(cache)
    ready: Callable[[], None]
    if ready_fd is not None:
        ready = functools.partial(say_ready, ready_fd)
    elif foreground:
        ready = _go_on
    else:
        ready = detach(_default_log(folder) if log is None else log)
    try:
        from memfaas.fuse.mount import MountOptions, serve
    except ImportError as error:
        raise UsageError(f"mounting needs pyfuse3 and libfuse, and {error}") from error

    options = MountOptions(
        store=places[0],
        folder=folder,
        size=kept_size,
        read_only=read_only,
        allow_other=allow_other,
        cache_s=kept_s,
        local=local,
        flags=chosen,
    )
    serve(options, settings, ready)


def _go_on() -> None:
    """Nobody waits."""


def _default_log(folder: Path) -> Path:
    """Of a mount in the background: named after where it is, so that it can be found."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    place = Path(base).expanduser() / "memfaas"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = "-".join(folder.parts[1:]) or "root"
    return place / f"mount-{name[-_LONGEST_NAME:]}.log"


@click.command()
@click.argument("folder", type=Path)  # click's own looks whether it is there, and hangs as what is mounted may
@click.option("--lazy", is_flag=True, help="Also while files are open: it is gone when the last one is closed.")
def umount(folder: Path, lazy: bool) -> None:
    """Unmount FOLDER, and wait until everything that was written is in the store.

    \b
    Example:
        memfaas umount /mnt/scratch
    """
    if not mounts.is_mounted(folder):
        raise UsageError(f"{folder} is no mount of memfaas")
    # Its process is not asked when that may hang.
    pid = None if lazy else mounts.pid_of(folder)
    try:
        process = None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        process = None
    mounts.unmount(folder, lazy)
    if process is not None and not select.select([process], [], [], _END_S)[0]:
        raise DeadlineExceeded(
            f"{folder} is unmounted, but process {pid} has not ended within {_END_S:.0f} s: it may still have to write"
        )
