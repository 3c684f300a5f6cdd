"""The agent's side of one lease: it keeps the memory, and a function that serves it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from memfaas import _native, rpc
from memfaas.errors import LeaseLost, MemfaasError, ProtocolError, TransportError, UsageError
from memfaas.messages import Done, Endpoint, FunctionReport, HeldLease, LeaseSpec, Message, Serve, Stop, Stopped
from memfaas.server import memory
from memfaas.server.function import control_path
from memfaas.server.placement import lease_bytes
from memfaas.server.pool import FunctionProcess, Pool

_SERVE_S = 30.0
"""Mending what a killed function left may wait for operations of its clients."""
_STOP_S = 45.0
_BACKLOG = 1024
_MAX_DEATHS = 5
_DEATHS_WINDOW_S = 30.0
_RESTART_PAUSE_S = 0.05

logger = logging.getLogger(__name__)


class FunctionLink:
    """The agent's connection to one function; `run` must be running."""

    def __init__(self, process: FunctionProcess) -> None:
        self.process = process
        self.channel = rpc.Channel(process.stream, self, f"function {process.pid}")
        self.ended = trio.Event()
        self.report: FunctionReport | None = None
        self.on_report: Callable[[], None] | None = None

    async def run(self) -> None:
        try:
            await self.channel.run()
        except ProtocolError as error:
            logger.error("%s", error)
        finally:
            self.ended.set()

    async def on_request(self, message: Message) -> Message:
        raise ProtocolError(f"a function does not ask {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        if not isinstance(message, FunctionReport):
            raise ProtocolError(f"a function does not say {type(message).__name__}")
        self.report = message
        if self.on_report is not None:
            self.on_report()


class Custody:
    """One lease in the agent's hands.

    `on_change` is called when its function reports something; `on_lost` when it can no longer be
    served, and then the one called ends it.
    """

    def __init__(
        self,
        spec: LeaseSpec,
        endpoint: Endpoint,
        descriptors: list[int],
        *,
        donor: str,
        ticket_key: bytes,
        on_change: Callable[[], None],
        on_lost: Callable[[Custody, str], None],
    ) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self.name = spec.lease.hex()[:8]
        self.bytes = lease_bytes(spec.kind, spec.size)
        self.links: dict[str, int] = {}
        self.populated = memory.populated(descriptors[0]) + memory.populated(descriptors[1])
        self._descriptors = descriptors
        self._donor = donor
        self._ticket_key = ticket_key
        self._on_change = on_change
        self._on_lost = on_lost
        self._link: FunctionLink | None = None
        self._lock = trio.Lock()
        self._ending = False
        self._deaths: list[float] = []

    @property
    def held(self) -> HeldLease:
        return HeldLease(spec=self.spec, endpoint=self.endpoint)

    async def keep(
        self,
        nursery: trio.Nursery,
        pool: Pool,
        link: FunctionLink | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Has the lease served until `end`: a function that dies is replaced, on the same memory.

        `link` is to a function that serves it already. Raises MemfaasError when not even the first
        function could serve it.
        """
        if link is None:
            link = await self._start(nursery, pool, fresh=True)
        task_status.started()
        try:
            while link is not None:
                await self._watch(link)
                link = await self._replace(nursery, pool)
        except MemfaasError as error:
            logger.error("lease %s: given up: %s", self.name, error)
            self._on_lost(self, str(error))

    async def _start(self, nursery: trio.Nursery, pool: Pool, *, fresh: bool) -> FunctionLink:
        async with self._lock:  # nobody closes the descriptors meanwhile
            if self._ending:
                raise LeaseLost(f"lease {self.name} is over")
            link = FunctionLink(await pool.take())
            nursery.start_soon(link.run)
            try:
                link.process.stream.attach(self._descriptors)
                serve = Serve(
                    donor=self._donor,
                    spec=self.spec,
                    endpoint=self.endpoint,
                    ticket_key=self._ticket_key,
                    fresh=fresh,
                )
                await link.channel.request(serve, Done, _SERVE_S)
            except BaseException:
                await link.process.kill()
                raise
            self._link = link
            logger.info("lease %s: served by function %d", self.name, link.process.pid)
            return link

    async def _watch(self, link: FunctionLink) -> None:
        def reported() -> None:
            if link.report is not None:
                self.populated, self.links = link.report.populated, link.report.links
                self._on_change()

        self._link, link.on_report = link, reported
        reported()
        await link.ended.wait()
        self._link = None
        await link.process.kill()

    async def _replace(self, nursery: trio.Nursery, pool: Pool) -> FunctionLink | None:
        """Another function on the same memory; None when the lease is over. Raises when none holds out."""
        while not self._ending:
            now = trio.current_time()
            self._deaths = [at for at in self._deaths if now - at < _DEATHS_WINDOW_S] + [now]
            if len(self._deaths) >= _MAX_DEATHS:
                raise LeaseLost(f"{_MAX_DEATHS} functions died within {_DEATHS_WINDOW_S:g} s")
            logger.warning("lease %s: its function died, starting another on the same memory", self.name)
            await trio.sleep(_RESTART_PAUSE_S * (len(self._deaths) - 1))
            try:
                return await self._start(nursery, pool, fresh=False)
            except TransportError as error:
                logger.warning("lease %s: %s", self.name, error)
        return None

    async def end(self, reason: str) -> None:
        """Gives the memory back and removes the sockets. Never raises MemfaasError."""
        self._ending = True
        async with self._lock:
            if not self._descriptors:
                return  # it was ended before
            freed = await self._stop_function(reason)
            if not freed:
                await trio.to_thread.run_sync(self._cut_off)
            for descriptor in self._descriptors:
                os.close(descriptor)
            self._descriptors = []
            self._remove_sockets()
            logger.info("lease %s: its memory is given back: %s", self.name, reason)

    async def _stop_function(self, reason: str) -> bool:
        link = self._link
        if link is None:
            return False
        try:
            await link.channel.request(Stop(reason=reason), Stopped, _STOP_S)
            return True
        except MemfaasError as error:
            logger.warning("lease %s: its function did not stop by itself: %s", self.name, error)
            return False
        finally:
            await link.process.kill()

    def _remove_sockets(self) -> None:
        for path in (Path(self.endpoint.unix_path), control_path(self.endpoint.unix_path)):
            path.unlink(missing_ok=True)

    def _cut_off(self) -> None:
        """What the function would have done: clients that map the memory see that it is revoked."""
        data, control = self._descriptors[:2]
        try:
            mapped = _native.Memory(data, control)
            mapped.revoke()
            mapped.close()
        except (OSError, ValueError) as error:  # it was never formatted
            logger.debug("lease %s: cut off without a notice: %s", self.name, error)
        os.ftruncate(data, 0)


def make_descriptors(spec: LeaseSpec, unix_path: Path, host: str) -> tuple[list[int], int]:
    """Memory and listening sockets of a new lease, and the tcp port. Raises TransportError."""
    made: list[int] = []
    try:
        made += memory.make(spec.kind, spec.size, spec.lease.hex()[:8])
        unix_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(unix_path))
            os.chmod(unix_path, 0o666)  # for clients of other users: what opens the door is a ticket
            unix.listen(_BACKLOG)
            made.append(unix.detach())
        with _listen(host) as tcp:
            port = tcp.getsockname()[1]
            made.append(tcp.detach())
        return made, port
    except OSError as error:
        for descriptor in made:
            os.close(descriptor)
        raise TransportError(f"cannot make memory and sockets for a lease: {error}") from error


def _listen(host: str) -> socket.socket:
    family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(where[:2], family=family, backlog=_BACKLOG)


def check_host(host: str) -> None:
    """Whether leases can listen there; better known now than at each grant. Raises UsageError."""
    try:
        _listen(host).close()
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} ({error.strerror}); --listen-host is an address of this node"
        ) from error
