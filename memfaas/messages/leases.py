"""What the messages speak of: leases, the stores that they are of, and where they are."""

from __future__ import annotations

from typing import Literal

from memfaas.messages.wire import Struct

Kind = Literal["shard", "region"]
OnReclaim = Literal["migrate", "drop"]
Compression = Literal["none", "lz4"]


def short(identity: bytes) -> str:
    """How a lease, a store or a session is called in what people read."""
    return identity.hex()[:8]


class StoreSpec(Struct, frozen=True, kw_only=True):
    """What a store is, on whichever donors its shards lie."""

    store: bytes
    """16-byte identity."""
    name: str
    tenant: str
    size: int
    """Bytes of heap in all shards together."""
    shards: int
    shard_size: int
    """Bytes of heap in each shard."""
    persistent: bool
    compression: Compression
    on_reclaim: OnReclaim


class LeaseSpec(Struct, frozen=True, kw_only=True):
    """What a lease is; its donor and its memory function keep it, so that a new broker can ask."""

    lease: bytes
    """16-byte identity."""
    tenant: str
    kind: Kind
    size: int
    """Usable bytes: heap of a shard, or bytes of a region."""
    epoch: int
    store: StoreSpec | None = None
    shard: int = 0
    """Which shard of `store`."""
    session: bytes = b""
    """Session that holds a region lease (a store's sessions register with the store)."""
    priority: int = 0
    """Of its tenant: leases of lower priority are moved first."""
    borrowed: bool = False
    """Granted beyond its tenant's quota: moved before all that are within."""


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where a memory function is reached."""

    node: str
    """Boot id of the donor's kernel: equal to the client's own on the same node."""
    unix_path: str
    host: str
    port: int
    verbs: str = ""
    """The donor's RDMA device; empty: it has none."""


class Place(Struct, frozen=True, kw_only=True):
    """All that a client needs to open a link to one lease."""

    lease: bytes
    donor: str
    epoch: int
    kind: Kind
    size: int
    endpoint: Endpoint
    ticket: bytes
    """Encoded `memfaas.auth.Ticket`."""
    proof_key: bytes
    """What the holder of the ticket proves that it knows; never sent to the function."""


class Memory(Struct, frozen=True, kw_only=True):
    """A donor's memory, in bytes."""

    offered: int
    """What the donor lends at most."""
    leased: int
    populated: int
    """Part of `leased` that is backed by pages."""
    available: int
    """What its node could give to new programs now (MemAvailable, or the cgroup's limit)."""
    headroom: int
    """What it never lends."""


class HeldLease(Struct, frozen=True, kw_only=True):
    spec: LeaseSpec
    endpoint: Endpoint
