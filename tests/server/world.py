"""Donors that do what the broker tells them, for the broker's tables to be tried on; no I/O."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import msgspec

from memfaas.errors import LeaseLost
from memfaas.messages import DonorReport, Endpoint, HeldLease, Kind, LeaseGone, LeaseSpec, Memory, OnReclaim, StoreSpec
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


def store_spec(
    name: str = "s",
    tenant: str = "t",
    shards: int = 1,
    persistent: bool = False,
    on_reclaim: OnReclaim = "migrate",
) -> StoreSpec:
    return StoreSpec(
        store=new_id(),
        name=name,
        tenant=tenant,
        size=shards * 8 * MIB,
        shards=shards,
        shard_size=8 * MIB,
        persistent=persistent,
        compression="none",
        on_reclaim=on_reclaim,
    )


@dataclass
class Sending:
    """A copy's way to another donor, as its source knows it."""

    donor: str
    epoch: int
    in_doubt: bool = False
    """All of it was sent; nobody is served here until it is known what came of it."""
    asked: bool = False
    """The broker was asked: what the target may still answer is not listened to."""


@dataclass(eq=False)
class Copy:
    """One donor's copy of a lease."""

    spec: LeaseSpec
    endpoint: Endpoint
    value: int = 0
    """What was last written to it."""
    sending: Sending | None = None

    @property
    def served(self) -> bool:
        return self.sending is None or not self.sending.in_doubt

    @property
    def shown(self) -> HeldLease:
        return HeldLease(spec=self.spec, endpoint=self.endpoint)


@dataclass
class DonorModel:
    """What is true on a donor's node, whatever the broker thinks."""

    name: str
    offered: int
    spill: bool = False
    connected: bool = False
    held: dict[bytes, Copy] = field(default_factory=dict)
    arriving: dict[bytes, LeaseSpec] = field(default_factory=dict)
    """Memory that waits for a copy."""
    unsaid: list[bytes] = field(default_factory=list)
    """Leases that have come, which the broker has not heard yet."""
    unsaid_gone: list[LeaseGone] = field(default_factory=list)
    """What it lost while the broker was away."""

    def leased(self) -> int:
        specs = [one.spec for one in self.held.values()] + list(self.arriving.values())
        return sum(cost(spec.kind, spec.size) for spec in specs)

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

    def serve(self, spec: LeaseSpec, value: int = 0) -> Endpoint:
        endpoint = Endpoint(node=self.name, unix_path=f"/{spec.lease.hex()}", host=self.name, port=1)
        self.held[spec.lease] = Copy(spec, endpoint, value)
        assert self.leased() <= self.offered, "more was granted than the donor offers"
        return endpoint

    def free(self, lease: bytes) -> None:
        self.held.pop(lease, None)
        self.arriving.pop(lease, None)

    def die(self) -> None:
        self.held.clear()
        self.arriving.clear()


class World:
    """Tables, and donors that do what they are told, as the broker would have it done."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.donors: dict[str, DonorModel] = {}
        self.told: list[tuple[bytes, bytes]] = []
        self.directed: list[tuple[bytes, bytes]] = []
        self.tables = self.new_tables()

    def new_tables(self) -> Tables:
        return Tables(lambda: self.now, TTL, cost)

    def donor(self, name: str, offered: int = 64 * MIB, *, spill: bool = False) -> DonorModel:
        self.donors[name] = DonorModel(name, offered, spill)
        self.connect(name)
        return self.donors[name]

    def connect(self, name: str) -> None:
        donor = self.donors[name]
        donor.connected = True
        donor.unsaid.clear()
        held = [copy.shown for copy in donor.held.values()]
        outcome = self.tables.register(name, name, name, donor.memory(), held, donor.spill, list(donor.arriving))
        for one in [one for one in outcome.free if one.donor == name]:  # what `Registered.drop` carries
            outcome.free.remove(one)
            self.carry_out(Outcome(free=[one]))
            self.say_gone(name, one.lease, "dropped")
        self.carry_out(outcome)
        notices, donor.unsaid_gone = donor.unsaid_gone, []
        for notice in notices:
            self.say(name, notice)

    def disconnect(self, name: str) -> None:
        self.donors[name].connected = False
        self.donors[name].unsaid.clear()
        self.tables.disconnect_donor(name)

    def carry_out(self, outcome: Outcome) -> None:
        self.told += [(one.session, one.lease) for one in outcome.tell]
        self.directed += [(one.session, one.lease) for one in outcome.moved]
        for one in outcome.free:
            donor = self.donors[one.donor]
            if donor.connected:
                donor.free(one.lease)
                self.tables.freed(one.donor, one.lease, donor.memory())

    def say_gone(self, name: str, lease: bytes, reason: str, moved_to: str = "") -> None:
        self.say(name, LeaseGone(lease=lease, reason=reason, moved_to=moved_to))

    def say(self, name: str, notice: LeaseGone) -> None:
        donor = self.donors[name]
        if donor.connected:
            self.carry_out(self.tables.lost(name, notice))
            self.tables.report(name, donor.report())
        else:
            donor.unsaid_gone.append(notice)

    def evict(self, name: str, lease: bytes, dropped: int = 7) -> None:
        """Its memory is needed at once."""
        copy = self.donors[name].held.pop(lease)
        drops = copy.spec.store is not None and copy.spec.store.on_reclaim == "drop"
        spec = copy.spec if copy.served else None
        reason = "its memory was needed"
        self.say(name, LeaseGone(lease=lease, reason=reason, dropped=dropped if drops else None, spec=spec))

    def grant(self, lease: Lease) -> bool:
        donor = self.donors[lease.donor]
        endpoint = donor.serve(lease.spec)
        kept = self.tables.granted(donor.name, lease.spec.lease, endpoint, donor.memory())
        if not kept:
            del donor.held[lease.spec.lease]
            self.tables.freed(donor.name, lease.spec.lease, donor.memory())
        return kept

    # --- moves

    def relocate(self, source: str, lease: bytes, target: str, timeout: float = 5.0) -> None:
        """As far as the copy may begin."""
        copy = self.donors[source].held[lease]
        known = self.tables.movable(source, lease, copy.spec.epoch)
        move, spec = self.tables.begin_move(known, target, timeout)
        self.donors[target].arriving[lease] = spec
        assert self.tables.move_ready(known, move, self.donors[target].memory())
        copy.sending = Sending(target, spec.epoch)

    def fails_to_send(self, source: str, lease: bytes) -> None:
        """The copy breaks off; the source goes on, and the target gives up."""
        copy = self.donors[source].held[lease]
        assert copy.sending is not None
        target, copy.sending = copy.sending.donor, None
        self.gives_up_waiting(target, lease)

    def gives_up_waiting(self, target: str, lease: bytes) -> None:
        if self.donors[target].arriving.pop(lease, None) is not None:
            self.say_gone(target, lease, "it did not come")

    def sends_all(self, source: str, lease: bytes, *, arrives: bool = True) -> None:
        """The last of it is sent; so the source is in doubt until it hears of it."""
        copy = self.donors[source].held[lease]
        assert copy.sending is not None
        copy.sending.in_doubt = True
        target = self.donors[copy.sending.donor]
        spec = target.arriving.get(lease)
        if spec is None or spec.epoch != copy.sending.epoch:
            return  # nobody waits for it any more
        if arrives:
            del target.arriving[lease]
            target.serve(spec, copy.value)
            target.unsaid.append(lease)
        else:
            self.gives_up_waiting(target.name, lease)

    def hears_that_it_moved(self, source: str, lease: bytes) -> None:
        """From the target itself, or from the broker."""
        copy = self.donors[source].held.pop(lease)
        assert copy.sending is not None
        self.say_gone(source, lease, "it moved", moved_to=copy.sending.donor)

    def says_arrived(self, target: str) -> None:
        donor = self.donors[target]
        lease = donor.unsaid.pop(0)
        if donor.connected and lease in donor.held:
            self.carry_out(self.tables.arrived(target, donor.held[lease].shown))
            self.tables.report(target, donor.report())

    def settles(self, source: str, lease: bytes, *, heard: bool = True) -> None:
        """Raises TransportError while it has to ask again. What is not `heard` changes only the broker."""
        donor = self.donors[source]
        copy = donor.held[lease]
        assert copy.sending is not None
        copy.sending.asked = True
        try:
            settled, outcome = self.tables.settle(source, lease, copy.sending.epoch, copy.sending.donor)
        except LeaseLost:
            if heard:
                del donor.held[lease]
                self.say_gone(source, lease, "it is lost")
            return
        if not heard:
            self.carry_out(outcome)
        elif settled.moved:
            self.hears_that_it_moved(source, lease)
        else:
            copy.sending = None
            copy.spec = msgspec.structs.replace(copy.spec, epoch=settled.epoch)
            self.carry_out(outcome)

    # --- sessions

    def session(self, tenant: str = "t") -> bytes:
        session = new_id()
        self.tables.open_session(session, tenant, [], [])
        return session

    def store(
        self,
        session: bytes,
        donors: list[str],
        *,
        persistent: bool = False,
        name: str = "s",
        on_reclaim: OnReclaim = "migrate",
    ) -> StoreSpec:
        tenant = self.tables.sessions[session].tenant
        spec = store_spec(name, tenant, len(donors), persistent, on_reclaim)
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
            donor.unsaid.clear()
