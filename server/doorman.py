"""Who may come in to a lease: the handshake with a ticket, the same for clients and for a donor that sends."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from memfaas import auth, rpc
from memfaas.errors import MemfaasError, ProtocolError
from memfaas.messages import LeaseSpec, Refused, TicketHello, short
from memfaas.server.lobby import Lobby

_STRANGERS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """Somebody with a ticket."""

    ticket: auth.Ticket
    fabric: str


class Doorman:
    """Admits to one lease those that hold a ticket for its present epoch."""

    def __init__(self, spec: LeaseSpec, donor: str, ticket_key: bytes) -> None:
        self.spec = spec
        self._donor = donor
        self._ticket_key = ticket_key
        self._lobby = Lobby(_STRANGERS)

    async def admit(self, stream: trio.abc.Stream, *fabrics: str) -> Admitted | None:
        """Who comes over one of these; None for a client that took too long. One that is refused is told why."""
        admitted = None
        with self._lobby.stranger(rpc.HANDSHAKE_TIMEOUT_S):
            try:
                admitted = await self._handshake(stream, fabrics)
            except MemfaasError as error:
                await refuse(stream, error)
                raise
        return admitted

    async def _handshake(self, stream: trio.abc.Stream, fabrics: tuple[str, ...]) -> Admitted:
        hello = await rpc.receive_message(stream)
        auth.check_hello(hello)
        if not isinstance(hello, TicketHello) or hello.fabric not in fabrics:
            raise ProtocolError(f"expected the hello of a client over {' or '.join(fabrics)}")
        spec = self.spec
        ticket = auth.check_ticket(
            hello.ticket, lease=spec.lease, epoch=spec.epoch, tenant=spec.tenant, donor=self._donor
        )
        key = auth.proof_key(self._ticket_key, hello.ticket)
        asked = auth.challenge(hello, key)
        await rpc.send_message(stream, asked)
        auth.check_answer(hello, asked, await rpc.receive_message(stream), key)
        return Admitted(ticket, hello.fabric)

    async def guarded(self, serve: Callable[[trio.SocketStream], Awaitable[None]], stream: trio.SocketStream) -> None:
        """What goes wrong with one client ends its connection only."""
        name = short(self.spec.lease)
        try:
            await serve(stream)
        except (OSError, EOFError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as error:
            logger.debug("lease %s: a client went before it was admitted: %r", name, error)
        except MemfaasError as error:
            logger.warning("lease %s: a client was refused: %s", name, error)
        except Exception:
            logger.exception("lease %s: a client's connection was closed", name)


async def refuse(stream: trio.abc.Stream, error: MemfaasError) -> None:
    with trio.move_on_after(1):
        try:
            await rpc.send_message(stream, Refused(code=error.code, text=str(error)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
