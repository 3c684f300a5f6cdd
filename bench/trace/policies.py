"""What is tried side by side: a policy that stands for the defaults, and others that differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from memfaas.messages import OnReclaim
from memfaas.units import GIB


@dataclass(frozen=True)
class Policy:
    """How memory is lent and taken back. Sizes in bytes, times in seconds."""

    name: str
    on_reclaim: OnReclaim = "migrate"
    headroom: int = GIB
    """Of each node, never lent."""
    deadline: float = 10.0
    """For the memory of a job that begins; as `memfaas slurm install` has it."""
    settle: float = 0.0
    """After so long a donor lends again what a job had that has ended."""
    calm: float = 60.0
    """After so long it lends again what running jobs had touched and gave back."""
    activity_counts: int = 1
    """Of leases that would do as well as each other, the least active ones leave first; -1: the most active, 0: any."""
    moves_at_once: int = 4
    """Of one reclaim."""
    landing: float = 0.05
    """Share of what donors offer that is kept for leases that must leave others."""
    spill: float = 0.0
    """Spill donors' space, as a share of all memory."""
    link: float = 10.0 * GIB
    """Bytes per second that a node sends, and receives."""
    free_rate: float = 100.0 * GIB
    """Bytes per second that a kernel takes back: pages of 2 MiB, or of 4 KiB."""
    store: int = 128 * GIB
    """Of each store; it has up to 64 shards."""
    demand: float = 0.8
    """Stores that are wanted, as a share of the memory that is free on average."""


DEFAULT = Policy("default")


def variants() -> list[Policy]:
    """The default first."""
    return [
        DEFAULT,
        replace(DEFAULT, name="drop", on_reclaim="drop"),
        replace(DEFAULT, name="spill 2%", spill=0.02),
        replace(DEFAULT, name="no landing", landing=0.0),
        replace(DEFAULT, name="landing 10%", landing=0.1),
        replace(DEFAULT, name="headroom 4 GiB", headroom=4 * GIB),
        replace(DEFAULT, name="headroom 16 GiB", headroom=16 * GIB),
        replace(DEFAULT, name="settle 5 min", settle=300.0),
        replace(DEFAULT, name="calm 10 s", calm=10.0),
        replace(DEFAULT, name="calm 10 min", calm=600.0),
        replace(DEFAULT, name="deadline 250 ms", deadline=0.25),
        replace(DEFAULT, name="deadline 1 s", deadline=1.0),
        replace(DEFAULT, name="1 s, 1 move", deadline=1.0, moves_at_once=1),
        replace(DEFAULT, name="deadline 3 s", deadline=3.0),
        replace(DEFAULT, name="most active leave", activity_counts=-1),
        replace(DEFAULT, name="any leave", activity_counts=0),
        replace(DEFAULT, name="1 move at once", moves_at_once=1),
        replace(DEFAULT, name="16 moves at once", moves_at_once=16),
        replace(DEFAULT, name="4 KiB pages", free_rate=4.0 * GIB),
        replace(DEFAULT, name="1 GiB/s link", link=1.0 * GIB),
        replace(DEFAULT, name="stores of 512 GiB", store=512 * GIB),
        replace(DEFAULT, name="demand 60%", demand=0.6),
        replace(DEFAULT, name="demand 100%", demand=1.0),
        replace(DEFAULT, name="100%, no landing", demand=1.0, landing=0.0),
        replace(DEFAULT, name="100%, spill 2%", demand=1.0, spill=0.02),
    ]
