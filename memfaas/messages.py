"""What travels on the control connections: one typed structure per message.

Wire form: msgpack of `[type, {field: value}]`. An unknown field is ignored (a newer peer), an
unknown type is a `ProtocolError`. The types of the fields are checked on arrival.
"""

from __future__ import annotations

from typing import Any, Literal

import msgpack
import msgspec

from memfaas.errors import ProtocolError
from memfaas.units import GIB

VERSION = 1
"""Version of the control protocol; both sides say theirs in the hello and must agree."""

Kind = Literal["shard", "region"]
OnReclaim = Literal["migrate", "drop"]
Compression = Literal["none", "lz4"]
LeaseState = Literal["granting", "held", "moving", "missing", "lost", "dropped"]
LONGEST_DEADLINE_S = 86_400.0
"""Of a reclaim. What waits for it counts in nanoseconds, or asks the kernel to wait, and either has an end."""
_RECLAIM_MARGIN_S = 5.0
_SLOWEST_FREE = GIB
"""Bytes per second: memory in 4 KiB pages comes back some times faster than that."""
_LONGEST_FREE_S = 60.0


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""


_TYPES: dict[str, type[Message]] = {}


class Message(Struct, frozen=True, kw_only=True):
    """A message; its class name is its type on the wire."""

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


# --- client to broker -------------------------------------------------------------------------


class Done(Message, frozen=True, kw_only=True):
    """Reply of requests that have nothing to say but that they are done."""


class SessionOpened(Message, frozen=True, kw_only=True):
    session: bytes
    ttl: float
    """Seconds that the session's leases outlive its last renewal."""


class OpenSession(Message, frozen=True, kw_only=True):
    """First request of a client. After a broken connection it names what the session holds."""

    session: bytes
    """16 random bytes, chosen by the client, the same after a reconnect."""
    stores: list[bytes] = []
    leases: list[bytes] = []


class CloseSession(Message, frozen=True, kw_only=True):
    pass


class Renewed(Message, frozen=True, kw_only=True):
    ttl: float
    gone: list[bytes]
    """Leases of this session that no longer exist."""


class Renew(Message, frozen=True, kw_only=True):
    """Renews all leases of the session at once."""

    fabrics: dict[str, int]
    """Open links by fabric, for the status display."""


class StoreOpened(Message, frozen=True, kw_only=True):
    spec: StoreSpec
    created: bool
    places: list[Place]
    """One per shard, in shard order."""


class OpenStore(Message, frozen=True, kw_only=True):
    """Opens a store; creates it when `size` is given and there is none of that name."""

    name: str
    size: int | None
    persistent: bool = False
    compression: Compression = "none"
    on_reclaim: OnReclaim = "migrate"


class CloseStore(Message, frozen=True, kw_only=True):
    """This session no longer uses the store; the last one to say so frees it (unless persistent)."""

    store: bytes


class DeleteStore(Message, frozen=True, kw_only=True):
    name: str


class RegionGranted(Message, frozen=True, kw_only=True):
    place: Place


class OpenRegion(Message, frozen=True, kw_only=True):
    size: int


class ReleaseLease(Message, frozen=True, kw_only=True):
    lease: bytes


class Located(Message, frozen=True, kw_only=True):
    place: Place


class Locate(Message, frozen=True, kw_only=True):
    """Where is this lease now? Also how a session gets a fresh ticket. LeaseLost when it is gone."""

    lease: bytes


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


class LeaseGone(Message, frozen=True, kw_only=True):
    """Notice, broker to session and donor to broker: this lease's memory is gone."""

    lease: bytes
    reason: str
    dropped: int | None = None
    """Keys that went with it, when that is what its store asked for (`on_reclaim="drop"`)."""
    moved_to: str = ""
    """Donor that has all of it now; this one told it so, or heard so from the broker."""
    spec: LeaseSpec | None = None
    """What it was, when it was served here to the end, so that it can be nowhere else: also a broker that does not
    know it then knows that it is over. None when it was only to come here, or when this was an older copy."""


class LeaseMoved(Message, frozen=True, kw_only=True):
    """Notice, broker to session: this lease is served elsewhere now."""

    place: Place


# --- taking memory back -----------------------------------------------------------------------

Step = Literal["unlent", "punched", "migrated", "spilled", "dropped", "lost"]
"""How bytes came back: nobody had leased them; free parts of a shard were cut out of it; a whole lease
was moved to another donor, or to a spill donor; it was dropped, as its store asked for; or it was lost."""


class FreedBytes(Struct, frozen=True, kw_only=True):
    """One part of the memory that a reclaim gave back."""

    how: Step
    size: int
    seconds: float
    """From the request until the kernel had it."""
    lease: bytes = b""
    what: str = ""
    """Which shard of which store, or whose region; empty for memory that nobody had leased."""
    pause: float = 0.0
    """Seconds for which a lease that moved served nobody."""


class Reclaimed(Message, frozen=True, kw_only=True):
    """What a reclaim gave back. Complete: the memory is free in the kernel, whatever became of the leases."""

    donor: str
    asked: int
    """Bytes."""
    freed: int
    """Bytes by the deadline."""
    seconds: float
    in_time: bool
    steps: list[FreedBytes]
    held: int = 0
    """Bytes that this holder has taken back in all now."""
    wanted: int = 0
    """Bytes that the request named; more than `asked` when the donor did not lend so much, or when
    (`in_all`) part of it had been taken back before."""
    deadline: float = 0.0
    """Seconds, as in the request."""


class Reclaim(Message, frozen=True, kw_only=True):
    """An operator to the broker, the broker to a donor, or a program on a donor's node to the donor:
    lend so much less, from now until `Lend` with the same `holder`, and have it free by the deadline."""

    donor: str
    size: int
    """At most what the donor lends; more is taken as all of it."""
    deadline: float
    """Seconds from now; more than a day is taken as a day."""
    holder: str
    """Who needs the memory, such as `job 17`."""
    in_all: bool = False
    """`size` is what this holder needs in all: what it took back before counts. Otherwise it is added."""

    @property
    def patience(self) -> float:
        """Seconds to wait for the answer. At the deadline the memory goes, which takes time itself."""
        freeing = min(self.size / _SLOWEST_FREE, _LONGEST_FREE_S)
        return min(self.deadline, LONGEST_DEADLINE_S) + _RECLAIM_MARGIN_S + freeing


class Lend(Message, frozen=True, kw_only=True):
    """The same three: what this holder took back may be lent again. Nothing happens if it took nothing."""

    donor: str
    holder: str


class Lent(Done, frozen=True, kw_only=True):
    """Reply of `Lend`: done, and how much it was."""

    size: int
    """Bytes that are lent again; 0 when this holder had taken nothing."""


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


# --- donor and broker -------------------------------------------------------------------------


class HeldLease(Struct, frozen=True, kw_only=True):
    spec: LeaseSpec
    endpoint: Endpoint


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


# --- moving a lease to another donor (docs/architecture.md, "How a lease moves") --------------------


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


# --- agent and its memory functions (unix socket, descriptors travel beside) --------------------


class Serve(Message, frozen=True, kw_only=True):
    """Agent to an idle function. Carries four descriptors: data, control, unix and tcp listener."""

    donor: str
    spec: LeaseSpec
    endpoint: Endpoint
    ticket_key: bytes
    fresh: bool
    """The memory has just been made: format it. Otherwise: recover what a killed function left."""
    incoming: float | None = None
    """Not to be served before another donor has sent all of it, within so many seconds."""
    spill: bool = False


class Serving(Message, frozen=True, kw_only=True):
    """Carries the four descriptors back."""

    spec: LeaseSpec
    endpoint: Endpoint
    incoming: bool = False
    in_doubt: Target | None = None
    """All of it was sent there, and no answer came."""


class Sent(Message, frozen=True, kw_only=True):
    outcome: Literal["moved", "stayed", "in doubt"]
    reason: str = ""
    """Why it did not move."""
    size: int = 0
    seconds: float = 0.0
    pause: float = 0.0
    """Seconds between the last operation here and the first that was possible there."""


class Send(Message, frozen=True, kw_only=True):
    """Agent to function: copy the lease there while it is in use; then freeze it and copy the rest."""

    target: Target
    deadline: float
    """Seconds from now; then it stays where it is."""


class Resume(Message, frozen=True, kw_only=True):
    """Agent to function: what you sent is not served elsewhere and never will be. Go on, under this epoch."""

    epoch: int


class Punched(Message, frozen=True, kw_only=True):
    size: int
    """Given back to the kernel."""


class Punch(Message, frozen=True, kw_only=True):
    """Agent to function: cut up to so many bytes of free spans out of the shard; it keeps serving."""

    size: int


class Unpunch(Message, frozen=True, kw_only=True):
    """Agent to function: what was cut out may be used again."""


class InDoubt(Message, frozen=True, kw_only=True):
    """Notice, function to agent: all of the lease was sent there, and no answer came."""

    target: Target


class Received(Message, frozen=True, kw_only=True):
    """Notice, function to agent: all of the lease has come, and is served."""


class Adopt(Message, frozen=True, kw_only=True):
    """A new agent to a function that outlived its agent."""


class FunctionReport(Message, frozen=True, kw_only=True):
    """Notice, function to agent: when something changed."""

    populated: int
    links: dict[str, int]


class Stop(Message, frozen=True, kw_only=True):
    """Agent to function: refuse new operations, free the memory, end."""

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
    fabric: Literal["shm", "tcp", "verbs", "move"]
    """`move`: a function that sends the whole lease."""


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


class VerbsHello(Message, frozen=True, kw_only=True):
    """Client to memory function, after the handshake: its end of a queue pair."""

    address: bytes


class VerbsWelcome(Message, frozen=True, kw_only=True):
    """The other end, and where the memory is. From here on both speak the tcp fabric's frames."""

    welcome: bytes


class Refused(Message, frozen=True, kw_only=True):
    """End of a handshake or of a connection: an error's code and text."""

    code: str
    text: str
