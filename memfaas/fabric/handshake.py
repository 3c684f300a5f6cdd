"""The client's side of the handshake with a memory function, the same on every fabric."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from memfaas import auth, messages, rpc
from memfaas.errors import DeadlineExceeded, FabricUnavailable, MemfaasError, ProtocolError, from_code
from memfaas.messages import short

if TYPE_CHECKING:
    import socket

    from memfaas.messages import Place


@contextmanager
def mapped_errors(place: Place, fabric: str, where: str) -> Iterator[None]:
    """Turns the system's errors into ours."""
    what = f"{fabric} to lease {short(place.lease)} on donor {place.donor} ({where})"
    try:
        yield
    except MemfaasError:
        raise
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what}: no answer in time") from error
    except EOFError as error:
        raise FabricUnavailable(f"{what}: the memory function closed the connection") from error
    except OSError as error:
        raise FabricUnavailable(f"{what}: {error.strerror or error}") from error


def time_left(deadline: float) -> float:
    """Seconds for the next step of a handshake. Raises TimeoutError when there are none."""
    left = min(deadline - time.monotonic(), rpc.HANDSHAKE_TIMEOUT_S)
    if left <= 0:
        raise TimeoutError
    return left


def present_ticket(
    sock: socket.socket, place: Place, fabric: Literal["shm", "tcp", "verbs", "move"], deadline: float
) -> messages.Welcome:
    """Proves that we hold the ticket, and that the other side is the function it is for.

    Raises AccessError (TicketExpired), ProtocolError, OSError, EOFError.
    """
    hello = messages.TicketHello(version=messages.VERSION, ticket=place.ticket, nonce=auth.new_nonce(), fabric=fabric)
    sock.settimeout(time_left(deadline))
    rpc.send_message_blocking(sock, hello)
    challenge = rpc.receive_message_blocking(sock)
    sock.settimeout(time_left(deadline))
    rpc.send_message_blocking(sock, auth.answer(hello, challenge, place.proof_key))
    end = rpc.receive_message_blocking(sock)
    if isinstance(end, messages.Refused):
        raise from_code(end.code, end.text)
    if not isinstance(end, messages.Welcome):
        raise ProtocolError(f"expected a welcome, got {type(end).__name__}")
    return end
