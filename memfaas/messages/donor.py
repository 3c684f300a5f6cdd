"""A donor and the broker: what the donor has, and the leases that it is to serve."""

from __future__ import annotations

from memfaas.messages.leases import Endpoint, HeldLease, LeaseSpec, Memory
from memfaas.messages.wire import Message


class Registered(Message, frozen=True, kw_only=True):
    drop: list[bytes]
    """Leases that the broker knows to be over: free them."""


class Register(Message, frozen=True, kw_only=True):
    """First request of a donor, after every connect."""

    donor: str
    node: str
    host: str
    memory: Memory
    held: list[HeldLease]
    arriving: list[bytes] = []
    """Leases that it still waits for, or receives."""
    spill: bool = False
    """It lends a file in local scratch: chosen last, left first."""
    device: str = ""
    """Its RDMA device, NAME:PORT:GID; empty: it has none that works."""


class DonorReport(Message, frozen=True, kw_only=True):
    """Notice, donor to broker, now and then."""

    memory: Memory
    links: dict[bytes, dict[str, int]]
    """Lease to open links by fabric."""
    populated: dict[bytes, int] = {}
    """Lease to bytes that are backed by pages."""
    reclaimed: dict[str, int] = {}
    """Holder to bytes, as in `Reclaim`."""


class Granted(Message, frozen=True, kw_only=True):
    endpoint: Endpoint
    memory: Memory


class Grant(Message, frozen=True, kw_only=True):
    """Broker to donor: serve this lease. CapacityError when its memory would cut into the headroom."""

    spec: LeaseSpec


class Freed(Message, frozen=True, kw_only=True):
    memory: Memory


class Free(Message, frozen=True, kw_only=True):
    """Broker to donor: the lease is over, give its memory back now."""

    lease: bytes
    reason: str
