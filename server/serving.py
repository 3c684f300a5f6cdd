"""One lease's memory in the process that serves it: made ready, opened to clients, given back."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import msgspec
import trio

from memfaas import _native
from memfaas.errors import CapacityError, LeaseLost, TransportError
from memfaas.messages import FunctionReport, Sent, Serve, Target, short
from memfaas.server.arrival import Arrival
from memfaas.server.departure import Departure
from memfaas.server.door import Door
from memfaas.server.doorman import Doorman
from memfaas.server.memory import populated
from memfaas.units import MIB, format_size

REMOTE = ("tcp", "verbs")
"""Fabrics whose links are threads, which end without saying so."""
DESCRIPTORS = 4
"""Of a lease: data memory, control memory, Unix listener, tcp listener."""
POPULATE_STEP = 4 * MIB
"""Small: while the kernel locks pages, whatever else in the process needs its memory map waits."""
_POPULATE_NICE = 10
_STOP_TCP_S = 1.0
_PUNCH_S = 0.05
"""How long to wait for what was freed just now, which nobody can use before."""
_MOVING = "the lease is moving"
_PUNCHING = "memory of it is being given back to the node"
"""Why it is not served over verbs."""

logger = logging.getLogger(__name__)


class Served:
    """A lease that this process serves. `on_change` is called when `report` may say something new.

    `run` serves; a lease that comes from another donor is awaited first, and `on_received` called.
    """

    def __init__(
        self,
        message: Serve,
        descriptors: list[int],
        on_change: Callable[[], None],
        on_received: Callable[[], None],
    ) -> None:
        self.message = message
        self.in_doubt: Target | None = None
        """Where all of it was sent, if no answer came."""
        self.descriptors = descriptors
        self.name = short(message.spec.lease)
        self._data, self._control, self._unix, self._tcp = descriptors
        self._on_change = on_change
        self._on_received = on_received
        self._scope = trio.CancelScope()
        self._stopping = False
        self._populating: threading.Thread | None = None
        self._arrival: Arrival | None = None
        self._departure: Departure | None = None
        self._departed = trio.Event()
        self._unpunching = trio.Lock()
        self._memory: _native.Memory
        self._doorman: Doorman
        self._door: Door

    @property
    def arriving(self) -> bool:
        """Not all of it is here."""
        return self._arrival is not None

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
                    arriving=self.message.arrives_within is not None,
                )
            self._memory = _native.Memory(self._data, self._control)
        except (OSError, ValueError) as error:
            raise LeaseLost(f"the memory of lease {self.name} cannot be served: {error}") from error
        if not self.message.fresh:
            await trio.to_thread.run_sync(self._memory.reap, 0)
        self._doorman = Doorman(spec, self.message.donor, self.message.ticket_key)
        device = self.message.endpoint.verbs
        self._door = Door(self._memory, [self._data, self._control], self._doorman, device, self._on_change)
        if self.message.arrives_within is not None:
            self._arrival = Arrival(self._memory, self._data, self._doorman, spill=self.message.spill)

    async def run(self) -> None:
        """Serves clients until the memory is given back. Raises LeaseLost when the lease did not arrive."""
        with self._scope:
            await self._arrive()
            self._start_populating()
            await self._door.run(_listener(self._unix), _listener(self._tcp))

    async def _arrive(self) -> None:
        if self._arrival is None:
            return
        assert self.message.arrives_within is not None
        await self._arrival.run(_listener(self._tcp), self.message.arrives_within)
        self._arrival = None
        self._on_received()

    def report(self) -> FunctionReport:
        return FunctionReport(populated=populated(self._data) + populated(self._control), links=self._door.links())

    def has_remote_links(self) -> bool:
        return not self._door.links().keys().isdisjoint(REMOTE)

    async def give_back(self) -> None:
        """Every operation of every client ends from now on, and the memory is free when this returns."""
        self._stopping = True
        self._scope.cancel()
        self._memory.revoke()
        await trio.to_thread.run_sync(self._door.close_verbs, "the lease is over")
        await trio.to_thread.run_sync(os.ftruncate, self._data, 0)
        if self._arrival is not None:
            self._arrival.stop()
        if self._departure is not None:
            self._departure.stop()
        await trio.to_thread.run_sync(self._door.stop, _STOP_TCP_S)

    # --- to another donor -----------------------------------------------------------------------

    async def send(self, target: Target, timeout_s: float) -> Sent:
        """Sends all of it. Afterwards it is served there, or still here, or, in doubt, frozen.

        Raises TransportError when it is being sent already, or has not arrived.
        """
        if self._departure is not None or self.in_doubt is not None or self.arriving or self._stopping:
            raise TransportError(f"lease {self.name} cannot be sent now")
        departure = self._departure = Departure(
            self._memory, target, self._door.cut, lambda: self._door.close_verbs(_MOVING)
        )
        self._departed = trio.Event()
        try:
            sent = await trio.to_thread.run_sync(departure.run, timeout_s)
            if sent.outcome == "in doubt":
                self.in_doubt = target
            elif sent.outcome == "stayed":
                await trio.to_thread.run_sync(self._door.open_verbs, _MOVING)
            return sent
        finally:
            self._departure = None
            self._departed.set()

    async def resume(self, epoch: int) -> None:
        """What was sent will never be served there."""
        if self._departure is not None:  # its agent has had no patience, and the broker has decided
            self._departure.stop()
            await self._departed.wait()
        self.message = msgspec.structs.replace(
            self.message, spec=msgspec.structs.replace(self.message.spec, epoch=epoch)
        )
        self._doorman.spec = self.message.spec
        self._memory.set_epoch(epoch)
        self.in_doubt = None
        self._memory.thaw()
        await trio.to_thread.run_sync(self._door.open_verbs, _MOVING)

    # --- its pages ------------------------------------------------------------------------------

    async def punch(self, size: int) -> int:
        """Gives up to so many bytes of free spans back to the kernel; returns how many."""
        if self.arriving or self._departure is not None:
            return 0
        return await trio.to_thread.run_sync(self._punch, size)

    def _punch(self, size: int) -> int:
        populating, self._populating = self._populating, None
        if populating is not None:  # or it would bring the pages back
            populating.join()
        if not self._memory.may_punch(_PUNCH_S):
            return 0
        self._door.close_verbs(_PUNCHING)  # what is registered is not given back
        try:
            return self._memory.punch(self._data, size, _PUNCH_S)
        finally:
            self._door.open_verbs(_PUNCHING)

    async def unpunch(self) -> None:
        """Raises CapacityError when its disk has no room for it; then some of it stays so."""
        async with self._unpunching:
            try:
                await trio.to_thread.run_sync(self._memory.unpunch, self._data if self.message.spill else -1)
            except OSError as error:
                raise CapacityError(f"lease {self.name} does not get all its room again: {error.strerror}") from error

    def _start_populating(self) -> None:
        """Backs the memory with pages, in a thread of its own; it is served meanwhile."""
        if self.message.spill:
            return  # what is not used should not be in memory
        token = trio.lowlevel.current_trio_token()

        def on_step() -> None:
            try:
                token.run_sync_soon(self._on_change)
            except trio.RunFinishedError:
                pass

        self._populating = threading.Thread(target=self._populate, args=(on_step,), name="populate", daemon=True)
        self._populating.start()

    def _populate(self, on_step: Callable[[], None]) -> None:
        # The pages are wanted soon, but whoever works on this node comes first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATE_NICE)
        started = time.monotonic()
        backed = 0
        while not self._stopping and self._populating is not None and backed < self._memory.data_bytes:
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
