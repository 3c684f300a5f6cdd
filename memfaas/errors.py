"""Every exception that memfaas raises on purpose.

One base, `MemfaasError`; its children are cut by *who has to act*: the caller (`UsageError`,
`KeyAbsent`), the operator (`AccessError`, `CapacityError`), or nobody but a retry later
(`TransportError`). Each class has a stable `code`, which travels over the control connection, and
an `exit_status` for the command line.
"""

from __future__ import annotations

from typing import ClassVar


class MemfaasError(Exception):
    """Base of all errors of memfaas. The message says what happened, to what, and what to do."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        if cls.code in _BY_CODE:
            raise TypeError(f"error code {cls.code!r} is taken by {_BY_CODE[cls.code].__name__}")
        _BY_CODE[cls.code] = cls


_BY_CODE: dict[str, type[MemfaasError]] = {}


class UsageError(MemfaasError, ValueError):
    """An argument, option or setting makes no sense; nothing was done."""

    code = "usage"
    exit_status = 2


class ValueTooLarge(UsageError):
    """A key or value is larger than the store can ever hold; nothing was stored."""

    code = "value-too-large"
    exit_status = 3


class KeyAbsent(MemfaasError, KeyError):
    """The store holds no such key."""

    code = "key-absent"
    exit_status = 4

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownStore(MemfaasError, LookupError):
    """No store of this name, and no size was given to create one."""

    code = "unknown-store"
    exit_status = 5


class ClosedError(MemfaasError):
    """The session, store or region was closed or released by this program."""

    code = "closed"
    exit_status = 6


class CapacityError(MemfaasError):
    """The cluster has not enough free memory to grant the lease."""

    code = "no-capacity"
    exit_status = 10


class StoreFull(CapacityError):
    """The shard that the key belongs to has no room for this value; what was there stays."""

    code = "store-full"
    exit_status = 11


class AccessError(MemfaasError):
    """Wrong secret, forged ticket, or something that belongs to another tenant."""

    code = "access-denied"
    exit_status = 20


class TicketExpired(AccessError):
    """The ticket's time is over; the session gets a fresh one from the broker."""

    code = "ticket-expired"
    exit_status = 21


class TransportError(MemfaasError):
    """A connection could not be made or broke; `__cause__` has the system's reason."""

    code = "transport"
    exit_status = 30


class BrokerUnavailable(TransportError):
    """No broker answers at the address."""

    code = "broker-unavailable"
    exit_status = 31


class FabricUnavailable(TransportError):
    """The fabric that was asked for cannot reach this lease."""

    code = "fabric-unavailable"
    exit_status = 32


class DeadlineExceeded(TransportError, TimeoutError):
    """The operation did not end in time. A put or delete may or may not have taken effect."""

    code = "deadline"
    exit_status = 33


class ProtocolError(TransportError):
    """The other side sent what this version does not understand; the connection was closed."""

    code = "protocol"
    exit_status = 34


class LeaseLost(MemfaasError):
    """The lease is over (expired, released, revoked, or its donor is gone), and its memory with it."""

    code = "lease-lost"
    exit_status = 40


class ValueLost(LeaseLost):
    """The value was stored, but its memory is gone."""

    code = "value-lost"
    exit_status = 41


class ValueCorrupt(MemfaasError):
    """The stored bytes do not match their checksum, also after a retry."""

    code = "value-corrupt"
    exit_status = 42


def from_code(code: str, message: str) -> MemfaasError:
    """The error that a peer reported; an unknown code (a newer peer) becomes the base class."""
    return _BY_CODE.get(code, MemfaasError)(message)
