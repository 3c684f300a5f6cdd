"""The native core: memory, shard and the links to it. See memfaas/native/ for the code in C.

Nothing here waits without a limit, and everything that waits or copies much releases the GIL.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal, final

from numpy.typing import NDArray
from typing_extensions import Buffer

Value = Buffer | NDArray[Any]
"""NumPy's stubs say only from Python 3.12 on that an array has a buffer."""

MAX_KEY: Final = 65536
"""Bytes of the longest key."""
MAX_META: Final = 1024
MIN_SHARD: Final[int]
"""Bytes of the smallest heap."""
USER: Final = 0
PART: Final = 1
"""Key spaces: what users name, and the parts of values too large for one shard's largest block."""
FLAG_LZ4: Final = 1
FLAG_MANIFEST: Final = 2
FLAG_ARRAY: Final = 4
TAG_BYTES: Final = 8

NEED_CONNECTION: Final[int]
BROKEN: Final[int]
REVOKED: Final[int]
FROZEN: Final[int]
STALE: Final[int]
"""Why a link could not do an operation (argument of `StoreCore._repair`): a tcp link with no free
connection, one whose connection broke, revoked memory, frozen memory, a link of the parent process."""

def geometry(kind: Literal["shard", "region"], size: int) -> tuple[int, int]:
    """Bytes of the data and of the control memory for `size` usable bytes."""

def part_size(shard_size: int) -> int:
    """Bytes of the largest value that a shard of this size takes in one piece."""

def format_memory(
    data_fd: int,
    control_fd: int,
    *,
    kind: Literal["shard", "region"],
    size: int,
    lease: bytes,
    store: bytes,
    shard: int,
    epoch: int,
    arriving: bool = False,
) -> None:
    """Writes the first page and the control structures into fresh (zero) memory of the right size.

    `arriving`: it is frozen, for `Memory.receive` to fill it."""

def as_key(key: str | bytes) -> bytes:
    """As it is stored. UsageError when it is neither str nor bytes, ValueTooLarge."""

State = Literal["serving", "frozen", "revoked"]

@final
class Memory:
    """The owner's side of one lease's memory (for the memory function). Maps both descriptors."""

    def __init__(self, data_fd: int, control_fd: int) -> None:
        """ValueError when they do not hold a memory formatted by this version."""
    kind: Literal["shard", "region"]
    size: int
    lease: bytes
    epoch: int
    data_bytes: int
    part_size: int
    """Bytes of the largest value that one block chain of this shard takes."""
    def populate(self, limit: int) -> int:
        """Backs up to `limit` more bytes with locked pages, without what is punched. Returns how far it has come,
        which is `data_bytes` in the end.

        MemoryError when the system has no memory; PermissionError when RLIMIT_MEMLOCK forbids the lock
        (pages are then backed but not locked, and the next calls go on without locking)."""
    def revoke(self) -> State:
        """From now on every operation on any link ends as REVOKED. Then ftruncate the data.

        Returns the state before."""
    state: State
    def registered(self) -> bool:
        """Whether network devices may reach it: then to truncate it frees nothing."""
    def thaw(self) -> bool:
        """Whoever waits for frozen memory goes on. False when it is not frozen (any more)."""
    def freeze(self) -> bool:
        """Operations that begin from now on wait. False when it does not serve (any more)."""
    def drain(self, timeout_s: float) -> bool:
        """Waits until no operation is left in frozen memory; False when one is."""
    def set_epoch(self, epoch: int) -> None: ...
    def operations(self) -> int:
        """How many there have been, about."""
    def copy_all(self) -> None:
        """Begins a copy: nothing counts as copied yet."""
    def copy_written(self, fd: int, timeout_s: float, patience_s: float = 0.0) -> int:
        """Sends what was written since it was copied last, while the memory is in use. Returns bytes.

        OSError (like the two below): the socket broke, or time is up (ETIMEDOUT), or the other side has
        taken nothing at all for `patience_s`, if that is not 0 (ETIMEDOUT, too)."""
    def copy_rest(self, fd: int, timeout_s: float, patience_s: float = 0.0) -> int:
        """Ends the copy of memory that is frozen and drained."""
    def receive(self, fd: int, data_fd: int, timeout_s: float, spill: bool = False) -> int:
        """Fills `arriving` memory with such a copy, to its end; then `thaw` it. EPROTO: it made no sense.

        `spill`: the data is a file, and does not stay in the page cache."""
    def may_punch(self, timeout_s: float) -> bool:
        """Whether there are free spans, which `punch` gives back; waits as it does."""
    def punch(self, data_fd: int, limit: int, timeout_s: float) -> int:
        """Gives up to `limit` bytes of free spans back to the kernel; the shard has less room. Returns bytes.

        Waits up to the timeout for what was freed just now."""
    def unpunch(self, data_fd: int = -1) -> None:
        """What was punched may be used again.

        With `data_fd`, a file: once it has its blocks again. OSError when the disk has not enough; then some stays."""
    def punched(self) -> int:
        """Bytes that were punched, perhaps before this process began to serve."""
    def attach(self, pid: int, start_time: int) -> int:
        """Registers a process that maps the memory; returns its participant number (>= 1).

        OSError(EMFILE) when all places are taken."""
    def reap(self, participant: int) -> None:
        """The participant is dead or has left: unpin, unlock, complete what it was unlinking.

        Never waits, so that one dead participant does not keep another one's locks closed.
        `reap(0)` cleans up after a killed function, before the new one serves. Then call put_right."""
    def put_right(self, timeout_s: float) -> bool:
        """Frees what those reaped had taken but not linked. It waits for the operations that run now, and while
        the memory is frozen; False when time is up: call it again later, until then that memory is unused."""
    def participants(self) -> list[tuple[int, int, int]]:
        """(participant, pid, start_time) of those attached."""
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None: ...

@final
class Server:
    """Native threads that serve authenticated tcp connections to one memory, one thread each."""

    def __init__(self, memory: Memory) -> None: ...
    def serve(self, fd: int, end: ServerEnd | None = None) -> None:
        """Takes over a connected socket (the descriptor is now the server's), and the queue pair beside it."""
    def connections(self) -> int:
        """Over tcp and over verbs."""
    def verbs_end(self, device: bytes, address: bytes) -> ServerEnd:
        """Connects a queue pair to that of a client. `device`: name[:port[:gid index]], or empty for the first one.

        Raises FabricUnavailable with the reason, ProtocolError. Blocks for some milliseconds.
        """
    def verbs_connections(self) -> int: ...
    def close_verbs(self, why: str) -> None:
        """Ends all verbs connections. No client can reach the memory by a network device when this returns, and those
        that come are told why."""
    def open_verbs(self) -> None: ...
    def begin_registering(self) -> bool:
        """Whether the caller is to have the memory registered ahead: by `register_more`, until that is False."""
    def register_more(self) -> bool:
        """Registers a chunk that no client has asked for yet; False: there is none, or no client, or verbs is closed.

        Whoever waits for a registration, or closes, comes first. Blocks. Raises FabricUnavailable, with the limit that
        was met; then the rest is registered as clients ask for it.
        """
    def cut(self) -> None:
        """Ends the connections of peers that may keep an operation from ending: one that reads, or sends what it
        writes to a region, slowly. What they asked for can be asked for again."""
    def stop(self, timeout_s: float) -> bool:
        """Ends all connections; False when some thread did not end in time."""

@final
class ServerEnd:
    """The function's end of a queue pair, for `Server.serve`."""

    welcome: Final[bytes]
    """What the client has to know."""

class Link:
    """One client's open path to one lease."""

    fabric: ClassVar[str]
    def close(self) -> None: ...
    def stats(self) -> dict[str, int]:
        """Of the shard: keys, parts, used, size, ... (a round trip on tcp). Raises LinkDown."""

class LinkDown(Exception):
    """A link can't serve right now; `args[0]` is the reason, as in `StoreCore._repair`."""

@final
class ShmLink(Link):
    fabric: ClassVar[str] = "shm"
    def __init__(self, data_fd: int, control_fd: int, participant: int, timeout_s: float) -> None:
        """Maps the memory (the descriptors may be closed afterwards)."""

@final
class TcpLink(Link):
    fabric: ClassVar[str] = "tcp"
    def __init__(self, timeout_s: float) -> None: ...
    def add(self, fd: int) -> None:
        """Adds an authenticated connection to the link's pool (the descriptor is now the link's)."""

@final
class VerbsLink(Link):
    fabric: ClassVar[str] = "verbs"
    def __init__(self, device: bytes, timeout_s: float) -> None:
        """`device` as for `Server.verbs_end`. Raises FabricUnavailable with the reason."""
    def queue_pair(self) -> QueuePair:
        """For a further connection. Raises FabricUnavailable."""
    def add(self, fd: int, pair: QueuePair, welcome: bytes, timeout_s: float) -> None:
        """Adds a connection with its queue pair to the link's pool (the descriptor is then the link's).

        Raises FabricUnavailable, also when the memory was registered anew since the link was opened; ProtocolError.
        The descriptor is the caller's then.
        """

@final
class QueuePair:
    """The client's end of a queue pair, for `VerbsLink.add`."""

    address: Final[bytes]
    """What the function has to know."""

class StoreCore:
    """The hot path of a store. `memfaas.client.store.Store` extends it and supplies the rare paths."""

    part_size: Final[int]

    def __init__(self, shard_ids: list[bytes], part_size: int, plain: bool) -> None:
        """`shard_ids`: 16 bytes for each shard (a key goes to the shard with the highest
        hash(key, id)). `plain`: values are stored as they are (no compression)."""
    def _set_link(self, shard: int, link: Link | None) -> None: ...
    def _get_link(self, shard: int) -> Link | None: ...
    def _shard_of(self, key: bytes, space: int) -> int: ...
    def get(self, key: str | bytes) -> bytes: ...
    def get_into(self, key: str | bytes, buffer: Value) -> int: ...
    def put(self, key: str | bytes, value: Value) -> None: ...
    def delete(self, key: str | bytes) -> bool: ...
    def __contains__(self, key: object) -> bool: ...
    def get_many(self, keys: Iterable[str | bytes]) -> list[bytes | None]: ...
    def put_many(
        self,
        items: Mapping[str, Value]
        | Mapping[bytes, Value]
        | Mapping[str | bytes, Value]
        | Iterable[tuple[str | bytes, Value]],
    ) -> None: ...

    # Single steps, for the rare paths. Each retries through `_repair` like the public ones.
    def _load(self, key: bytes, space: int) -> tuple[bytes, bytes, int] | None:
        """(value, meta, flags) as stored."""
    def _load_into(self, key: bytes, space: int, buffer: Buffer) -> tuple[int, bytes, int] | None:
        """(length, meta, flags); UsageError when the buffer is too small (nothing is written)."""
    def _save(self, key: bytes, space: int, value: Buffer, meta: bytes, flags: int) -> bytes | None:
        """Stores; returns the manifest that it replaced, if what it replaced was one."""
    def _remove(self, key: bytes, space: int) -> tuple[bool, bytes | None]:
        """Whether it was there, and its manifest if it was one."""
    def _save_if(self, key: bytes, space: int, value: Buffer, tag: bytes, flags: int, expected: bytes) -> bool:
        """Stores with `tag` as the meta, if what is there has `expected` as its meta, or, of no bytes, if nothing is
        there. Whether it did.

        Tags are TAG_BYTES long and not all zero. Whoever uses them gives no tag twice to values of one key."""
    def _remove_if(self, key: bytes, space: int, expected: bytes) -> bool:
        """Deletes, if what is there has this tag. Whether it did."""
    def _scan(self, shard: int, cursor: int, space: int) -> tuple[int, list[tuple[bytes, int, int]]]:
        """A batch of (key, flags, length of the value), and the next cursor (0: that was all).

        Every key that is present during the whole scan is in it, at least once."""

    # Supplied by the subclass.
    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        """The link of this shard is missing or failed: mend it (`_set_link`, `TcpLink.add`) or raise.
        `attempt` counts from 1 within one operation; the core then tries the operation again. The
        fabric of a shard's link must not change here: over tcp the core asks what the broken
        connection did."""
    def _unpack(self, key: bytes, value: bytes, meta: bytes, flags: int) -> bytes:
        """The user's value of a block with FLAG_LZ4 or FLAG_MANIFEST."""
    def _get_into_rare(self, key: bytes, buffer: Value) -> int: ...
    def _put_rare(self, key: bytes, value: Value) -> None:
        """Values that are neither bytes nor bytearray, or larger than part_size, or in a compressed
        store; and those that the shard had no room for."""
    def _forget(self, manifest: bytes) -> None:
        """A manifest was replaced or deleted: its parts can go."""

class RegionCore:
    """The hot path of a region. `memfaas.client.region.Region` extends it."""

    def __init__(self, size: int) -> None: ...
    size: int
    def _set_link(self, link: Link | None) -> None: ...
    def _get_link(self) -> Link | None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def read_into(self, offset: int, buffer: Value) -> int: ...
    def write(self, offset: int, data: Value) -> int: ...
    def compare_swap(self, offset: int, expected: int, new: int) -> int:
        """Atomically sets the 8-byte little-endian word at `offset` (a multiple of 8) to `new` if it
        is `expected`. Returns the word before."""
    def fetch_add(self, offset: int, amount: int) -> int:
        """Atomically adds (modulo 2**64). Returns the word before."""
    def _repair(self, shard: int, reason: int, attempt: int) -> None: ...
