"""How a connection begins (`memfaas.auth`)."""

from __future__ import annotations

from typing import Literal

from memfaas.messages.wire import Message


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
