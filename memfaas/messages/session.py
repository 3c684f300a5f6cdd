"""A client and the broker: its session, and the stores and regions that it uses."""

from __future__ import annotations

from memfaas.messages.leases import Compression, LeaseSpec, OnReclaim, Place, StoreSpec
from memfaas.messages.wire import Message


class SessionOpened(Message, frozen=True, kw_only=True):
    session: bytes
    ttl: float
    """Seconds that the session's leases outlive its last renewal."""


class OpenSession(Message, frozen=True, kw_only=True):
    """First request of a client. After a broken connection it names what the session holds."""

    session: bytes
    """16 random bytes, chosen by the client, the same after a reconnect."""
    stores: list[bytes] = []
    leases: list[bytes] = []


class CloseSession(Message, frozen=True, kw_only=True):
    pass


class Renewed(Message, frozen=True, kw_only=True):
    ttl: float
    gone: list[bytes]
    """Leases of this session that no longer exist."""


class Renew(Message, frozen=True, kw_only=True):
    """Renews all leases of the session at once."""

    fabrics: dict[str, int]
    """Open links by fabric, for the status display."""


class StoreOpened(Message, frozen=True, kw_only=True):
    spec: StoreSpec
    created: bool
    places: list[Place]
    """One per shard, in shard order."""


class OpenStore(Message, frozen=True, kw_only=True):
    """Opens a store; creates it when `size` is given and there is none of that name."""

    name: str
    size: int | None
    persistent: bool = False
    compression: Compression = "none"
    on_reclaim: OnReclaim = "migrate"


class CloseStore(Message, frozen=True, kw_only=True):
    """This session no longer uses the store; the last one to say so frees it (unless persistent)."""

    store: bytes


class DeleteStore(Message, frozen=True, kw_only=True):
    name: str


class RegionGranted(Message, frozen=True, kw_only=True):
    place: Place


class OpenRegion(Message, frozen=True, kw_only=True):
    size: int


class ReleaseLease(Message, frozen=True, kw_only=True):
    lease: bytes


class Located(Message, frozen=True, kw_only=True):
    place: Place


class Locate(Message, frozen=True, kw_only=True):
    """Where is this lease now? Also how a session gets a fresh ticket. LeaseLost when it is gone."""

    lease: bytes


class LeaseGone(Message, frozen=True, kw_only=True):
    """Notice, broker to session and donor to broker: this lease's memory is gone."""

    lease: bytes
    reason: str
    dropped: int | None = None
    """Keys that went with it, when that is what its store asked for (`on_reclaim="drop"`)."""
    moved_to: str = ""
    """Donor that has all of it now; this one told it so, or heard so from the broker."""
    spec: LeaseSpec | None = None
    """What it was, when it was served here to the end, so that it can be nowhere else: also a broker that does not
    know it then knows that it is over. None when it was only to come here, or when this was an older copy."""


class LeaseMoved(Message, frozen=True, kw_only=True):
    """Notice, broker to session: this lease is served elsewhere now."""

    place: Place
