"""What Slurm says of a job: its nodes, and how much memory it may use on each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import trio

from memfaas.errors import ProtocolError, TransportError
from memfaas.units import KIB, MIB

WHOLE_NODE = 1 << 50
"""Bytes: more than any node has. What a job may use where Slurm does not divide the memory."""

_GROUP = re.compile(r"\bNodes=(\S+) CPU_IDs=\S* Mem=(\d+)([KMGTP]?)")
_UNITS = {"K": KIB, "": MIB, "M": MIB, "G": MIB << 10, "T": MIB << 20, "P": MIB << 30}
_BRACKETS = re.compile(r"\[([^\]]*)\]")


def holder_of(job: str) -> str:
    """Under which name memory is taken back for a job."""
    return f"slurm job {job}"


def job_of(holder: str) -> str | None:
    """The reverse of `holder_of`; None for a holder that is no job."""
    found = re.fullmatch(r"slurm job (\d+)", holder)
    return found[1] if found else None


@dataclass(frozen=True)
class Job:
    job: str
    memory: dict[str, int]
    """Node to bytes."""


def parse_job(job: str, text: str) -> Job:
    """Reads what `scontrol --details --oneliner show job` printed. Raises ProtocolError.

    Asked for the first of an array or of a heterogeneous job, Slurm shows all of it.
    """
    for line in text.splitlines():
        if not line.startswith(f"JobId={job} "):
            continue
        memory = {}
        for nodes, amount, unit in _GROUP.findall(line):
            size = int(amount) * _UNITS[unit] or WHOLE_NODE
            memory.update(dict.fromkeys(expand(nodes), size))
        if not memory:
            raise ProtocolError(f"Slurm names no node of job {job}")
        return Job(job, memory)
    raise ProtocolError(f"Slurm does not show job {job}")


def expand(nodes: str) -> list[str]:
    """The names in one of Slurm's lists of hosts, such as `rack[1-2]n[01-03,7],login`.

    Raises ProtocolError.
    """
    return [name for word in _words(nodes) for name in _expand_word(word)]


def _words(text: str) -> Iterator[str]:
    """What stands between commas that are not in brackets."""
    yield from re.findall(r"(?:\[[^\]]*\]|[^,])+", text)


def _expand_word(word: str) -> list[str]:
    parts = _BRACKETS.split(word)  # text and content of brackets by turns
    if any(set("[]") & set(part) for part in parts):
        raise ProtocolError(f"{word[:100]!r} is not a list of hosts")
    choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(text: str) -> list[str]:
    """`1-3,07` is 1, 2, 3, 07: a range is as wide as its first number."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ProtocolError(f"[{text[:100]}] is not a range in a list of hosts")
        width = len(first)
        found += [f"{number:0{width}}" for number in range(int(first), int(last if dash else first) + 1)]
    return found


async def ask(job: str) -> Job:
    """Asks Slurm. Raises ProtocolError, TransportError."""
    return parse_job(job, await run("scontrol", "--details", "--oneliner", "show", "job", job))


async def run(*command: str) -> str:
    """What one of Slurm's programs prints. Raises TransportError."""
    try:
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    except OSError as error:
        raise TransportError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise TransportError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")
