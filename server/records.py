"""What the broker keeps of each donor, lease, store and session, and what it then has to say."""

from __future__ import annotations

import enum
import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from memfaas.messages import Endpoint, LeaseSpec, Memory, StoreSpec

DONOR_GRACE_S = 300.0
"""How long a donor may be away (its agent is killed, its node cut off) before its leases are lost: as long
as memory functions wait for a new agent (`ORPHAN_LIFE_S`), so that none is given up while it serves."""
MOVE_MARGIN_S = 5.0
"""How much longer than the donor that waits for a copy the broker waits for word of it."""
REMEMBER_S = 86_400.0
"""How long the leases that are over are remembered for a donor that does not come back."""
NOWHERE = Endpoint(node="", unix_path="", host="", port=0)
"""Endpoint of a shard that no donor holds now."""


class State(enum.Enum):
    GRANTING = "being granted"
    HELD = "held by its donor"
    MISSING = "not seen since the broker started, or on its way to another donor"
    LOST = "lost with its donor"
    DROPPED = "dropped by its donor, as its store asked for; or lost, which comes to the same for a cache"


@dataclass
class Move:
    """On its way to another donor, under a new epoch. Several at once are told apart by their identity."""

    donor: str
    epoch: int
    timeout: float
    """Seconds that the donor waits for the copy."""
    until: float
    """When it is not waited for any longer."""
    ready: bool = False
    """The donor has made its memory."""


@dataclass
class Lease:
    spec: LeaseSpec
    """Its epoch is that of the newest copy that is known."""
    cost: int
    """Bytes that it takes on its donor."""
    donor: str
    """Empty while MISSING or DROPPED."""
    state: State
    last: str = ""
    """Donor that had it last, or has it."""
    loss: str = ""
    """Why it is LOST, and where it was."""
    endpoint: Endpoint = NOWHERE
    links: dict[str, int] = field(default_factory=dict)
    until: float = math.inf
    """When a region that its session does not claim is freed, or a MISSING shard counts as lost."""
    issued: int = 0
    """The newest epoch that the broker has given to a copy of it, in this life."""
    moving: Move | None = None


@dataclass
class Donor:
    name: str
    node: str
    host: str
    memory: Memory
    connected: bool = True
    away_since: float = math.inf
    lost_at: float = math.inf
    leases: set[bytes] = field(default_factory=set)
    over: dict[bytes, tuple[int, float]] = field(default_factory=dict)
    """Leases that it must free: their cost, and until when they are remembered."""
    left: set[bytes] = field(default_factory=set)
    """Those among them that moved to another donor: it frees them without being told."""
    arriving: set[bytes] = field(default_factory=set)
    """Leases that are moving here."""
    spill: bool = False
    device: str = ""
    reclaimed: dict[str, int] = field(default_factory=dict)
    """Bytes, by who took them back."""


@dataclass
class Store:
    spec: StoreSpec
    leases: list[bytes]
    """By shard."""
    sessions: set[bytes] = field(default_factory=set)
    until: float = math.inf
    """When a store that no session claims is freed."""
    kept_until: float = -math.inf
    """Until then sessions that used it before the broker's restart may still come back."""
    dropped: int = 0
    """Keys that went with its DROPPED shards."""


@dataclass
class Session:
    session: bytes
    tenant: str
    expires: float
    connected: bool = True
    stores: set[bytes] = field(default_factory=set)
    regions: set[bytes] = field(default_factory=set)
    claimed_stores: set[bytes] = field(default_factory=set)
    claimed_regions: set[bytes] = field(default_factory=set)
    """What it says it holds, but no donor has shown yet since the broker started."""
    gone: list[bytes] = field(default_factory=list)
    """Leases that ended, for its next renewal to tell."""
    fabrics: dict[str, int] = field(default_factory=dict)


class ToFree(NamedTuple):
    donor: str
    lease: bytes
    reason: str


class ToTell(NamedTuple):
    session: bytes
    lease: bytes
    reason: str
    dropped: int | None = None


class ToDirect(NamedTuple):
    session: bytes
    lease: bytes


@dataclass
class Outcome:
    """What has to be said: to donors (free this lease) and to sessions (this lease is gone, or elsewhere)."""

    free: list[ToFree] = field(default_factory=list)
    tell: list[ToTell] = field(default_factory=list)
    moved: list[ToDirect] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        self.free += other.free
        self.tell += other.tell
        self.moved += other.moved
        return self


class Room(NamedTuple):
    donor: str
    free: int
    spill: bool = False
    arriving: int = 0
    """Bytes that are on their way there."""
    offered: int = 0


def shard_lease(store: bytes, shard: int) -> bytes:
    """Identity of a shard's lease; computed, so that a missing shard's is known too."""
    return hashlib.blake2b(store + shard.to_bytes(4, "big"), digest_size=16).digest()
