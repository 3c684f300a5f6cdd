"""The broker's tables as `memfaas status` shows them."""

from __future__ import annotations

from memfaas.messages import DonorInfo, LeaseInfo, LeaseState, SessionInfo, StatusReport, StoreInfo, TenantInfo
from memfaas.server.quotas import Quotas
from memfaas.server.records import Lease, State, Store
from memfaas.server.tables import Tables

FABRICS = ["shm", "tcp", "verbs"]
"""What memory functions of this version offer, verbs where there is an RDMA device."""


def report(tables: Tables, quotas: Quotas, tenant: str | None, now: float, uptime: float) -> StatusReport:
    """All donors, and what belongs to one tenant (or, for None, to anybody)."""
    return StatusReport(
        uptime=uptime,
        donors=[
            DonorInfo(
                donor=donor.name,
                node=donor.node,
                host=donor.host,
                connected=donor.connected,
                memory=donor.memory,
                leases=sum(tables.leases[one].state is State.HELD for one in donor.leases),
                fabrics=FABRICS if donor.device else [one for one in FABRICS if one != "verbs"],
                device=donor.device,
                spill=donor.spill,
                reclaimed=donor.reclaimed,
            )
            for donor in sorted(tables.donors.values(), key=lambda donor: donor.name)
        ],
        leases=[_lease(tables, lease, now) for lease in tables.leases.values() if tenant in (None, lease.spec.tenant)],
        stores=[
            StoreInfo(
                spec=store.spec,
                sessions=len(store.sessions),
                lost_shards=tables.lost_shards(store),
                dropped=store.dropped,
            )
            for store in tables.stores.values()
            if tenant in (None, store.spec.tenant)
        ],
        sessions=[
            SessionInfo(
                session=session.session,
                tenant=session.tenant,
                connected=session.connected,
                leases=len(session.regions) + sum(len(tables.stores[store].leases) for store in session.stores),
                fabrics=session.fabrics,
            )
            for session in tables.sessions.values()
            if tenant in (None, session.tenant)
        ],
        tenants=_tenants(tables, quotas) if tenant is None else [_tenant(tables, quotas, tenant)],
    )


def _tenants(tables: Tables, quotas: Quotas) -> list[TenantInfo]:
    names = {*quotas.tenants, *(lease.spec.tenant for lease in tables.leases.values())}
    return [_tenant(tables, quotas, name) for name in sorted(names)]


def _tenant(tables: Tables, quotas: Quotas, name: str) -> TenantInfo:
    share = quotas.share(name)
    borrowed = [lease for lease in tables.leases.values() if lease.spec.tenant == name and lease.spec.borrowed]
    return TenantInfo(
        tenant=name,
        leased=tables.accounts.leased(name),
        borrowed=sum(lease.cost for lease in borrowed if lease.state in (State.GRANTING, State.HELD)),
        quota=share.quota,
        priority=share.priority,
    )


def _lease(tables: Tables, lease: Lease, now: float) -> LeaseInfo:
    spec = lease.spec
    store = tables.stores[spec.store.store] if spec.store is not None else None
    expires = _expires(tables, lease, store)
    return LeaseInfo(
        lease=spec.lease,
        tenant=spec.tenant,
        kind=spec.kind,
        size=spec.size,
        donor=lease.donor,
        epoch=spec.epoch,
        store=None if store is None else store.spec.name,
        sessions=int(spec.session in tables.sessions) if store is None else len(store.sessions),
        expires_in=None if expires is None else max(0.0, expires - now),
        links=lease.links,
        state=_state(lease),
        shard=None if store is None else spec.shard,
        priority=spec.priority,
        borrowed=spec.borrowed,
    )


def _state(lease: Lease) -> LeaseState:
    if lease.moving is not None:
        return "moving"
    match lease.state:
        case State.GRANTING:
            return "granting"
        case State.HELD:
            return "held"
        case State.MISSING:
            return "missing"
        case State.LOST:
            return "lost"
        case State.DROPPED:
            return "dropped"


def _expires(tables: Tables, lease: Lease, store: Store | None) -> float | None:
    if store is None:
        session = tables.sessions.get(lease.spec.session)
        return lease.until if session is None or lease.spec.lease not in session.regions else session.expires
    if store.spec.persistent:
        return None
    return max((tables.sessions[one].expires for one in store.sessions), default=store.until)
