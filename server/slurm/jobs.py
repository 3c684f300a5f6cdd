"""What Slurm says of a job: how much memory it may use on each of its nodes, and whether it has ended.

Whoever submits a job writes some of what Slurm shows of it, such as its name and its comment, with line
breaks too. So all that can be is read from fields in which no such text stands.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator

from memfaas.errors import ProtocolError, TransportError
from memfaas.server.slurm import hosts, programs
from memfaas.units import KIB, MIB

WHOLE_NODE = 1 << 50
"""Bytes: more than any node has. What a job may use where Slurm does not divide the memory."""

_ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
_UNKNOWN = "Invalid job id specified"
_TOTAL = re.compile(r"(?:^|,)mem=([0-9.]{1,20})([KMGTP]?)(?:,|$)")
_GROUP = re.compile(r" {5}Nodes=(\S+) CPU_IDs=\S* Mem=([0-9]{1,15})([KMGTP]?) ")
_UNITS = {"K": KIB, "": MIB, "M": MIB, "G": MIB << 10, "T": MIB << 20, "P": MIB << 30}
_ROUNDING = 0.01
"""Slurm may write a large total with two decimals."""

logger = logging.getLogger(__name__)


def holder_of(job: str) -> str:
    """Under which name memory is taken back for a job."""
    return f"slurm job {job}"


def job_of(holder: str) -> str | None:
    """The reverse of `holder_of`; None for a holder that is no job."""
    found = re.fullmatch(r"slurm job ([0-9]+)", holder)
    return found[1] if found else None


async def memory_of(job: str, nodes: list[str]) -> dict[str, int]:
    """Bytes that a job may use on each of its nodes. Raises ProtocolError, TransportError."""
    if not nodes:
        raise ProtocolError(f"Slurm names no node of job {job}")
    total = parse_total(job, await _show(job, "tres-alloc:2000"))
    if total is None:
        return dict.fromkeys(nodes, WHOLE_NODE)
    if len(nodes) == 1:
        return {nodes[0]: total}
    # No other field has how the total is divided, and this one stands amid what the user wrote.
    return divide(job, nodes, total, await programs.run("scontrol", "--details", "show", "job", job))


def parse_total(job: str, text: str) -> int | None:
    """Bytes on all nodes together; None where Slurm does not divide the memory.

    text: what squeue printed, a line for each job: its number and what it was given. Asked for the first of
    an array or of a heterogeneous job, it shows all of it. Raises ProtocolError.
    """
    given = dict(line.split(maxsplit=1) for line in text.split("\n") if len(line.split()) == 2)
    if job not in given:
        raise ProtocolError(f"Slurm does not show what job {job} was given")
    found = _TOTAL.search(given[job].strip())
    return math.ceil(float(found[1]) * _UNITS[found[2]]) if found else None


def divide(job: str, nodes: list[str], total: int, text: str) -> dict[str, int]:
    """Node to bytes, of `total` bytes in all.

    text: what `scontrol --details show job` printed. Only what names just these nodes, and comes to the
    total, is Slurm's word. If the user wrote such a thing too, a node gets the least that is said.
    """
    said = [one for one in _blocks(job, nodes, text) if abs(sum(one.values()) - total) <= total * _ROUNDING]
    if said:
        return {node: min(one[node] for one in said) for node in nodes}
    logger.warning("job %s: Slurm does not say how its memory is divided; each node frees as much", job)
    return dict.fromkeys(nodes, -(-total // len(nodes)))


def _blocks(job: str, nodes: list[str], text: str) -> Iterator[dict[str, int]]:
    """What groups of lines, one after the other, say of all these nodes."""
    shown = ""
    block: dict[str, int] = {}
    for line in text.split("\n"):
        group = _GROUP.match(line)
        if group is None:
            if block.keys() == set(nodes) and shown == job:
                yield block
            block = {}
            if record := re.match(r"JobId=([0-9]+) ", line):
                shown = record[1]
            continue
        try:
            names = hosts.expand(group[1], len(nodes))
        except ProtocolError:  # never Slurm's word of this job
            continue
        block.update(dict.fromkeys(names, int(group[2]) * _UNITS[group[3]]))


async def has_ended(job: str) -> bool:
    """Whether Slurm says so, or that it knows no such job. Raises TransportError."""
    try:
        shown = await _show(job, "State:20")
    except TransportError as error:
        if not str(error).endswith(_UNKNOWN):
            raise
        if await _sees_all_jobs():
            return True
        logger.warning("job %s: Slurm knows none, but it does not show other people's jobs to us", job)
        return False
    states = [line.split()[1] for line in shown.split("\n") if line.split()[:1] == [job]]
    return bool(states) and _ENDED.issuperset(states)


async def _show(job: str, field: str) -> str:
    return await programs.run(
        "squeue", "--all", "--states=all", "--noheader", f"--jobs={job}", f"--Format=JobID:20,{field}"
    )


async def _sees_all_jobs() -> bool:
    """Whether other people's jobs, too, are known to Slurm when we ask."""
    settings = await programs.run("scontrol", "show", "config")
    private = re.search(r"^PrivateData +=(.*)$", settings, re.MULTILINE)
    user = re.search(r"^SlurmUser +=.*\(([0-9]+)\)$", settings, re.MULTILINE)
    hidden = private is None or "jobs" in re.split(r"[ ,]+", private[1])
    return not hidden or os.geteuid() == 0 or (user is not None and os.geteuid() == int(user[1]))
