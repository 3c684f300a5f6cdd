"""A donor's agent and its memory functions, over Unix sockets; descriptors travel beside."""

from __future__ import annotations

from typing import Literal

from memfaas.messages.leases import Endpoint, LeaseSpec
from memfaas.messages.move import Target
from memfaas.messages.wire import Message


class Serve(Message, frozen=True, kw_only=True):
    """Agent to an idle function. Carries four descriptors: data, control, unix and tcp listener."""

    donor: str
    spec: LeaseSpec
    endpoint: Endpoint
    ticket_key: bytes
    fresh: bool
    """The memory has just been made: format it. Otherwise: recover what a killed function left."""
    arrives_within: float | None = None
    """Not to be served before another donor has sent all of it, within so many seconds."""
    spill: bool = False


class Serving(Message, frozen=True, kw_only=True):
    """Carries the four descriptors back."""

    spec: LeaseSpec
    endpoint: Endpoint
    arriving: bool = False
    in_doubt: Target | None = None
    """All of it was sent there, and no answer came."""


class Adopt(Message, frozen=True, kw_only=True):
    """A new agent to a function that outlived its agent."""


class FunctionReport(Message, frozen=True, kw_only=True):
    """Notice, function to agent: when something changed."""

    populated: int
    links: dict[str, int]


class Received(Message, frozen=True, kw_only=True):
    """Notice, function to agent: all of the lease has come, and is served."""


class InDoubt(Message, frozen=True, kw_only=True):
    """Notice, function to agent: all of the lease was sent there, and no answer came."""

    target: Target


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
    timeout: float
    """Seconds; then it stays where it is."""


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


class Stop(Message, frozen=True, kw_only=True):
    """Agent to function: refuse new operations, free the memory, end."""

    reason: str
