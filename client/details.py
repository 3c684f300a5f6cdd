"""What `Store.info` tells."""

from __future__ import annotations

from dataclasses import dataclass

from memfaas.client.compress import CompressionStats


@dataclass(frozen=True)
class ShardDetails:
    """One shard, as seen from this process. Sizes are in bytes."""

    donor: str
    fabric: str | None
    """`shm`, `verbs` or `tcp`; None when it is lost, out of reach, or dropped and not granted anew."""
    device: str | None
    """Over verbs: the RDMA device, port and address of this node that is used, as NAME:PORT:GID."""
    fallback: str | None
    """Why it is reached over tcp, although something faster should do: shm on this node, or verbs."""
    trouble: str | None
    """Why it is out of reach."""
    epoch: int
    """Grows each time the shard moves."""
    size: int
    used: int
    keys: int


@dataclass(frozen=True)
class StoreDetails:
    """A store, as seen from this process. Sizes are in bytes; shards out of reach count as empty."""

    name: str
    tenant: str
    size: int
    used: int
    keys: int
    persistent: bool
    dropped: int | None
    """Keys that went with shards whose donors needed the memory; None when the broker is away."""
    shards: list[ShardDetails]
    compression: CompressionStats | None
    """What compression did in this process; None for a store without it."""
