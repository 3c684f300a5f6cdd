"""How a lease moves from donor to donor (docs/architecture.md): both of them and the broker."""

from __future__ import annotations

from memfaas.messages.leases import HeldLease, LeaseSpec, Place
from memfaas.messages.wire import Message


class Target(Message, frozen=True, kw_only=True):
    """Where to copy a lease to. The place's ticket opens the new function to its sender alone."""

    place: Place
    spill: bool


class Relocate(Message, frozen=True, kw_only=True):
    """Donor to broker: find another donor for this lease, and have it ready to receive.

    CapacityError when none has room.
    """

    lease: bytes
    epoch: int
    """Of the lease here; it is the next one there."""
    timeout: float
    """Seconds from now by which it must have moved."""
    avoid: list[str] = []
    """Donors that were tried already."""


class Receive(Message, frozen=True, kw_only=True):
    """Broker to donor: make memory for a lease that another donor is about to send."""

    spec: LeaseSpec
    timeout: float


class Arrived(Message, frozen=True, kw_only=True):
    """Notice, donor to broker: all of a lease is here, and served."""

    held: HeldLease


class Settled(Message, frozen=True, kw_only=True):
    moved: bool
    epoch: int
    """When it did not move: the epoch to go on with, newer than the one that the target may still hold."""


class Settle(Message, frozen=True, kw_only=True):
    """Donor to broker: I sent all of this lease and heard no more. Is it served there?

    LeaseLost when nobody can tell any more.
    """

    lease: bytes
    epoch: int
    """Of the copy."""
    donor: str
    """The one it was sent to."""


class MoveAway(Message, frozen=True, kw_only=True):
    """Broker to a spill donor: there is room in memory again, so bring this lease home."""

    lease: bytes
