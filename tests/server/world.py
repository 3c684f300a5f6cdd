"""Donors that do what the broker tells them, for the broker's tables to be tried on; no I/O."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from memfaas.messages import DonorReport, Endpoint, HeldLease, Kind, LeaseSpec, Memory, StoreSpec
from memfaas.server.records import Lease, Outcome
from memfaas.server.tables import Tables
from memfaas.units import MIB

TTL = 30.0
HEADROOM = 100 * MIB


class _Ids:
    count = itertools.count(1)


def new_id() -> bytes:
    return next(_Ids.count).to_bytes(16, "big")


def restart_ids() -> None:
    """An example of a property must be the same each time it runs."""
    _Ids.count = itertools.count(1)


def cost(kind: Kind, size: int) -> int:
    return size + (MIB if kind == "shard" else 0)


def store_spec(name: str = "s", tenant: str = "t", shards: int = 1, persistent: bool = False) -> StoreSpec:
    return StoreSpec(
        store=new_id(),
        name=name,
        tenant=tenant,
        size=shards * 8 * MIB,
        shards=shards,
        shard_size=8 * MIB,
        persistent=persistent,
        compression="none",
        on_reclaim="migrate",
    )


@dataclass
class DonorModel:
    """What is true on a donor's node, whatever the broker thinks."""

    name: str
    offered: int
    connected: bool = False
    held: dict[bytes, HeldLease] = field(default_factory=dict)

    def leased(self) -> int:
        return sum(cost(one.spec.kind, one.spec.size) for one in self.held.values())

    def memory(self) -> Memory:
        return Memory(
            offered=self.offered,
            leased=self.leased(),
            populated=self.leased(),
            available=self.offered + HEADROOM - self.leased(),
            headroom=HEADROOM,
        )

    def report(self) -> DonorReport:
        populated = {lease: cost(one.spec.kind, one.spec.size) for lease, one in self.held.items()}
        return DonorReport(memory=self.memory(), links={}, populated=populated)

    def serve(self, spec: LeaseSpec) -> Endpoint:
        endpoint = Endpoint(node=self.name, unix_path=f"/{spec.lease.hex()}", host=self.name, port=1)
        self.held[spec.lease] = HeldLease(spec=spec, endpoint=endpoint)
        assert self.leased() <= self.offered, "more was granted than the donor offers"
        return endpoint


class World:
    """Tables, and donors that do what they are told, as the broker would have it done."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.donors: dict[str, DonorModel] = {}
        self.told: list[tuple[bytes, bytes]] = []
        self.tables = self.new_tables()

    def new_tables(self) -> Tables:
        return Tables(lambda: self.now, TTL, cost)

    def donor(self, name: str, offered: int = 64 * MIB) -> DonorModel:
        self.donors[name] = DonorModel(name, offered)
        self.connect(name)
        return self.donors[name]

    def connect(self, name: str) -> None:
        donor = self.donors[name]
        donor.connected = True
        outcome = self.tables.register(name, name, name, donor.memory(), list(donor.held.values()))
        for one in [one for one in outcome.free if one.donor == name]:  # what `Registered.drop` carries
            outcome.free.remove(one)
            del donor.held[one.lease]
            self.carry_out(self.tables.lost(name, one.lease, "dropped"))
            self.tables.report(name, donor.report())
        self.carry_out(outcome)

    def disconnect(self, name: str) -> None:
        self.donors[name].connected = False
        self.tables.disconnect_donor(name)

    def carry_out(self, outcome: Outcome) -> None:
        self.told += [(one.session, one.lease) for one in outcome.tell]
        for one in outcome.free:
            donor = self.donors[one.donor]
            if donor.connected:
                donor.held.pop(one.lease, None)
                self.tables.freed(one.donor, one.lease, donor.memory())

    def grant(self, lease: Lease) -> bool:
        donor = self.donors[lease.donor]
        endpoint = donor.serve(lease.spec)
        kept = self.tables.granted(lease.donor, lease.spec.lease, endpoint, donor.memory())
        if not kept:
            del donor.held[lease.spec.lease]
            self.tables.freed(donor.name, lease.spec.lease, donor.memory())
        return kept

    def session(self, tenant: str = "t") -> bytes:
        session = new_id()
        self.tables.open_session(session, tenant, [], [])
        return session

    def store(self, session: bytes, donors: list[str], *, persistent: bool = False, name: str = "s") -> StoreSpec:
        tenant = self.tables.sessions[session].tenant
        spec = store_spec(name, tenant, len(donors), persistent)
        for lease in self.tables.begin_store(session, spec, donors):
            assert self.grant(lease)
        return spec

    def region(self, session: bytes, donor: str) -> bytes:
        lease = new_id()
        tenant = self.tables.sessions[session].tenant
        assert self.grant(self.tables.begin_region(session, tenant, lease, 8 * MIB, donor))
        return lease

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.tables.expire())

    def restart(self) -> None:
        self.tables = self.new_tables()
        for donor in self.donors.values():
            donor.connected = False
