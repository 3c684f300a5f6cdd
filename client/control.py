"""The control connection of a session: dialled, renewed, and found again whenever it breaks.

Data never passes here. While the broker is away, reads and writes go on over the open links;
only what needs the broker (a new store, a lease, the place of a shard that moved) waits for it.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from memfaas import messages, rpc
from memfaas.errors import (
    AccessError,
    BrokerUnavailable,
    DeadlineExceeded,
    MemfaasError,
    ProtocolError,
    TransportError,
)

if TYPE_CHECKING:
    from memfaas.addresses import Address
    from memfaas.auth import Credentials

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_RENEWALS_PER_TTL = 3
_GOODBYE_S = 1.0

R = TypeVar("R", bound=messages.Message)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holdings:
    """What a session tells the broker that it holds, after every connect."""

    stores: list[bytes]
    leases: list[bytes]
    """Of regions."""


class Holder(Protocol):
    """Who holds stores and regions. Called in the control thread: must not block."""

    def holdings(self) -> Holdings: ...

    def fabrics(self) -> dict[str, int]:
        """Open links by fabric."""

    def on_gone(self, lease: bytes, reason: str) -> None:
        """A lease is over, and its memory with it."""

    def on_dropped(self, lease: bytes, reason: str) -> None:
        """All that was in a lease is gone, as its store asked for; it is granted anew when it is next used."""

    def on_moved(self, place: messages.Place) -> None:
        """A lease is served there now."""


class Control:
    """One session's connection to the broker. `run` keeps it; `request` may wait for it."""

    def __init__(self, address: Address, credentials: Credentials, holder: Holder) -> None:
        self.session = secrets.token_bytes(16)
        self._address = address
        self._credentials = credentials
        self._holder = holder
        self._channel: rpc.Channel | None = None
        self._stream: trio.SocketStream | None = None
        self._trouble: MemfaasError | None = None
        """Why there is no connection now."""
        self._changed = trio.Event()

    # --- keeping the connection -------------------------------------------------------------------

    async def run(self, *, patient: bool, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connects and stays connected until it is cancelled.

        Not `patient`: when the first try fails, it raises why (BrokerUnavailable, AccessError,
        ProtocolError). Later it tries for ever, and so it does from the start when `patient`.
        """
        pause = _FIRST_PAUSE_S
        opened = patient
        if patient:
            task_status.started()
        while True:
            trouble = await self._connection(task_status if not opened else trio.TASK_STATUS_IGNORED)
            if trouble is None:  # it was open, and then it broke
                opened = True
                pause = _FIRST_PAUSE_S
                log.info("lost the connection to the broker at %s; connecting again", self._where)
            elif not opened:
                raise trouble
            elif self._trouble is None or str(self._trouble) != str(trouble):
                log.warning("cannot connect to the broker again, still trying: %s", trouble)
            self._set(None, trouble)
            # Jitter: all clients lost the same broker at the same moment.
            await trio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _connection(self, task_status: trio.TaskStatus[None]) -> MemfaasError | None:
        """One connection, from dialling to its end. Returns why it could not be opened, or None."""
        try:
            self._stream = await rpc.dial(self._address.host, self._address.port, "session", self._credentials)
        except MemfaasError as error:
            return error
        channel = rpc.Channel(self._stream, self, f"the broker at {self._where}")
        outcome: MemfaasError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, channel, nursery.cancel_scope)
            try:
                ttl = await self._open(channel)
            except MemfaasError as error:
                outcome = error
            else:
                self._set(channel, None)
                task_status.started()
                await self._renew(channel, ttl)
            nursery.cancel_scope.cancel()
        return outcome

    async def _serve(self, channel: rpc.Channel, scope: trio.CancelScope) -> None:
        try:
            await channel.run()
        except ProtocolError as error:
            log.warning("closed the connection to the broker: %s", error)
        scope.cancel()

    async def _open(self, channel: rpc.Channel) -> float:
        holdings = self._holder.holdings()
        opened = await channel.request(
            messages.OpenSession(session=self.session, stores=holdings.stores, leases=holdings.leases),
            messages.SessionOpened,
            rpc.HANDSHAKE_TIMEOUT_S,
        )
        return opened.ttl

    async def _renew(self, channel: rpc.Channel, ttl: float) -> None:
        """Renews until the broker fails to answer in time, which is taken as its being away."""
        while True:
            try:
                renewed = await channel.request(
                    messages.Renew(fabrics=self._holder.fabrics()), messages.Renewed, ttl / _RENEWALS_PER_TTL
                )
            except MemfaasError as error:
                log.info("a renewal failed: %s", error)
                return
            for lease in renewed.gone:
                self._holder.on_gone(lease, "the broker no longer knows it; perhaps it expired")
            await trio.sleep(renewed.ttl / _RENEWALS_PER_TTL)

    async def on_request(self, message: messages.Message) -> messages.Message:
        raise ProtocolError(f"a session answers no {type(message).__name__}")

    def on_notice(self, message: messages.Message) -> None:
        if isinstance(message, messages.LeaseMoved):
            self._holder.on_moved(message.place)
        elif isinstance(message, messages.LeaseGone):
            tell = self._holder.on_gone if message.dropped is None else self._holder.on_dropped
            tell(message.lease, message.reason)

    @property
    def _where(self) -> str:
        return f"{self._address.host}:{self._address.port}"

    def _set(self, channel: rpc.Channel | None, trouble: MemfaasError | None) -> None:
        self._channel = channel
        self._trouble = trouble
        self._changed.set()
        self._changed = trio.Event()

    # --- using it -----------------------------------------------------------------------------------

    async def request(self, message: messages.Message, reply: type[R], timeout_s: float, *, once: bool = False) -> R:
        """Asks the broker, over the next connection too when this one breaks, unless `once`.

        Raises the broker's error; BrokerUnavailable when it stays away; DeadlineExceeded.
        """
        deadline = trio.current_time() + timeout_s
        while True:
            channel = await self._connected(message, deadline)
            try:
                return await channel.request(message, reply, max(0.0, deadline - trio.current_time()))
            except (DeadlineExceeded, ProtocolError):
                raise
            except TransportError:
                if once or not channel.closed:  # else it is the broker's own answer
                    raise
            if self._channel is channel:
                await self._change(message, deadline)

    async def _connected(self, message: messages.Message, deadline: float) -> rpc.Channel:
        while self._channel is None:
            if isinstance(self._trouble, AccessError | ProtocolError):
                raise self._trouble  # waiting does not mend it
            await self._change(message, deadline)
        return self._channel

    async def _change(self, message: messages.Message, deadline: float) -> None:
        with trio.move_on_at(deadline):
            await self._changed.wait()
            return
        raise BrokerUnavailable(
            f"{type(message).__name__}: the broker at {self._where} stayed away"
            + (f": {self._trouble}" if self._trouble else "")
        ) from self._trouble

    async def say_goodbye(self) -> None:
        """Lets the broker free at once what this session held; does not insist."""
        if self._channel is None and self._trouble is not None:
            return  # it is away
        try:
            await self.request(messages.CloseSession(), messages.Done, _GOODBYE_S)
        except MemfaasError as error:
            log.info("the session's leases will expire by themselves: %s", error)

    def close_after_fork(self) -> None:
        """In a forked child: closes its copy of the connection, so that the broker sees the parent's end."""
        descriptor = self._stream.socket.detach() if self._stream is not None else -1
        if descriptor >= 0:
            os.close(descriptor)
