"""The donor's line to the broker: dialled again whenever it breaks."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from memfaas import rpc
from memfaas.addresses import Address
from memfaas.auth import Credentials
from memfaas.errors import AccessError, MemfaasError, ProtocolError, TransportError
from memfaas.messages import LeaseGone, Message, Reclaimed
from memfaas.server import process

_SAY_S = 2.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.9
"""Between attempts to reach the broker. Short: it waits only a moment for its donors after a restart."""

R = TypeVar("R", bound=Message)
logger = logging.getLogger(__name__)


class Line:
    """`register` is called with each new channel, before it is used: it asks the broker to take us.

    It gets the address that we have on the way there.
    """

    def __init__(
        self,
        name: str,
        broker: Address,
        credentials: Credentials,
        handler: rpc.Handler,
        register: Callable[[rpc.Channel, str], Awaitable[None]],
    ) -> None:
        self._name = name
        self._broker = broker
        self._credentials = credentials
        self._handler = handler
        self._register = register
        self._stream: trio.SocketStream | None = None
        self._channel: rpc.Channel | None = None
        self._known = False
        self._unsaid: deque[Message] = deque()

    @property
    def open(self) -> bool:
        return self._channel is not None

    async def ask(self, message: Message, reply: type[R], timeout_s: float) -> R:
        """Raises the broker's error; TransportError while it is away."""
        if self._channel is None:
            raise TransportError("the broker is away")
        return await self._channel.request(message, reply, timeout_s)

    async def caught_up(self) -> None:
        """For a request of the broker's: cancelled if it is withdrawn by now."""
        if self._stream is not None:
            await rpc.caught_up(self._stream)

    async def say(self, message: Message) -> None:
        """Tells the broker. When it is away, the next registration does; what that cannot tell is said after it.

        That is how leases went, of which a broker that was started anew does not even know that we had them, and
        what was reclaimed.
        """
        channel = self._channel
        if channel is not None:
            try:
                with trio.move_on_after(_SAY_S):
                    await channel.notify(message)
                    return
            except TransportError:
                pass
        if isinstance(message, LeaseGone | Reclaimed):
            self._unsaid.append(message)
        if channel is not None:
            await channel.aclose()  # or it would stay unsaid while this lasts

    async def _catch_up(self, channel: rpc.Channel) -> None:
        while self._unsaid:
            message = self._unsaid.popleft()
            try:
                await channel.notify(message)
            except BaseException:
                self._unsaid.appendleft(message)
                raise

    async def run(self) -> None:
        """Connects again whenever the connection breaks. Raises what waiting does not mend."""
        pause = _FIRST_PAUSE_S
        trouble = ""
        while True:
            failure = await self._connection()
            if failure is None:
                logger.warning("donor %s: lost the broker at %s", self._name, self._broker)
                pause = _FIRST_PAUSE_S
            elif isinstance(failure, AccessError | ProtocolError) and not self._known:
                raise failure
            elif str(failure) != trouble:
                trouble = str(failure)
                logger.warning("donor %s: no connection to the broker, still trying: %s", self._name, trouble)
            # Jitter: every donor lost the same broker at the same moment.
            await trio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 1.6, _LONGEST_PAUSE_S)

    async def _connection(self) -> MemfaasError | None:
        """One connection, until it ends. Returns why we could not register, or None."""
        try:
            stream = await rpc.dial(self._broker.host, self._broker.port, "donor", self._credentials)
        except MemfaasError as error:
            return error
        self._stream = stream
        process.notice_dead_peers(stream.socket)
        channel = rpc.Channel(stream, self._handler, "the broker")
        failure: MemfaasError | None = TransportError("the connection to the broker broke")
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                try:
                    await channel.run()
                except ProtocolError as error:
                    logger.error("donor %s: %s", self._name, error)
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            try:
                await self._register(channel, str(stream.socket.getsockname()[0]))
            except MemfaasError as error:
                failure = error
                nursery.cancel_scope.cancel()
            else:
                failure = None
                self._known = True
                self._channel = channel
                try:
                    await self._catch_up(channel)
                except TransportError:
                    pass  # the next connection does
        self._channel = None
        return failure
