"""Slurm's nodes next to memfaas's donors: who could lend, and what is lent, where Slurm shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from memfaas import auth
from memfaas.addresses import Address
from memfaas.errors import MemfaasError
from memfaas.messages import Done, DonorInfo, Lend, Status, StatusReport
from memfaas.server.slurm import ask, jobs, programs
from memfaas.units import MIB, format_size

_ANSWER_S = 10.0
_MARK = "memfaas "
"""How a comment begins that we wrote."""
_KEY = "memfaas"
"""Under which our part of a node's `extra` stands, which is a JSON object."""
_FIELD = re.compile(r"(?:^| )(\w+)=(.*?)(?= \w+=|\s*$)")


@dataclass(frozen=True)
class Node:
    """A node as Slurm sees it."""

    name: str
    state: str
    """Such as IDLE, MIXED or IDLE+DRAIN."""
    memory: int
    """Bytes that jobs may use in all."""
    allocated: int
    """Bytes that jobs use, as far as Slurm counts memory."""
    comment: str
    extra: str

    @property
    def idle(self) -> bool:
        """No job runs there, and one could."""
        return self.state in ("IDLE", "IDLE+CLOUD", "IDLE+DYNAMIC_NORM")


def parse_nodes(text: str) -> list[Node]:
    """Reads what `scontrol --oneliner show node` printed."""
    found = []
    for line in text.split("\n"):
        fields = dict(_FIELD.findall(line))
        if "NodeName" in fields:
            found.append(
                Node(
                    name=fields["NodeName"],
                    state=fields.get("State", "UNKNOWN"),
                    memory=int(fields.get("RealMemory", 0)) * MIB,
                    allocated=int(fields.get("AllocMem", 0)) * MIB,
                    comment=fields.get("Comment", ""),
                    extra=fields.get("Extra", ""),
                )
            )
    return found


@dataclass(frozen=True)
class Scan:
    nodes: list[Node]
    donors: dict[str, DonorInfo]
    """Those that are connected, by name, which is the node's."""
    ended: list[tuple[str, str]]
    """Donor and holder: memory that is still taken back for a job that Slurm no longer knows."""

    @property
    def willing(self) -> list[Node]:
        """Idle nodes on which no donor runs."""
        return [node for node in self.nodes if node.idle and node.name not in self.donors]


async def scan(address: Address, credentials: auth.Credentials) -> Scan:
    """Asks Slurm and the broker. `credentials` are the operator's. Raises MemfaasError."""
    async with ask.broker(address, credentials) as channel:
        report = await channel.request(Status(), StatusReport, _ANSWER_S)
    nodes = parse_nodes(await programs.run("scontrol", "--oneliner", "show", "node"))
    # After the donors were asked: a job that has begun since is not taken for one that has ended.
    running = set((await programs.run("squeue", "--all", "--noheader", "--format=%A")).split())
    donors = {one.donor: one for one in report.donors if one.connected}
    held = [
        (node.name, holder, job)
        for node in nodes
        if node.name in donors
        for holder in donors[node.name].reclaimed
        if (job := jobs.job_of(holder)) is not None and job not in running
    ]
    # What a running job holds must not be lent: that it was not in a list is not enough.
    over = {job: await jobs.has_ended(job) for job in {job for _, _, job in held}}
    return Scan(nodes, donors, [(donor, holder) for donor, holder, job in held if over[job]])


async def lend_again(address: Address, credentials: auth.Credentials, ended: Iterable[tuple[str, str]]) -> None:
    """For jobs whose epilogs reached neither the broker nor the donor. Raises MemfaasError."""
    async with ask.broker(address, credentials) as channel:
        for donor, holder in ended:
            await channel.request(Lend(donor=donor, holder=holder), Done, _ANSWER_S)


async def publish(found: Scan) -> dict[str, str]:
    """Writes what each node lends into its comment and its extra. Returns the nodes that Slurm did not change, and why.

    A comment of somebody else stays, and so does all of extra that is not ours.
    """
    failed = {}
    for node in found.nodes:
        donor = found.donors.get(node.name)
        changes = [
            f"{name}={new}"
            for name, old, new in (
                ("comment", node.comment, comment(node.comment, donor)),
                ("extra", node.extra, extra(node.extra, donor)),
            )
            if new != old
        ]
        if changes:
            try:
                await programs.run("scontrol", "update", f"nodename={node.name}", *changes)
            except MemfaasError as error:
                failed[node.name] = str(error)
    return failed


def comment(old: str, donor: DonorInfo | None) -> str:
    if old and not old.startswith(_MARK):
        return old
    if donor is None:
        return ""
    memory = donor.memory
    return f"{_MARK}lends {format_size(memory.offered)}, {format_size(memory.leased)} of it leased"


def extra(old: str, donor: DonorInfo | None) -> str:
    try:
        content = json.loads(old) if old else {}
    except ValueError:
        return old
    if not isinstance(content, dict):
        return old
    before = dict(content)
    content.pop(_KEY, None)
    if donor is not None:
        content[_KEY] = {
            "lent_mib": donor.memory.offered // MIB,
            "leased_mib": donor.memory.leased // MIB,
            "reclaimed_mib": sum(donor.reclaimed.values()) // MIB,
        }
    if content == before:
        return old
    return json.dumps(content, separators=(",", ":")) if content else ""
