"""What travels on the control connections: one typed structure per message.

Wire form: msgpack of `[type, {field: value}]`. An unknown field is ignored (a newer peer), an
unknown type is a `ProtocolError`. The types of the fields are checked on arrival.

Requests name the type of their reply in `Reply`; notices have none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgpack
import msgspec

from memfaas.errors import ProtocolError

VERSION = 1
"""Version of the control protocol; both sides say theirs in the hello and must agree."""

Kind = Literal["shard", "region"]
OnReclaim = Literal["migrate", "drop"]
Compression = Literal["none", "lz4"]


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""


_TYPES: dict[str, type[Message]] = {}


class Message(Struct, frozen=True, kw_only=True):
    """A message; its class name is its type on the wire."""

    Reply: ClassVar[type[Message] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _TYPES[cls.__name__] = cls


def encode(message: Message) -> bytes:
    packed: bytes = msgpack.packb([type(message).__name__, msgspec.to_builtins(message, builtin_types=(bytes,))])
    return packed


def decode(data: bytes) -> Message:
    """Raises ProtocolError for anything that is not a well-formed, well-typed message."""
    try:
        name, fields = msgpack.unpackb(data)
        kind = _TYPES[name]
        return msgspec.convert(fields, kind)
    except KeyError:
        raise ProtocolError(f"unknown message {str(name)[:60]!r}") from None
    except Exception as error:  # msgpack raises many kinds on hostile bytes; all mean the same
        raise ProtocolError(f"malformed message: {error}") from error


# --- what the messages speak of ---------------------------------------------------------------


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


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where a memory function is reached."""

    node: str
    """Boot id of the donor's kernel: equal to the client's own on the same node."""
    unix_path: str
    host: str
    port: int


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


class DonorInfo(Struct, frozen=True, kw_only=True):
    donor: str
    node: str
    host: str
    connected: bool
    memory: Memory
    leases: int
    fabrics: list[str]


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


class StoreInfo(Struct, frozen=True, kw_only=True):
    spec: StoreSpec
    sessions: int
    lost_shards: list[int]


class SessionInfo(Struct, frozen=True, kw_only=True):
    session: bytes
    tenant: str
    connected: bool
    leases: int
    fabrics: dict[str, int]


# --- client to broker -------------------------------------------------------------------------


class Done(Message, frozen=True, kw_only=True):
    """Reply of requests that have nothing to say but that they are done."""


class SessionOpened(Message, frozen=True, kw_only=True):
    session: bytes
    ttl: float
    """Seconds that the session's leases outlive its last renewal."""


class OpenSession(Message, frozen=True, kw_only=True):
    """First request of a client. After a broken connection it names what the session holds."""

    Reply = SessionOpened
    session: bytes
    """16 random bytes, chosen by the client, the same after a reconnect."""
    stores: list[bytes] = []
    leases: list[bytes] = []


class CloseSession(Message, frozen=True, kw_only=True):
    Reply = Done


class Renewed(Message, frozen=True, kw_only=True):
    ttl: float
    gone: list[bytes]
    """Leases of this session that no longer exist."""


class Renew(Message, frozen=True, kw_only=True):
    """Renews all leases of the session at once."""

    Reply = Renewed
    fabrics: dict[str, int]
    """Open links by fabric, for the status display."""


class StoreOpened(Message, frozen=True, kw_only=True):
    spec: StoreSpec
    created: bool
    places: list[Place]
    """One per shard, in shard order."""


class OpenStore(Message, frozen=True, kw_only=True):
    """Opens a store; creates it when `size` is given and there is none of that name."""

    Reply = StoreOpened
    name: str
    size: int | None
    persistent: bool = False
    compression: Compression = "none"
    on_reclaim: OnReclaim = "migrate"


class CloseStore(Message, frozen=True, kw_only=True):
    """This session no longer uses the store; the last one to say so frees it (unless persistent)."""

    Reply = Done
    store: bytes


class DeleteStore(Message, frozen=True, kw_only=True):
    Reply = Done
    name: str


class RegionGranted(Message, frozen=True, kw_only=True):
    place: Place


class OpenRegion(Message, frozen=True, kw_only=True):
    Reply = RegionGranted
    size: int


class ReleaseLease(Message, frozen=True, kw_only=True):
    Reply = Done
    lease: bytes


class Located(Message, frozen=True, kw_only=True):
    place: Place


class Locate(Message, frozen=True, kw_only=True):
    """Where is this lease now? Also how a session gets a fresh ticket. LeaseLost when it is gone."""

    Reply = Located
    lease: bytes


class StatusReport(Message, frozen=True, kw_only=True):
    uptime: float
    donors: list[DonorInfo]
    leases: list[LeaseInfo]
    stores: list[StoreInfo]
    sessions: list[SessionInfo]


class Status(Message, frozen=True, kw_only=True):
    """What the broker knows; a tenant sees its own leases, stores and sessions, the operator all."""

    Reply = StatusReport


class LeaseGone(Message, frozen=True, kw_only=True):
    """Notice, broker to session and donor to broker: this lease's memory is gone."""

    lease: bytes
    reason: str


# --- donor and broker -------------------------------------------------------------------------


class HeldLease(Struct, frozen=True, kw_only=True):
    spec: LeaseSpec
    endpoint: Endpoint


class Registered(Message, frozen=True, kw_only=True):
    drop: list[bytes]
    """Leases that the broker knows to be over: free them."""


class Register(Message, frozen=True, kw_only=True):
    """First request of a donor, after every connect."""

    Reply = Registered
    donor: str
    node: str
    host: str
    memory: Memory
    held: list[HeldLease]


class DonorReport(Message, frozen=True, kw_only=True):
    """Notice, donor to broker, now and then."""

    memory: Memory
    links: dict[bytes, dict[str, int]]
    """Lease to open links by fabric."""


class Granted(Message, frozen=True, kw_only=True):
    endpoint: Endpoint
    memory: Memory


class Grant(Message, frozen=True, kw_only=True):
    """Broker to donor: serve this lease. CapacityError when its memory would cut into the headroom."""

    Reply = Granted
    spec: LeaseSpec


class Freed(Message, frozen=True, kw_only=True):
    memory: Memory


class Free(Message, frozen=True, kw_only=True):
    """Broker to donor: the lease is over, give its memory back now."""

    Reply = Freed
    lease: bytes
    reason: str


# --- agent and its memory functions (unix socket, descriptors travel beside) --------------------


class Serve(Message, frozen=True, kw_only=True):
    """Agent to an idle function. Carries four descriptors: data, control, unix and tcp listener."""

    Reply = Done
    donor: str
    spec: LeaseSpec
    endpoint: Endpoint
    ticket_key: bytes
    fresh: bool
    """The memory has just been made: format it. Otherwise: recover what a killed function left."""


class Serving(Message, frozen=True, kw_only=True):
    """Carries the four descriptors back."""

    donor: str
    spec: LeaseSpec
    endpoint: Endpoint
    pid: int


class Adopt(Message, frozen=True, kw_only=True):
    """A new agent to a function that outlived its agent."""

    Reply = Serving


class FunctionReport(Message, frozen=True, kw_only=True):
    """Notice, function to agent: when something changed."""

    populated: int
    links: dict[str, int]


class Stop(Message, frozen=True, kw_only=True):
    """Agent to function: refuse new operations, free the memory, end."""

    Reply = Done
    reason: str


# --- handshakes (memfaas.auth) ------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """Client or donor to broker."""

    version: int
    role: Literal["session", "donor"]
    name: str
    """Tenant of a session, name of a donor."""
    nonce: bytes


class TicketHello(Message, frozen=True, kw_only=True):
    """Client to memory function."""

    version: int
    ticket: bytes
    nonce: bytes
    fabric: Literal["shm", "tcp"]


class Challenge(Message, frozen=True, kw_only=True):
    version: int
    nonce: bytes
    proof: bytes


class Answer(Message, frozen=True, kw_only=True):
    proof: bytes


class Welcome(Message, frozen=True, kw_only=True):
    """End of a handshake. To a shm client it carries the data and control descriptors."""

    participant: int = 0
    """The client's number in the control memory (shm only)."""


class Refused(Message, frozen=True, kw_only=True):
    """End of a handshake or of a connection: an error's code and text."""

    code: str
    text: str
