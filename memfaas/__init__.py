"""memfaas lends the idle memory of cluster nodes, as a key-value store and as raw remote memory.

    import memfaas

    with memfaas.connect() as session:                    # or connect("node1:7411"), or $MEMFAAS_BROKER
        store = session.store("scratch", size="256MiB")   # create or open; shared by all sessions
        store.put("a", b"bytes")
        store.get("a")

Where things are: the public names below are made in `memfaas.client`. Both sides share `errors`,
`messages` (what travels), `rpc` (how), `auth` (who may), `fabric` (links to memory) and `_native`
(the shard, and the hot path of all operations). `memfaas.server` has the broker, the donor and the
memory function. The imports here are lazy, because a memory function should be small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memfaas.client.aio import AsyncRegion, AsyncSession, AsyncStore, open_session
    from memfaas.client.compress import CompressionStats
    from memfaas.client.details import ShardDetails, StoreDetails
    from memfaas.client.local import LocalCluster
    from memfaas.client.region import Region
    from memfaas.client.session import Session, connect
    from memfaas.client.store import Store
    from memfaas.errors import (
        AccessError,
        BrokerUnavailable,
        CapacityError,
        ClosedError,
        DeadlineExceeded,
        FabricUnavailable,
        KeyAbsent,
        LeaseLost,
        MemfaasError,
        ProtocolError,
        StoreFull,
        TicketExpired,
        TransportError,
        UnknownStore,
        UsageError,
        ValueCorrupt,
        ValueLost,
        ValueTooLarge,
    )

    __version__: str

_HOMES = {
    "memfaas.client.aio": ("AsyncRegion", "AsyncSession", "AsyncStore", "open_session"),
    "memfaas.client.compress": ("CompressionStats",),
    "memfaas.client.details": ("ShardDetails", "StoreDetails"),
    "memfaas.client.local": ("LocalCluster",),
    "memfaas.client.region": ("Region",),
    "memfaas.client.session": ("Session", "connect"),
    "memfaas.client.store": ("Store",),
    "memfaas.errors": (
        "AccessError",
        "BrokerUnavailable",
        "CapacityError",
        "ClosedError",
        "DeadlineExceeded",
        "FabricUnavailable",
        "KeyAbsent",
        "LeaseLost",
        "MemfaasError",
        "ProtocolError",
        "StoreFull",
        "TicketExpired",
        "TransportError",
        "UnknownStore",
        "UsageError",
        "ValueCorrupt",
        "ValueLost",
        "ValueTooLarge",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AccessError",
    "AsyncRegion",
    "AsyncSession",
    "AsyncStore",
    "BrokerUnavailable",
    "CapacityError",
    "ClosedError",
    "CompressionStats",
    "DeadlineExceeded",
    "FabricUnavailable",
    "KeyAbsent",
    "LeaseLost",
    "LocalCluster",
    "MemfaasError",
    "ProtocolError",
    "Region",
    "Session",
    "ShardDetails",
    "Store",
    "StoreDetails",
    "StoreFull",
    "TicketExpired",
    "TransportError",
    "UnknownStore",
    "UsageError",
    "ValueCorrupt",
    "ValueLost",
    "ValueTooLarge",
    "__version__",
    "connect",
    "open_session",
]


if not TYPE_CHECKING:  # for a type checker, a name that is not above does not exist

    def __getattr__(name: str) -> object:
        if name == "__version__":
            value: object = _version()
        elif name in _HOME_OF:
            value = getattr(import_module(_HOME_OF[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("memfaas")
    except PackageNotFoundError:
        return "unknown"
