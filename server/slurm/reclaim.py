"""What the hooks do: take memory back for a job as it starts, and lend it again when it has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio

from memfaas import auth, local_agent
from memfaas.addresses import Address
from memfaas.errors import MemfaasError, UsageError
from memfaas.messages import Done, Lend, Message, Reclaim, Reclaimed
from memfaas.server.slurm import ask, jobs
from memfaas.units import format_duration, format_size

_AT_ONCE = 200
"""Requests under way on one connection."""
_GRACE_S = 1.0
"""How much longer than the deadline an answer may take: at the deadline the memory goes, then it is told."""
_LEND_S = 3.0

logger = logging.getLogger(__name__)


async def on_controller(
    address: Address, credentials: auth.Credentials, job: str, nodes: list[str], deadline_s: float
) -> None:
    """PrologSlurmctld: every donor among the job's nodes frees what the job may use there.

    Logs what came of it, and which donors did not do it. Raises MemfaasError when it came to nothing.
    """
    started = time.monotonic()
    memory = await jobs.memory_of(job, nodes)
    answers: dict[str, Reclaimed] = {}
    async with ask.broker(address, credentials) as channel:

        async def one(node: str) -> None:
            left_s = max(0.0, deadline_s - (time.monotonic() - started))
            answers[node] = await channel.request(_needs(node, memory[node], left_s, job), Reclaimed, left_s + _GRACE_S)

        donors = await _each(memory, one)
    took_s = time.monotonic() - started
    freed = sum(answer.freed for answer in answers.values())
    logger.info(
        "job %s: %d of its %d nodes are donors; %s freed within %s",
        job,
        donors,
        len(memory),
        format_size(freed),
        format_duration(took_s),
    )
    for node, answer in answers.items():
        _complain(job, node, answer)


async def on_node(socket: Path, node: str, job: str, nodes: list[str], deadline_s: float) -> None:
    """Prolog: the node's own donor frees the memory, if the broker has not told it to. Raises MemfaasError."""
    async with local_agent.connected(socket) as channel:
        # Nothing more is taken by this, but the answer says what was taken back for the job, once it is free.
        known = await channel.request(_needs(node, 0, deadline_s, job), Reclaimed, deadline_s + _GRACE_S)
        if known.held:
            logger.info("job %s: %s has set %s aside for it", job, node, format_size(known.held))
            return
        size = (await jobs.memory_of(job, nodes)).get(node, jobs.WHOLE_NODE)
        answer = await channel.request(_needs(node, size, deadline_s, job), Reclaimed, deadline_s + _GRACE_S)
    logger.warning(
        "job %s: %s had not heard of it from the broker, and freed %s itself within %s",
        job,
        node,
        format_size(answer.freed),
        format_duration(answer.seconds),
    )
    _complain(job, node, answer)


async def lend_on_controller(address: Address, credentials: auth.Credentials, job: str, nodes: Iterable[str]) -> None:
    """EpilogSlurmctld: the donors among the nodes lend again. Raises MemfaasError."""
    async with ask.broker(address, credentials) as channel:
        donors = await _each(nodes, lambda node: channel.request(_ended(node, job), Done, _LEND_S))
    logger.info("job %s: has ended; %d donors lend again", job, donors)


async def lend_on_node(socket: Path, node: str, job: str) -> None:
    """Epilog: the node's own donor does so, whatever became of the broker. Raises MemfaasError."""
    async with local_agent.connected(socket) as channel:
        await channel.request(_ended(node, job), Done, _LEND_S)


def _needs(node: str, size: int, deadline_s: float, job: str) -> Message:
    # In all: Slurm may start a job twice, and the hooks on the controller and on the node ask the same.
    return Reclaim(donor=node, size=size, deadline=deadline_s, holder=jobs.holder_of(job), in_all=True)


def _ended(node: str, job: str) -> Message:
    return Lend(donor=node, holder=jobs.holder_of(job))


async def _each(nodes: Iterable[str], request: Callable[[str], Awaitable[object]]) -> int:
    """For all nodes at the same time. Returns how many of them are donors; logs which failed, and why."""
    donors = 0
    limit = trio.CapacityLimiter(_AT_ONCE)

    async def one(node: str) -> None:
        nonlocal donors
        async with limit:
            try:
                await request(node)
            except UsageError:  # the broker knows no donor of that name
                return
            except MemfaasError as error:
                logger.warning("%s: %s", node, error)
            donors += 1

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(one, node)
    return donors


def _complain(job: str, node: str, answer: Reclaimed) -> None:
    if not answer.in_time:
        logger.warning(
            "job %s: %s freed only %s of %s in time",
            job,
            node,
            format_size(answer.freed),
            format_size(answer.asked),
        )
    lost = [step.what for step in answer.steps if step.how == "lost"]
    if lost:
        logger.warning("job %s: %s lost %s", job, node, ", ".join(lost))
