"""`memfaas mount` and `umount`: the files of a store as a folder."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from memfaas.cli.options import SESSION, load, settings_options
from memfaas.config import ClientSettings
from memfaas.errors import UsageError
from memfaas.units import parse_duration, parse_size

_READY = b"ready\n"
_UNMOUNT_S = 30.0


_FLAGS = {"ro": "--read-only", "allow_other": "--allow-other", "local": "--local"}
_VALUES = ("size", "cache", "log", *SESSION)


def from_fstab(args: list[str]) -> list[str]:
    """The arguments of `memfaas mount` for those of mount(8): STORE FOLDER -o ro,size=1GiB,broker=node1,..."""
    places, options = [], []
    rest = iter(args)
    for arg in rest:
        if arg == "-o":
            options += next(rest, "").split(",")
        else:
            places.append(arg)
    known = []
    for option in options:
        name, _, value = option.partition("=")
        if name in _FLAGS:
            known.append(_FLAGS[name])
        elif name in _VALUES:
            known += [f"--{name.replace('_', '-')}", value]  # all others are the kernel's, or defaults
    return [*places, *known]


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
@click.option("--log", metavar="FILE", help="Where to log, when it does not stay in the foreground.")
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
    log: str | None,
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
        mount -t fuse.memfaas scratch /mnt/scratch -o broker=node1,allow_other
        memfaas umount /mnt/scratch
    """
    if len(places) == 1 and local:
        places = ("local", *places)
    if len(places) != 2:
        raise click.UsageError("say which STORE (or --local), and on which FOLDER")
    if not foreground and ready_fd is None:
        _in_background(log)
        return
    from memfaas.fuse.mount import MountOptions, serve

    options = MountOptions(
        store=places[0],
        folder=Path(places[1]),
        size=None if size is None else parse_size(size),
        read_only=read_only,
        allow_other=allow_other,
        cache_s=parse_duration(cache),
        local=local,
    )
    serve(options, load(ClientSettings, given), lambda: _say_ready(ready_fd))


def _say_ready(ready_fd: int | None) -> None:
    if ready_fd is not None:
        os.write(ready_fd, _READY)
        os.close(ready_fd)


def _in_background(log: str | None) -> None:
    """Runs the same command as a process of its own, and waits until it is mounted, or says why not."""
    reader, writer = os.pipe()
    with open(log or os.devnull, "ab") as target:
        process = subprocess.Popen(
            [sys.executable, "-m", "memfaas.cli", *sys.argv[1:], "--ready-fd", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=subprocess.PIPE if log is None else target,
            pass_fds=(writer,),
            start_new_session=True,
        )
    os.close(writer)
    with open(reader, "rb") as ready:
        if ready.readline() == _READY:
            return
    said = process.stderr.read().decode(errors="replace").strip() if process.stderr else f"see {log}"
    status = process.wait()
    click.echo(said, err=True)
    click.get_current_context().exit(status or 1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Also while files are open: it is gone when the last one is closed.")
def umount(folder: Path, lazy: bool) -> None:
    """Unmount FOLDER, and wait until everything that was written is in the store.

    \b
    Example:
        memfaas umount /mnt/scratch
    """
    from memfaas.fuse.mount import pid_of

    pid = pid_of(folder)
    try:
        process = None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        process = None
    done = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(folder)], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UsageError(f"cannot unmount {folder}: {done.stderr.strip()}")
    if process is not None and not lazy:
        select.select([process], [], [], _UNMOUNT_S)
