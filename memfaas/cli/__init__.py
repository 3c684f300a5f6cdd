"""The command `memfaas`. Each command's module is imported only when the command is used.

A MemfaasError ends the program with its exit status and one line on the standard error.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Any

import click

import memfaas
from memfaas.errors import MemfaasError

_COMMANDS = {
    "up": "memfaas.cli.serve:up",
    "broker": "memfaas.cli.serve:broker",
    "donor": "memfaas.cli.serve:donor",
    "tenant": "memfaas.cli.serve:tenant",
    "status": "memfaas.cli.status:status",
    "usage": "memfaas.cli.usage:usage",
    "put": "memfaas.cli.data:put",
    "get": "memfaas.cli.data:get",
    "ls": "memfaas.cli.data:ls",
    "rm": "memfaas.cli.data:rm",
    "mount": "memfaas.cli.mount:mount",
    "umount": "memfaas.cli.mount:umount",
    "fs": "memfaas.cli.files:fs",
    "demo": "memfaas.cli.demo:demo",
    "reclaim": "memfaas.cli.reclaim:reclaim",
    "lend": "memfaas.cli.reclaim:lend",
    "slurm": "memfaas.cli.slurm:slurm",
    "doctor": "memfaas.cli.check:doctor",
    "bench": "memfaas.bench.cli:bench",
}
_INTERRUPTED = 130


class _Commands(click.Group):
    """Knows its commands by name, and imports the one that is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MemfaasError as error:
            click.echo(f"memfaas: {error}", err=True)
            ctx.exit(error.exit_status)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has enough. Python would complain once more at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:  # of a file that the user named, or a full disk
            what = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"memfaas: {what}{error.strerror or error}", err=True)
            ctx.exit(1)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option of a command can also stand in the environment or in a settings file "
    "(~/.config/memfaas/memfaas.toml, or what MEMFAAS_CONFIG names); a flag wins over the environment, "
    "and that over the file. See `memfaas COMMAND --help`.",
)
@click.option("--config", metavar="FILE", help="Settings file (TOML) to use.")
@click.option("-v", "--verbose", count=True, help="Log what happens to the standard error; twice: in detail.")
@click.version_option(message="%(version)s", version=memfaas.__version__)
@click.pass_context
def main(ctx: click.Context, config: str | None, verbose: int) -> None:
    """Idle memory of cluster nodes, lent as a key-value store and as remote memory.

    \b
    Try it on this machine:
        memfaas up                            (stays in the foreground)
    and in another shell:
        echo hello | memfaas put greeting
        memfaas get greeting
        memfaas status
    """
    ctx.obj = config
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)],
        format="%(asctime)s %(name)s: %(message)s" if verbose else "memfaas: %(message)s",
    )
