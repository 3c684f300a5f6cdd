"""Functions that outlived an earlier agent of a donor: the next one finds them, and they serve it from then on."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from memfaas.errors import LeaseLost, MemfaasError, ProtocolError
from memfaas.messages import Adopt, Serving
from memfaas.server.fds import FdStream, peer_of
from memfaas.server.function_peer import FunctionPeer
from memfaas.server.home import Home
from memfaas.server.pool import FunctionProcess
from memfaas.server.serving import DESCRIPTORS

_ADOPT_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adopted:
    """A function that serves us now, what it serves, and the descriptors of that, which are ours."""

    function: FunctionPeer
    serving: Serving
    descriptors: list[int]


async def adopt_all(home: Home, nursery: trio.Nursery, take_over: Callable[[Adopted], Awaitable[None]]) -> None:
    """Gives each function that is found to `take_over`, and forgets those that are dead."""
    for path in home.control_paths():
        try:
            with trio.fail_after(_ADOPT_S):
                adopted = await _adopt(path, nursery)
                if adopted is not None:
                    await take_over(adopted)
        except (ConnectionRefusedError, FileNotFoundError):
            home.forget(path)  # it died after its agent, and its memory with it
        except (OSError, MemfaasError, trio.TooSlowError) as error:
            logger.error("the memory function at %s cannot be adopted: %r", path, error)


async def _adopt(path: Path, nursery: trio.Nursery) -> Adopted | None:
    """None when its lease was over, and its memory is free."""
    stream = FdStream((await trio.open_unix_socket(str(path))).socket)
    pid, _ = peer_of(stream.socket)
    function = FunctionPeer(FunctionProcess(pid, stream))
    nursery.start_soon(function.run)
    try:
        return await _ask_to_serve_us(function)
    except LeaseLost:
        await function.ended.wait()  # when it has ended its memory is free: until then we must not say so
        await function.process.let_go()
        return None
    except BaseException:
        await function.process.let_go()
        raise


async def _ask_to_serve_us(function: FunctionPeer) -> Adopted:
    stream = function.process.stream
    log = _log_descriptor()
    try:
        stream.attach([log])
        serving = await function.channel.request(Adopt(), Serving)
    finally:
        os.close(log)
    try:
        return Adopted(function, serving, stream.take(DESCRIPTORS))
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _log_descriptor() -> int:
    """Where functions write what goes wrong: our own standard error."""
    try:
        return os.dup(2)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_WRONLY)
