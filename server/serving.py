"""One lease's memory in the process that serves it: made ready, opened to clients, given back."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import trio

from memfaas import _native
from memfaas.errors import LeaseLost
from memfaas.messages import FunctionReport, Serve
from memfaas.server.door import Door
from memfaas.server.memory import populated
from memfaas.units import MIB, format_size

DESCRIPTORS = 4
"""Of a lease: data memory, control memory, Unix listener, tcp listener."""
POPULATE_STEP = 4 * MIB
"""Small: while the kernel locks pages, whatever else in the process needs its memory map waits."""
_POPULATE_NICE = 10
_STOP_TCP_S = 1.0

logger = logging.getLogger(__name__)


class Served:
    """A lease that this process serves. `on_change` is called when `report` may say something new."""

    def __init__(self, message: Serve, descriptors: list[int], on_change: Callable[[], None]) -> None:
        self.message = message
        self.descriptors = descriptors
        self.name = message.spec.lease.hex()[:8]
        self._data, self._control, self._unix, self._tcp = descriptors
        self._on_change = on_change
        self._scope = trio.CancelScope()
        self._stopping = False
        self._memory: _native.Memory
        self._door: Door

    async def prepare(self) -> None:
        """Maps the memory, after formatting or mending it. Raises LeaseLost when it makes no sense."""
        spec = self.message.spec
        try:
            if self.message.fresh:
                _native.format_memory(
                    self._data,
                    self._control,
                    kind=spec.kind,
                    size=spec.size,
                    lease=spec.lease,
                    store=spec.store.store if spec.store is not None else bytes(16),
                    shard=spec.shard,
                    epoch=spec.epoch,
                )
            self._memory = _native.Memory(self._data, self._control)
        except (OSError, ValueError) as error:
            raise LeaseLost(f"the memory of lease {self.name} cannot be served: {error}") from error
        if not self.message.fresh:
            await trio.to_thread.run_sync(self._memory.reap, 0)
        self._door = Door(
            self._memory,
            [self._data, self._control],
            spec,
            self.message.donor,
            self.message.ticket_key,
            self._on_change,
        )

    async def run(self) -> None:
        """Serves clients until the memory is given back."""
        with self._scope:
            await self._door.run(_listener(self._unix), _listener(self._tcp))

    def report(self) -> FunctionReport:
        return FunctionReport(populated=populated(self._data) + populated(self._control), links=self._door.links())

    def has_tcp_links(self) -> bool:
        return "tcp" in self._door.links()

    async def give_back(self) -> None:
        """Every operation of every client ends from now on, and the memory is free when this returns."""
        self._stopping = True
        self._scope.cancel()
        self._memory.revoke()
        await trio.to_thread.run_sync(self._door.stop, _STOP_TCP_S)
        await trio.to_thread.run_sync(os.ftruncate, self._data, 0)

    def start_populating(self, on_step: Callable[[], None]) -> None:
        """Backs the memory with pages, in a thread of its own; it is served meanwhile."""
        threading.Thread(target=self._populate, args=(on_step,), name="populate", daemon=True).start()

    def _populate(self, on_step: Callable[[], None]) -> None:
        # The pages are wanted soon, but whoever works on this node comes first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATE_NICE)
        started = time.monotonic()
        backed = 0
        while not self._stopping and backed < self._memory.data_bytes:
            try:
                backed = self._memory.populate(POPULATE_STEP)
            except PermissionError as error:
                logger.warning("lease %s: %s; its pages may be swapped out", self.name, error.strerror)
            except (MemoryError, OSError, ValueError) as error:
                if not self._stopping:
                    logger.error("lease %s: stays without some of its pages: %s", self.name, error)
                return
            on_step()
        if not self._stopping:
            seconds = time.monotonic() - started
            logger.info("lease %s: %s populated in %.2f s", self.name, format_size(int(backed)), seconds)


def _listener(descriptor: int) -> trio.SocketListener:
    """A listener on a copy: the descriptor itself stays for the next agent."""
    sock = socket.socket(fileno=os.dup(descriptor))
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
