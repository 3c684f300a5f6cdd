"""Control connections: length-prefixed frames, and requests, replies and notices over them.

A frame is a 4-byte big-endian length and that many bytes. On an open `Channel` a frame is msgpack
of `[kind, id, message]`. Both sides may ask; replies come in any order. A malformed or oversized
frame ends that connection and nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgpack
import trio

from memfaas import auth, messages
from memfaas.errors import (
    AccessError,
    BrokerUnavailable,
    DeadlineExceeded,
    MemfaasError,
    ProtocolError,
    TransportError,
    from_code,
)
from memfaas.units import format_duration

if TYPE_CHECKING:
    from memfaas.messages import Message

MAX_FRAME = 8 << 20
MAX_HANDSHAKE_FRAME = 4096
HANDSHAKE_TIMEOUT_S = 5.0
_LENGTH = struct.Struct(">I")
_REQUEST, _REPLY, _ERROR, _NOTICE, _WITHDRAWN = range(5)
_WITHDRAW_S = 1.0
_PENDING_MAX = 1024
_QUIET_ROUNDS = 3
"""Of the scheduler: so many after the last byte was read, what it belongs to has been dealt with."""

R = TypeVar("R", bound="Message")
logger = logging.getLogger(__name__)


def frame(payload: bytes, limit: int = MAX_FRAME) -> bytes:
    if len(payload) > limit:
        raise ProtocolError(f"a frame of {len(payload)} bytes is over the limit of {limit}")
    return _LENGTH.pack(len(payload)) + payload


def frame_length(header: bytes, limit: int) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > limit:
        raise ProtocolError(f"a frame of {length} bytes is over the limit of {limit}")
    return int(length)


async def _receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    """Reads no byte too many: after a handshake the native code goes on with the socket."""
    parts = bytearray()
    while len(parts) < count:
        piece = await stream.receive_some(count - len(parts))
        if not piece:
            raise EOFError
        parts += piece
    return bytes(parts)


async def receive_frame(stream: trio.abc.ReceiveStream, limit: int = MAX_FRAME) -> bytes:
    """Raises EOFError at the end of the stream, ProtocolError for a frame over the limit."""
    return await _receive_exactly(stream, frame_length(await _receive_exactly(stream, _LENGTH.size), limit))


async def send_message(stream: trio.abc.SendStream, message: Message) -> None:
    """One bare message, as in a handshake."""
    await stream.send_all(frame(messages.encode(message), MAX_HANDSHAKE_FRAME))


async def receive_message(stream: trio.abc.ReceiveStream) -> Message:
    return messages.decode(await receive_frame(stream, MAX_HANDSHAKE_FRAME))


def send_message_blocking(sock: socket.socket, message: Message) -> None:
    sock.sendall(frame(messages.encode(message), MAX_HANDSHAKE_FRAME))


def receive_message_blocking(sock: socket.socket) -> Message:
    """EOFError at the end of the stream."""

    def exactly(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            piece = sock.recv(count - len(parts))
            if not piece:
                raise EOFError
            parts += piece
        return bytes(parts)

    return messages.decode(exactly(frame_length(exactly(_LENGTH.size), MAX_HANDSHAKE_FRAME)))


async def greet(stream: trio.abc.Stream, role: str, credentials: auth.Credentials) -> None:
    """The client's side of the handshake with a broker. Raises AccessError, ProtocolError."""
    hello = messages.Hello(
        version=messages.VERSION,
        role="donor" if role == "donor" else "session",
        name=credentials.name,
        nonce=auth.new_nonce(),
    )
    with trio.fail_after(HANDSHAKE_TIMEOUT_S):
        await send_message(stream, hello)
        await send_message(stream, auth.answer(hello, await receive_message(stream), credentials.key))
        end = await receive_message(stream)
    if isinstance(end, messages.Refused):
        raise from_code(end.code, end.text)
    if not isinstance(end, messages.Welcome):
        raise ProtocolError(f"expected a welcome, got {type(end).__name__}")


async def admit(stream: trio.abc.Stream, secret: bytes) -> messages.Hello:
    """The broker's side: who is this? A peer that is refused is told why, then the error is raised."""
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            hello = await receive_message(stream)
            auth.check_hello(hello)
            if not isinstance(hello, messages.Hello):
                raise ProtocolError("expected a hello of a session or donor")
            if hello.role == "session":
                try:
                    auth.valid_tenant(hello.name)
                except ValueError as error:
                    raise AccessError(str(error)) from None
                key = auth.Credentials.of_tenant(secret, hello.name).key
            else:
                key = auth.Credentials.of_donor(secret, hello.name).key
            asked = auth.challenge(hello, key)
            await send_message(stream, asked)
            auth.check_answer(hello, asked, await receive_message(stream), key)
            await send_message(stream, messages.Welcome())
            return hello
    except MemfaasError as error:
        with trio.move_on_after(1):
            try:
                await send_message(stream, messages.Refused(code=error.code, text=str(error)))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        raise


class Handler(Protocol):
    """What a channel's owner does with what arrives."""

    async def on_request(self, message: Message) -> Message:
        """Returns the reply; a MemfaasError becomes an error reply."""

    def on_notice(self, message: Message) -> None: ...


class Channel:
    """One authenticated control connection, symmetric.

    `run` must be running for `request` to get its reply. When the connection ends, by whichever
    side, every pending request gets a TransportError and `run` returns.
    """

    def __init__(self, stream: trio.abc.Stream, handler: Handler, peer: str) -> None:
        self.peer = peer
        self._stream = stream
        self._handler = handler
        self._send_lock = trio.Lock()
        self._next_id = 0
        self._pending: dict[int, trio.MemorySendChannel[Message | MemfaasError]] = {}
        self._serving: dict[int, trio.CancelScope] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the connection is known to have ended: only a new one can help."""
        return self._closed

    async def run(self) -> None:
        """Serves the connection until it ends. Raises ProtocolError when the peer broke the rules."""
        try:
            async with trio.open_nursery() as nursery:
                try:
                    while True:
                        await self._dispatch(await receive_frame(self._stream), nursery)
                except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                nursery.cancel_scope.cancel()
        except* ProtocolError as group:
            raise ProtocolError(f"{self.peer}: {group.exceptions[0]}") from group
        finally:
            self._closed = True
            await trio.aclose_forcefully(self._stream)
            for waiter in self._pending.values():
                waiter.close()
            self._pending.clear()

    async def _dispatch(self, data: bytes, nursery: trio.Nursery) -> None:
        try:
            kind, number, body = msgpack.unpackb(data)
            if not (isinstance(kind, int) and isinstance(number, int)):
                raise ValueError("kind and id are integers")
        except Exception as error:  # hostile bytes
            raise ProtocolError(f"malformed frame: {error}") from error
        if kind == _REQUEST:
            if len(nursery.child_tasks) >= _PENDING_MAX:
                raise ProtocolError(f"more than {_PENDING_MAX} requests at once")
            scope = self._serving[number] = trio.CancelScope()
            nursery.start_soon(self._serve, number, body, scope)
        elif kind == _WITHDRAWN:
            if number in self._serving:
                self._serving[number].cancel()
        elif kind == _NOTICE:
            self._handler.on_notice(messages.decode(body))
        elif kind in (_REPLY, _ERROR):
            outcome = _outcome(kind, body)
            waiter = self._pending.pop(number, None)
            if waiter is not None:  # else: the one who asked has given up
                waiter.send_nowait(outcome)
        else:
            raise ProtocolError(f"unknown kind of frame {kind}")

    async def _serve(self, number: int, body: bytes, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._answer(number, body)
        finally:
            if self._serving.get(number) is scope:
                del self._serving[number]

    async def _answer(self, number: int, body: bytes) -> None:
        try:
            reply = await self._handler.on_request(messages.decode(body))
            kind, payload = _REPLY, messages.encode(reply)
        except MemfaasError as error:
            kind, payload = _ERROR, messages.encode(messages.Refused(code=error.code, text=str(error)))
        except Exception as error:  # a fault of ours in one request must not end the process
            logger.exception("%s: a request failed", self.peer)
            text = f"it failed by a fault that its log tells of: {error!r}"
            kind, payload = _ERROR, messages.encode(messages.Refused(code=MemfaasError.code, text=text))
        try:
            await self._send(kind, number, payload)
        except TransportError:
            pass  # the one who asked is gone

    async def _send(self, kind: int, number: int, payload: bytes) -> None:
        data = frame(msgpack.packb([kind, number, payload]))
        async with self._send_lock:
            await trio.lowlevel.checkpoint_if_cancelled()  # up to here it costs the others nothing
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._closed = True
                raise TransportError(f"the connection to {self.peer} broke") from error
            except trio.Cancelled:
                # A frame may have gone out by half: nothing sensible can follow it.
                await trio.aclose_forcefully(self._stream)
                raise

    async def request(
        self, message: Message, reply: type[R], timeout_s: float = math.inf, *, withdraw: bool = False
    ) -> R:
        """Asks and waits. Raises the peer's error, TransportError, DeadlineExceeded.

        `withdraw`: when we give up before the answer, the peer need not do it any more (see `caught_up`).
        """
        if self._closed:
            raise TransportError(f"the connection to {self.peer} is closed")
        self._next_id += 1
        number = self._next_id
        send, receive = trio.open_memory_channel["Message | MemfaasError"](1)
        self._pending[number] = send
        result: Message | MemfaasError | None = None
        try:
            with trio.fail_after(timeout_s):
                await self._send(_REQUEST, number, messages.encode(message))
                result = await receive.receive()
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"{self.peer} did not answer {type(message).__name__} within {format_duration(timeout_s)}"
            ) from None
        except trio.EndOfChannel:
            raise TransportError(f"the connection to {self.peer} broke before the answer came") from None
        finally:
            self._pending.pop(number, None)
            send.close()
            if withdraw and result is None and not self._closed:
                await self._withdraw(number)
        if isinstance(result, MemfaasError):
            raise result
        if not isinstance(result, reply):
            raise ProtocolError(f"{self.peer} answered {type(message).__name__} with {type(result).__name__}")
        return result

    async def _withdraw(self, number: int) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_WITHDRAW_S):
            try:
                await self._send(_WITHDRAWN, number, b"")
            except TransportError:
                pass  # which comes to the same

    async def notify(self, message: Message) -> None:
        await self._send(_NOTICE, 0, messages.encode(message))

    async def aclose(self) -> None:
        self._closed = True
        await self._stream.aclose()


async def caught_up(stream: trio.SocketStream) -> None:
    """Until the channel that reads this stream has read all that has come.

    For a handler that must not do what its asker has given up meanwhile: it is cancelled here. The request may be
    old, for this process may have stood still, and whoever waited for it has then withdrawn it, or hung up.
    """
    unread = select.poll()
    unread.register(stream.socket, select.POLLIN)
    quiet = 0
    while quiet < _QUIET_ROUNDS:
        quiet = 0 if unread.poll(0) else quiet + 1
        await trio.lowlevel.checkpoint()


def _outcome(kind: int, body: bytes) -> Message | MemfaasError:
    message = messages.decode(body)
    if kind == _REPLY:
        return message
    if isinstance(message, messages.Refused):
        return from_code(message.code, message.text)
    raise ProtocolError("an error reply without an error")


class _Asker:
    """The side of a channel that is asked nothing."""

    async def on_request(self, message: Message) -> Message:
        raise ProtocolError(f"this program answers no {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        pass


@asynccontextmanager
async def asking(stream: trio.abc.Stream, peer: str) -> AsyncIterator[Channel]:
    """A channel over which this side only asks."""
    channel = Channel(stream, _Asker(), peer)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            try:
                await channel.run()
            except ProtocolError:
                pass  # whoever asks is told that the connection broke

        nursery.start_soon(run)
        try:
            yield channel
        except Exception as error:  # as it is, not in the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def dial(host: str, port: int, role: str, credentials: auth.Credentials) -> trio.SocketStream:
    """An authenticated stream to the broker. BrokerUnavailable, AccessError, ProtocolError."""
    where = f"{host}:{port}"
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            stream = await trio.open_tcp_stream(host, port)
    except (OSError, trio.TooSlowError) as error:
        raise BrokerUnavailable(
            f"no broker answers at {where} ({_reason(error)}); is `memfaas broker` running there?"
        ) from error
    try:
        await greet(stream, role, credentials)
    except (EOFError, trio.BrokenResourceError, trio.TooSlowError) as error:
        await trio.aclose_forcefully(stream)
        raise BrokerUnavailable(f"what listens at {where} does not speak like a memfaas broker") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


def _reason(error: BaseException) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"no answer in {HANDSHAKE_TIMEOUT_S:g} s"
    if isinstance(error, OSError) and error.__cause__ is not None and isinstance(error.__cause__, BaseExceptionGroup):
        return "; ".join(sorted({_reason(e) for e in error.__cause__.exceptions}))
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # trio's own text names the address once more
    return getattr(error, "strerror", None) or str(error)
