"""What the broker knows: donors, leases, stores and sessions, and every rule about them.

No I/O and no clock of its own, so that all of it can be tested in any order of events. A method
that ends leases returns an `Outcome`: what the broker then has to say to donors and to sessions.
The state is soft. After a restart it is learned again: donors say what they hold, sessions say what
they use. One class, so that a replicated engine could take its place.

What always holds between two calls:

1. Every store has one name within its tenant, and one lease for each of its shards.
2. A region's lease belongs to one session, or waits with a deadline for that session to come back.
3. A store is used by sessions, or is persistent, or waits with a deadline, or is being made.
4. A lease that is over (released, expired, lost) never comes back: its identity is kept with its
   donor until that donor no longer holds it. The one exception is a shard whose donor was away: no
   other copy of it was ever made, so while its store lives it may be found again.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from memfaas.errors import AccessError, LeaseLost, TransportError, UnknownStore, UsageError
from memfaas.messages import Endpoint, HeldLease, Kind, LeaseSpec, Memory, StoreSpec

DONOR_GRACE_S = 300.0
"""How long a donor may be away (its agent is killed, its node cut off) before its leases are lost: as long
as memory functions wait for a new agent (`ORPHAN_LIFE_S`), so that none is given up while it serves."""
REMEMBER_S = 86_400.0
"""How long the leases that are over are remembered for a donor that does not come back."""
NOWHERE = Endpoint(node="", unix_path="", host="", port=0)
"""Endpoint of a shard that no donor holds now."""


class State(enum.Enum):
    GRANTING = "being granted"
    HELD = "held by its donor"
    MISSING = "not seen since the broker started"
    LOST = "lost with its donor"


@dataclass
class Lease:
    spec: LeaseSpec
    cost: int
    """Bytes that it takes on its donor."""
    donor: str
    """Empty while MISSING."""
    state: State
    endpoint: Endpoint = NOWHERE
    links: dict[str, int] = field(default_factory=dict)
    until: float = math.inf
    """When a region that its session does not claim is freed, or a MISSING shard counts as lost."""


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


@dataclass
class Store:
    spec: StoreSpec
    leases: list[bytes]
    """By shard."""
    sessions: set[bytes] = field(default_factory=set)
    until: float = math.inf
    """When a store that no session claims is freed."""


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


@dataclass
class Outcome:
    """What has to be said: to donors (free this lease) and to sessions (this lease is gone)."""

    free: list[ToFree] = field(default_factory=list)
    tell: list[ToTell] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        self.free += other.free
        self.tell += other.tell
        return self


class Room(NamedTuple):
    donor: str
    free: int


def shard_lease(store: bytes, shard: int) -> bytes:
    """Identity of a shard's lease; computed, so that a missing shard's is known too."""
    return hashlib.blake2b(store + shard.to_bytes(4, "big"), digest_size=16).digest()


def _short(identity: bytes) -> str:
    return identity.hex()[:8]


class Tables:
    """See the module. `cost` gives the bytes that a lease of a kind and size takes on a donor."""

    def __init__(self, clock: Callable[[], float], ttl: float, cost: Callable[[Kind, int], int]) -> None:
        self.ttl = ttl
        self.donors: dict[str, Donor] = {}
        self.leases: dict[bytes, Lease] = {}
        self.stores: dict[bytes, Store] = {}
        self.sessions: dict[bytes, Session] = {}
        self.names: dict[tuple[str, str], bytes] = {}
        self._clock = clock
        self._cost = cost
        self._complete_at = clock() + DONOR_GRACE_S
        """From then on, what no donor has shown does not exist."""
        self._ended: set[bytes] = set()
        """Until then: leases of which we know that they are over, because we have ended them."""

    # --- sessions -------------------------------------------------------------------------------

    def open_session(self, session: bytes, tenant: str, stores: list[bytes], regions: list[bytes]) -> Outcome:
        """A session starts, or comes back and says all that it holds. Raises AccessError, UsageError."""
        if len(session) != 16:
            raise UsageError("a session's identity has 16 bytes")
        known = self.sessions.get(session)
        if known is None:
            known = self.sessions[session] = Session(session, tenant, 0.0)
        elif known.tenant != tenant:
            raise AccessError("this session belongs to another tenant")
        known.expires = self._clock() + self.ttl
        known.connected = True
        outcome = Outcome()
        reason = "its session no longer uses it"
        for identity in known.stores - set(stores):
            outcome += self._leave(known, self.stores[identity], reason)
        for identity in known.regions - set(regions):
            outcome += self._end(self.leases[identity], reason)
        known.claimed_stores, known.claimed_regions = set(), set()
        for identity in stores:
            self._claim_store(known, identity)
        for identity in regions:
            self._claim_region(known, identity)
        return outcome

    def _claim_store(self, session: Session, identity: bytes) -> None:
        store = self.stores.get(identity)
        if store is None:
            if self._clock() < self._complete_at:
                session.claimed_stores.add(identity)
        elif store.spec.tenant == session.tenant:
            self._use(session, store)

    def _claim_region(self, session: Session, identity: bytes) -> None:
        lease = self.leases.get(identity)
        if lease is not None and lease.spec.kind == "region" and lease.spec.session == session.session:
            lease.until = math.inf
            session.regions.add(identity)
        elif lease is None and self._clock() < self._complete_at and not self._is_over(identity):
            session.claimed_regions.add(identity)
        else:
            session.gone.append(identity)

    def renew(self, session: bytes, fabrics: dict[str, int]) -> list[bytes]:
        """Prolongs all that the session holds; returns its leases that ended since the last time."""
        known = self.sessions[session]
        now = self._clock()
        known.expires = now + self.ttl
        known.fabrics = fabrics
        if now >= self._complete_at:
            known.gone += known.claimed_regions
            known.claimed_stores, known.claimed_regions = set(), set()
        gone, known.gone = known.gone, []
        return gone

    def disconnect_session(self, session: bytes) -> None:
        if session in self.sessions:
            self.sessions[session].connected = False

    def close_session(self, session: bytes, reason: str = "its session was closed") -> Outcome:
        outcome = self._release_all(self.sessions[session], reason)
        del self.sessions[session]
        return outcome

    def _release_all(self, session: Session, reason: str) -> Outcome:
        outcome = Outcome()
        for identity in list(session.stores):
            outcome += self._leave(session, self.stores[identity], reason)
        for identity in list(session.regions):
            outcome += self._end(self.leases[identity], reason)
        return outcome

    # --- stores ---------------------------------------------------------------------------------

    def find_store(self, tenant: str, name: str) -> Store | None:
        identity = self.names.get((tenant, name))
        return None if identity is None else self.stores[identity]

    def use_store(self, session: bytes, store: bytes) -> None:
        self._use(self.sessions[session], self.stores[store])

    def _use(self, session: Session, store: Store) -> None:
        session.stores.add(store.spec.store)
        store.sessions.add(session.session)
        store.until = math.inf

    def begin_store(self, session: bytes, spec: StoreSpec, donors: list[str]) -> list[Lease]:
        """Reserves a store's leases, one for each shard, on these donors; each must then be granted."""
        store = Store(spec, [])
        self.stores[spec.store] = store
        self.names[spec.tenant, spec.name] = spec.store
        for shard, donor in enumerate(donors):
            lease = self._begin(self._shard_spec(spec, shard), donor)
            store.leases.append(lease.spec.lease)
        self._use(self.sessions[session], store)
        return [self.leases[identity] for identity in store.leases]

    @staticmethod
    def _shard_spec(spec: StoreSpec, shard: int) -> LeaseSpec:
        return LeaseSpec(
            lease=shard_lease(spec.store, shard),
            tenant=spec.tenant,
            kind="shard",
            size=spec.shard_size,
            epoch=1,
            store=spec,
            shard=shard,
        )

    def being_made(self, store: Store) -> bool:
        return any(self.leases[identity].state is State.GRANTING for identity in store.leases)

    def lost_shards(self, store: Store) -> list[int]:
        return [i for i, identity in enumerate(store.leases) if self.leases[identity].state is State.LOST]

    def close_store(self, session: bytes, store: bytes) -> Outcome:
        """The session no longer uses the store. Raises UnknownStore."""
        known = self.sessions[session]
        if store not in known.stores:
            raise UnknownStore(f"this session has no store {_short(store)} open")
        return self._leave(known, self.stores[store], "its last session closed the store")

    def _leave(self, session: Session, store: Store, reason: str) -> Outcome:
        session.stores.discard(store.spec.store)
        store.sessions.discard(session.session)
        if store.sessions or store.spec.persistent:
            return Outcome()
        return self._end_store(store, reason)

    def delete_store(self, tenant: str, name: str) -> Outcome:
        """Raises UnknownStore."""
        store = self.find_store(tenant, name)
        if store is None:
            raise UnknownStore(f"there is no store {name!r}")
        return self._end_store(store, f"store {name!r} was deleted")

    def abandon_store(self, store: bytes, reason: str) -> Outcome:
        """A store that could not be made, or not wholly."""
        known = self.stores.get(store)
        return Outcome() if known is None else self._end_store(known, reason)

    def _end_store(self, store: Store, reason: str) -> Outcome:
        outcome = Outcome()
        for identity in store.leases:
            outcome += self._end(self.leases[identity], reason)
        for session in store.sessions:
            self.sessions[session].stores.discard(store.spec.store)
        del self.stores[store.spec.store]
        del self.names[store.spec.tenant, store.spec.name]
        return outcome

    # --- leases ---------------------------------------------------------------------------------

    def begin_region(self, session: bytes, tenant: str, lease: bytes, size: int, donor: str) -> Lease:
        """Reserves a region's lease, which must then be granted."""
        spec = LeaseSpec(lease=lease, tenant=tenant, kind="region", size=size, epoch=1, session=session)
        self.sessions[session].regions.add(lease)
        return self._begin(spec, donor)

    def _begin(self, spec: LeaseSpec, donor: str) -> Lease:
        lease = Lease(spec, self._cost(spec.kind, spec.size), donor, State.GRANTING)
        self.leases[spec.lease] = lease
        self.donors[donor].leases.add(spec.lease)
        return lease

    def granted(self, donor: str, lease: bytes, endpoint: Endpoint, memory: Memory) -> bool:
        """The donor serves the lease. False when the lease has ended in the meantime (it is to be freed)."""
        known = self.leases.get(lease)
        if known is None or known.state is not State.GRANTING:
            if donor in self.donors:  # it may have said that it was freed before it was made
                self.donors[donor].over.setdefault(lease, (0, self._clock() + REMEMBER_S))
            return False
        known.state, known.endpoint = State.HELD, endpoint
        self.donors[known.donor].memory = memory
        return True

    def release(self, session: bytes, lease: bytes, reason: str = "it was released") -> Outcome:
        """Raises LeaseLost, AccessError."""
        known = self.locate(self.sessions[session].tenant, lease)
        if known.spec.session != session:
            raise AccessError(f"lease {_short(lease)} belongs to a store or to another session")
        return self._end(known, reason)

    def abandon_region(self, lease: bytes, reason: str) -> Outcome:
        known = self.leases.get(lease)
        return Outcome() if known is None else self._end(known, reason)

    def locate(self, tenant: str, lease: bytes) -> Lease:
        """Raises AccessError, LeaseLost, and TransportError while its donor may still come back."""
        known = self.leases.get(lease)
        if known is None:
            if self._clock() < self._complete_at and not self._is_over(lease):
                raise TransportError(f"lease {_short(lease)} is not known; the broker has just started, try again")
            raise LeaseLost(f"lease {_short(lease)} is over")
        if known.spec.tenant != tenant:
            raise AccessError(f"lease {_short(lease)} belongs to another tenant")
        if known.state is State.LOST:
            raise LeaseLost(f"lease {_short(lease)} is lost: donor {known.donor or 'unknown'} no longer holds it")
        if known.state is State.MISSING:
            raise TransportError(f"lease {_short(lease)}: its donor has not come back since the broker started")
        if known.state is State.GRANTING:
            raise TransportError(f"lease {_short(lease)} is still being granted; try again")
        return known

    def _is_over(self, lease: bytes) -> bool:
        return lease in self._ended or any(lease in donor.over for donor in self.donors.values())

    def _end(self, lease: Lease, reason: str) -> Outcome:
        """The lease is over for good."""
        identity = lease.spec.lease
        outcome = self._tell(lease, reason)
        del self.leases[identity]
        if self._clock() < self._complete_at:
            self._ended.add(identity)
        session = self.sessions.get(lease.spec.session)
        if session is not None:
            session.regions.discard(identity)
        donor = self.donors.get(lease.donor)
        if donor is not None:
            donor.leases.discard(identity)
            donor.over[identity] = (lease.cost, self._clock() + REMEMBER_S)
            outcome.free.append(ToFree(donor.name, identity, reason))
        return outcome

    def _tell(self, lease: Lease, reason: str) -> Outcome:
        """Whoever holds the lease learns that it is gone: at once, or else at the next renewal."""
        spec = lease.spec
        users = {spec.session} if spec.store is None else self.stores[spec.store.store].sessions
        outcome = Outcome()
        for user in users:
            session = self.sessions.get(user)
            if session is not None and (spec.store is not None or spec.lease in session.regions):
                session.gone.append(spec.lease)
                outcome.tell.append(ToTell(user, spec.lease, reason))
        return outcome

    def _lose(self, lease: Lease, reason: str) -> Outcome:
        """The lease's memory is gone, or out of reach. A store lives on with what is left of it."""
        if lease.state is State.LOST:
            return Outcome()
        if lease.spec.store is None:
            return self._end(lease, reason)
        lease.state, lease.endpoint, lease.links, lease.until = State.LOST, NOWHERE, {}, math.inf
        outcome = self._tell(lease, reason)
        store = self.stores[lease.spec.store.store]
        if len(self.lost_shards(store)) == len(store.leases):
            outcome += self._end_store(store, f"all of store {store.spec.name!r} is lost: {reason}")
        return outcome

    # --- donors ---------------------------------------------------------------------------------

    def register(self, name: str, node: str, host: str, memory: Memory, held: list[HeldLease]) -> Outcome:
        """A donor connects and says what it holds. `Outcome.free` has what it must drop."""
        donor = self.donors.get(name)
        if donor is None:
            donor = self.donors[name] = Donor(name, node, host, memory)
        donor.node, donor.host, donor.memory = node, host, memory
        donor.connected, donor.lost_at = True, math.inf
        now = self._clock()
        identities = {one.spec.lease for one in held}
        donor.over = {lease: past for lease, past in donor.over.items() if lease in identities}
        outcome = Outcome()
        for one in held:
            if not self._learn(donor, one):
                donor.over.setdefault(one.spec.lease, (self._cost(one.spec.kind, one.spec.size), now + REMEMBER_S))
                outcome.free.append(ToFree(name, one.spec.lease, "it is over"))
        for identity in list(donor.leases - identities):
            lease = self.leases[identity]
            outcome += self._without_donor(lease, f"donor {name} no longer holds it")
        return outcome

    def _without_donor(self, lease: Lease, reason: str) -> Outcome:
        """The donor itself says that the memory is no more: nothing is left for it to free."""
        if lease.state is State.GRANTING:
            return Outcome()  # the grant is about to fail, and whoever asked for it cleans up
        donor = self.donors[lease.donor]
        donor.leases.discard(lease.spec.lease)
        lease.donor = ""
        return self._lose(lease, reason)

    def _learn(self, donor: Donor, held: HeldLease) -> bool:
        """Takes over what a donor holds; False when it must not hold it."""
        spec = held.spec
        lease = self.leases.get(spec.lease)
        if lease is None:
            if self._is_over(spec.lease):
                return False
            lease = self._learn_shard(spec) if spec.store is not None else self._learn_region(spec)
        elif lease.state is State.GRANTING or (lease.state is State.HELD and lease.donor != donor.name):
            return False
        if lease is None or lease.spec.tenant != spec.tenant or lease.cost != self._cost(spec.kind, spec.size):
            return False
        previous = self.donors.get(lease.donor)
        if previous is not None:
            previous.leases.discard(spec.lease)
        lease.donor, lease.state, lease.endpoint = donor.name, State.HELD, held.endpoint
        if lease.spec.store is not None:
            lease.until = math.inf
        donor.leases.add(spec.lease)
        return True

    def _learn_region(self, spec: LeaseSpec) -> Lease:
        lease = Lease(spec, self._cost(spec.kind, spec.size), "", State.MISSING, until=self._clock() + self.ttl)
        self.leases[spec.lease] = lease
        session = self.sessions.get(spec.session)
        if session is not None and session.tenant == spec.tenant and spec.lease in session.claimed_regions:
            session.claimed_regions.discard(spec.lease)
            session.regions.add(spec.lease)
            lease.until = math.inf
        return lease

    def _learn_shard(self, spec: LeaseSpec) -> Lease | None:
        """A shard of a store that was not known: so the whole store is learned."""
        of = spec.store
        if (
            of is None
            or of.store in self.stores
            or not 0 <= spec.shard < of.shards
            or spec.lease != shard_lease(of.store, spec.shard)
        ):
            return None
        now = self._clock()
        name = of.name
        while (of.tenant, name) in self.names:
            # Another was made under its name while its donors were away. Nothing is thrown away for that.
            name = f"{name}~{_short(of.store)}"
        of = msgspec.structs.replace(of, name=name)
        store = Store(of, [], until=now + self.ttl)
        self.stores[of.store] = store
        self.names[of.tenant, name] = of.store
        for shard in range(of.shards):
            part = self._shard_spec(of, shard)
            self.leases[part.lease] = Lease(
                part, self._cost("shard", of.shard_size), "", State.MISSING, until=now + DONOR_GRACE_S
            )
            store.leases.append(part.lease)
        for session in self.sessions.values():
            if of.store in session.claimed_stores and session.tenant == of.tenant:
                session.claimed_stores.discard(of.store)
                self._use(session, store)
        return self.leases[spec.lease]

    def disconnect_donor(self, name: str) -> None:
        donor = self.donors.get(name)
        if donor is None:
            return
        donor.connected = False
        donor.away_since = self._clock()
        donor.lost_at = donor.away_since + DONOR_GRACE_S
        if not donor.leases and not donor.over:
            del self.donors[name]

    def report(self, name: str, memory: Memory, links: dict[bytes, dict[str, int]]) -> None:
        donor = self.donors[name]
        donor.memory = memory
        for identity in donor.leases:
            self.leases[identity].links = links.get(identity, {})

    def lost(self, name: str, lease: bytes, reason: str) -> Outcome:
        """A donor says that it no longer holds a lease."""
        donor = self.donors[name]
        donor.over.pop(lease, None)
        if lease not in donor.leases:
            return Outcome()
        return self._without_donor(self.leases[lease], reason)

    def freed(self, name: str, lease: bytes, memory: Memory) -> None:
        donor = self.donors.get(name)
        if donor is not None:
            donor.over.pop(lease, None)
            donor.memory = memory

    def rooms(self) -> list[Room]:
        """What each connected donor could lend now, by its last report and by what was granted since."""
        return [Room(donor.name, self._free(donor)) for donor in self.donors.values() if donor.connected]

    def _free(self, donor: Donor) -> int:
        held = [self.leases[identity] for identity in donor.leases]
        over = sum(cost for cost, _ in donor.over.values())
        taken = sum(lease.cost for lease in held) + over
        unseen = sum(lease.cost for lease in held if lease.state is State.GRANTING)
        memory = donor.memory
        unpopulated = max(0, memory.leased - memory.populated) + unseen
        return max(0, min(memory.offered - taken, memory.available - memory.headroom - unpopulated))

    # --- time -----------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `expire` has something to do next."""
        deadline = math.inf
        for session in self.sessions.values():
            deadline = min(deadline, session.expires)
        for donor in self.donors.values():
            deadline = min(deadline, donor.lost_at, *(until for _, until in donor.over.values()))
        for store in self.stores.values():
            deadline = min(deadline, store.until)
        for lease in self.leases.values():
            deadline = min(deadline, lease.until)
        return deadline

    def expire(self) -> Outcome:
        """Ends all whose time is over."""
        now = self._clock()
        outcome = Outcome()
        if now >= self._complete_at:
            self._ended.clear()
        for session in [s for s in self.sessions.values() if s.expires <= now]:
            reason = f"its session was not renewed for {self.ttl:g} s"
            if session.connected:  # it hears of it, and may go on with what it asks for from now on
                for identity in session.stores:
                    for lease_of in self.stores[identity].leases:
                        session.gone.append(lease_of)
                        outcome.tell.append(ToTell(session.session, lease_of, reason))
                outcome += self._release_all(session, reason)
                session.expires = now + self.ttl
            else:
                outcome += self.close_session(session.session, reason)
        for store in [s for s in self.stores.values() if s.until <= now]:
            store.until = math.inf
            if not store.spec.persistent:
                outcome += self._end_store(store, "no session uses it")
        for donor in [d for d in self.donors.values() if d.lost_at <= now]:
            outcome += self._lose_donor(donor)
        for lease in [one for one in self.leases.values() if one.until <= now]:
            if lease.spec.lease not in self.leases:
                continue  # it went with its store
            if lease.spec.store is None:
                outcome += self._end(lease, "no session claims it")
            else:
                outcome += self._lose(lease, "its donor did not come back")
        for donor in list(self.donors.values()):
            self._forget(donor, now)
        return outcome

    def _lose_donor(self, donor: Donor) -> Outcome:
        outcome = Outcome()
        donor.lost_at = math.inf
        for identity in list(donor.leases):
            lease = self.leases.get(identity)  # it may have gone with its store
            if lease is not None and lease.state is not State.GRANTING:
                outcome += self._lose(lease, f"donor {donor.name} is gone")
        return outcome

    def _forget(self, donor: Donor, now: float) -> None:
        donor.over = {lease: past for lease, past in donor.over.items() if past[1] > now}
        if not donor.connected and donor.lost_at == math.inf and not donor.leases and not donor.over:
            del self.donors[donor.name]
