"""What mount(8) and /etc/fstab say, in the words of `memfaas mount`."""

from __future__ import annotations

import sys

import click

from memfaas.cli.options import SESSION
from memfaas.errors import UsageError

_OURS = {"ro": "--read-only", "allow_other": "--allow-other", "local": "--local"}
_OURS_WITH_VALUE = ("size", "cache", "log", *SESSION)
KERNEL = ("suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "atime", "noatime")
"""Flags that the kernel obeys, whatever the file system."""
_OF_MOUNT_8 = ("defaults", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group")
_OF_SYSTEMD = ("nofail", "_netdev", "comment")
_READING_CHANGES_NO_TIMES = ("nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime", "lazytime")
_NOTHING_TO_DO = frozenset((*_OF_MOUNT_8, *_OF_SYSTEMD, *_READING_CHANGES_NO_TIMES))
_REFUSED, _NOT_MOUNTED = 1, 32
"""Exit statuses of mount(8)."""


def arguments_of(options: str, sloppy: bool = False) -> tuple[list[str], list[str]]:
    """The arguments of `memfaas`, and of its `mount`, for options like "ro,size=1GiB,broker=node1,noexec".

    sloppy: what is unknown is left out. Raises UsageError, which names the option.
    """
    general: list[str] = []
    own: list[str] = []
    flags: list[str] = []
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if name in _OURS and not equals:
            own.append(_OURS[name])
        elif name in _OURS_WITH_VALUE and equals:
            own += [f"--{name.replace('_', '-')}", value]
        elif name == "config" and equals:
            general += ["--config", value]
        elif name in KERNEL and not equals:
            flags.append(name)
        elif name not in _NOTHING_TO_DO and not name.startswith(("x-", "X-")) and not sloppy:
            raise UsageError(f"unknown mount option {option!r}")
    return general, [*own, "-o", ",".join(flags)] if flags else own


@click.command()
@click.argument("store")
@click.argument("folder")
@click.option("-o", "options", multiple=True)
@click.option("-s", "sloppy", is_flag=True)
@click.option("-f", "fake", is_flag=True)
@click.option("-v", "verbose", is_flag=True)
@click.option("-n", "_no_table", is_flag=True)
@click.option("-t", "_type")
@click.option("-N", "namespace")
@click.pass_context
def _helper(
    ctx: click.Context,
    /,
    store: str,
    folder: str,
    options: tuple[str, ...],
    sloppy: bool,
    fake: bool,
    verbose: bool,
    _no_table: bool,
    _type: str | None,
    namespace: str | None,
) -> None:
    from memfaas.cli import main

    try:
        if namespace is not None:
            raise UsageError("it cannot mount in another namespace")
        general, own = arguments_of(",".join(options), sloppy)
    except UsageError as error:
        click.echo(f"mount.fuse.memfaas: {error}", err=True)
        ctx.exit(_REFUSED)
    if fake:
        return
    try:
        main([*general, *(["-v"] if verbose else []), "mount", *own, "--", store, folder], prog_name="memfaas")
    except SystemExit as end:
        ctx.exit(_NOT_MOUNTED if end.code else 0)


def mount_helper() -> None:
    """The program `mount.fuse.memfaas`: mount(8) calls it, when it is in /sbin, for file systems of that type."""
    try:
        _helper(sys.argv[1:], prog_name="mount.fuse.memfaas")
    except SystemExit as end:
        sys.exit(_REFUSED if end.code == click.UsageError.exit_code else end.code)
