"""What the broker's and the donor's processes have in common: start, say so, stop when told."""

from __future__ import annotations

import json
import logging
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from memfaas.errors import MemfaasError, TransportError

_KEEPALIVE_S = 15
_PROBE_S = 5
_PROBES = 3

T = TypeVar("T")
logger = logging.getLogger(__name__)


def announce(**facts: Any) -> None:
    """One line of JSON on the standard output, with which a parent process knows that we are ready."""
    print(json.dumps({"ready": True, **facts}), flush=True)


async def until_signal(run: Callable[[], Awaitable[None]]) -> None:
    """Runs until it ends by itself, or is cancelled by SIGTERM or SIGINT."""
    failure: MemfaasError | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            try:
                await run()
            except MemfaasError as error:  # as it is, not in the nursery's group
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def detached(nursery: trio.Nursery, work: Callable[[], Awaitable[T]]) -> T:
    """Does work in another task, so that it comes to its end even when the one who asked goes away."""
    results: list[T] = []
    failures: list[Exception] = []
    done = trio.Event()

    async def run() -> None:
        try:
            results.append(await work())
        except Exception as error:  # it concerns the one who asked, not the nursery
            failures.append(error)
            if not isinstance(error, MemfaasError):
                logger.exception("a request failed")
        finally:
            done.set()

    nursery.start_soon(run)
    await done.wait()
    if failures:
        raise failures[0]
    if not results:
        raise TransportError("the process is stopping")
    return results[0]


def allow_many_files() -> None:
    """A connection each: the usual soft limit of 1024 is too low, and the hard one is ours to use."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def allow_locked_memory() -> None:
    """As much as the system lets us lock."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def notice_dead_peers(sock: socket.socket | trio.socket.SocketType) -> None:
    """A peer whose node died says no goodbye: the kernel finds out within half a minute, and tells us."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (_KEEPALIVE_S + _PROBE_S * _PROBES) * 1000)
