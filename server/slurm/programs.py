"""Slurm's own programs, and what they print."""

from __future__ import annotations

import os

import trio

from memfaas.errors import TransportError

_OF_SLURM = ("SLURM_", "SQUEUE_", "SCONTROL_")
_KEPT = ("SLURM_CONF", "SLURM_JWT")
"""Where Slurm is, and what lets us in."""


async def run(*command: str) -> str:
    """What one of them prints. Raises TransportError.

    It sees nothing of the variables by which people choose what Slurm shows them: with `SQUEUE_USERS`,
    other people's jobs would look as if they had ended.
    """
    environment = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_OF_SLURM)}
    try:
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=environment)
    except OSError as error:
        raise TransportError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise TransportError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")
