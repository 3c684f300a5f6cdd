"""An operator, or a tenant, and the broker: what there is, and who has used how much of it."""

from __future__ import annotations

from typing import Literal

from memfaas.messages.leases import Kind, Memory, StoreSpec
from memfaas.messages.wire import Message, Struct

LeaseState = Literal["granting", "held", "moving", "missing", "lost", "dropped"]


class DonorInfo(Struct, frozen=True, kw_only=True):
    donor: str
    node: str
    host: str
    connected: bool
    memory: Memory
    leases: int
    fabrics: list[str]
    device: str = ""
    """Its RDMA device, NAME:PORT:GID; empty: it has none that works."""
    spill: bool = False
    """Its memory is a file in local scratch."""
    reclaimed: dict[str, int] = {}
    """Bytes that it does not lend now, by who took them back."""


class LeaseInfo(Struct, frozen=True, kw_only=True):
    lease: bytes
    tenant: str
    kind: Kind
    size: int
    donor: str
    epoch: int
    store: str | None
    sessions: int
    expires_in: float | None
    """Seconds; None for a persistent store."""
    links: dict[str, int]
    """Open links by fabric, as the function last said."""
    state: LeaseState = "held"
    shard: int | None = None
    """Its number in the store; None for a region."""
    priority: int = 0
    """Of its tenant when it was granted: leases of lower priority are moved first."""
    borrowed: bool = False
    """Granted beyond its tenant's quota: moved before all that are within."""


class StoreInfo(Struct, frozen=True, kw_only=True):
    spec: StoreSpec
    sessions: int
    lost_shards: list[int]
    dropped: int = 0
    """Keys that went when donors needed their memory, since the broker started (`on_reclaim="drop"`)."""


class TenantInfo(Struct, frozen=True, kw_only=True):
    tenant: str
    leased: int
    """Bytes of donors' memory that its leases take."""
    borrowed: int
    """Part of `leased` that was granted beyond the quota."""
    quota: int | None
    """Bytes of donors' memory; None is no limit."""
    priority: int


class SessionInfo(Struct, frozen=True, kw_only=True):
    session: bytes
    tenant: str
    connected: bool
    leases: int
    fabrics: dict[str, int]


class StatusReport(Message, frozen=True, kw_only=True):
    uptime: float
    donors: list[DonorInfo]
    leases: list[LeaseInfo]
    stores: list[StoreInfo]
    sessions: list[SessionInfo]
    tenants: list[TenantInfo] = []
    """Those that lease something, or have a share of their own."""


class Status(Message, frozen=True, kw_only=True):
    """What the broker knows; a tenant sees its own leases, stores and sessions, the operator all."""


class Usage(Struct, frozen=True, kw_only=True):
    """Byte-seconds of one tenant's leases on one donor."""

    tenant: str
    donor: str
    leased: float
    populated: float
    """Part of `leased` that was backed by pages."""


class DonorUsage(Struct, frozen=True, kw_only=True):
    donor: str
    offered: float
    """Byte-seconds that it would have lent at most."""
    leased: float
    reclaims: int
    reclaimed: int
    """Bytes."""
    in_time: int
    """Reclaims that met their deadline."""


class UsageReport(Message, frozen=True, kw_only=True):
    since: float
    """Seconds since 1970 from when on it was counted."""
    now: float
    tenants: list[Usage]
    donors: list[DonorUsage]
    tenant: str | None = None
    """Whose part it is; None: everybody's."""


class AskUsage(Message, frozen=True, kw_only=True):
    """Who used how much of whose memory; a tenant sees its own part, the operator all."""
