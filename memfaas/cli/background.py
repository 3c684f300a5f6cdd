"""A command that goes on in the background, once it is ready."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

_READY = b"ready\n"


def say_ready(descriptor: int) -> None:
    """To who waits for it at the other end of a pipe."""
    os.write(descriptor, _READY)
    os.close(descriptor)


def detach(log: Path) -> Callable[[], None]:
    """Goes on in a process of its own, and returns what that has to call when it is ready.

    The process that called this waits until then, and ends with status 0; or with the status of the other, if that
    ends first. What the other says comes to our standard error until it is ready, and to the end of `log` afterwards.
    Nothing may have started a thread yet. Raises OSError when `log` cannot be written.
    """
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writer)
        os.close(target)
        click.get_current_context().exit(_wait(child, reader))
    os.close(reader)
    os.setsid()  # Ctrl-C and the end of the terminal are not for us

    def ready() -> None:
        os.chdir("/")  # keeps no other file system busy
        sys.stdout.flush()
        sys.stderr.flush()
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for descriptor, source in enumerate((nothing, target, target)):
            os.dup2(source, descriptor)
        os.close(nothing)
        os.close(target)
        say_ready(writer)

    return ready


def _wait(child: int, reader: int) -> int:
    try:
        with open(reader, "rb") as pipe:
            if pipe.readline() == _READY:
                return 0
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        click.echo(f"memfaas: ended by {signal.Signals(-status).name} before it was ready", err=True)
    return status if status > 0 else 1
