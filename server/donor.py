"""The donor agent: lends this node's memory, and sees to it that memory functions serve it.

It registers with the broker, does what the broker asks, tells it what it holds, and gives memory back
when the node needs it; `Custodian` has the leases. It is not in the way of any data. When it is killed, its
functions go on, and the next agent finds them; when it is told to stop, it takes all memory back first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from memfaas import auth, cgroups, node, rpc
from memfaas.config import DonorSettings
from memfaas.errors import MemfaasError, ProtocolError, UsageError
from memfaas.fabric import boot_id
from memfaas.fabric.devices import chosen_device, local_device
from memfaas.messages import (
    LONGEST_DEADLINE_S,
    Done,
    DonorReport,
    Free,
    Grant,
    Lend,
    Lent,
    Memory,
    Message,
    MoveAway,
    Receive,
    Reclaim,
    Reclaimed,
    Register,
    Registered,
)
from memfaas.server import memory, offer, process, spare
from memfaas.server.custodian import Custodian
from memfaas.server.descriptors import check_host
from memfaas.server.desk import Desk
from memfaas.server.home import Home, Legacy
from memfaas.server.line import Line
from memfaas.server.pool import Pool
from memfaas.server.pressure import HOLDER, watch_node
from memfaas.server.reclaim import Reclaimer
from memfaas.server.reports import Reports
from memfaas.units import GIB, format_size

_REGISTER_S = 10.0
_STOP_S = 60.0
_LONGEST_HOLDER = 255
_EVICT_RATE_4K = GIB
_EVICT_RATE_2M = 32 * GIB
"""Bytes per second that a busy node's kernel takes back of memory that clients have mapped, at least."""

logger = logging.getLogger(__name__)


class Agent:
    """One donor, within `run`."""

    def __init__(self, settings: DonorSettings, secret: bytes, on_ready: Callable[..., None]) -> None:
        self._settings = settings
        self._name = settings.name
        self._on_ready = on_ready
        self._home = Home(settings.home)
        self._pool = Pool(settings.warm)
        self._line = Line(
            settings.name, settings.broker, auth.Credentials.of_donor(secret, settings.name), self, self._register
        )
        self._reports = Reports(self._line, self._draft)
        self._reclaimer = Reclaimer(
            settings.name,
            lambda: self._custodian.custodies,
            evict_rate=_EVICT_RATE_2M if node.gives_huge_pages() else _EVICT_RATE_4K,
            on_change=self._leave_behind,
        )
        self._custodian = Custodian(
            settings,
            auth.ticket_key(secret, settings.name),
            home=self._home,
            pool=self._pool,
            line=self._line,
            reports=self._reports,
            reclaimer=self._reclaimer,
            memory=self._memory,
        )
        self._desk = Desk(self._home.desk_path, self.reclaim_for_neighbour, self.lend)
        self._groups = cgroups.groups()
        self._left_behind: tuple[dict[str, int], dict[str, float]] | None = None
        self._ready = False
        self._serving = True
        self._failure: MemfaasError | None = None
        self._failed = trio.Event()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Until cancelled: then all memory is given back before this returns.

        When it ends by an error the functions stay, for the next agent. Raises AccessError,
        UsageError, ProtocolError, FabricUnavailable (there is no such RDMA device).
        """
        if self._settings.device:
            logger.info("donor %s: uses RDMA device %s", self._name, chosen_device(self._settings.device))
        self._home.enter()
        try:
            services = trio.CancelScope(shield=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve, services)
                try:
                    await self._failed.wait()
                except trio.Cancelled:
                    if self._serving:
                        with trio.CancelScope(shield=True), trio.move_on_after(_STOP_S):
                            await self._custodian.free_all()
                    raise
                finally:
                    services.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._pool.stop()
            self._home.leave()
        if self._failure is not None:
            raise self._failure

    async def _serve(self, services: trio.CancelScope) -> None:
        """All that goes on until the end, and still while the memory is given back."""
        try:
            with services:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._pool.run)
                    try:
                        await self._begin()
                        await self._line.run()
                    except MemfaasError as error:
                        self._failure = error
                        self._failed.set()
        finally:
            self._serving = False

    async def _begin(self) -> None:
        """All that goes on before the broker is there. Raises UsageError."""
        settings = self._settings
        if settings.listen_host is not None:
            check_host(settings.listen_host)
        if settings.backing is not None:
            memory.check_backing(settings.backing)
        await self._nursery.start(self._reclaimer.run)
        await self._nursery.start(self._custodian.run, self._nursery)
        legacy = self._home.legacy()
        due = {holder: at - _clocks_apart() for holder, at in legacy.due.items()}
        self._reclaimer.restore(legacy.asked, due, legacy.nominal, self._line.say)
        self._reclaimer.nominal = offer.decide(
            settings,
            self._available() + self._custodian.populated,
            before=legacy.nominal,
            reclaimed=sum(legacy.asked.values()),
        )
        self._nursery.start_soon(self._reports.run)
        self._nursery.start_soon(self._desk.run)
        if settings.backing is None:
            self._nursery.start_soon(
                watch_node,
                self._reclaimer,
                settings.headroom,
                lambda: self._custodian.populated,
                self._reports.must_follow,
                self._line.say,
            )

    def _available(self) -> int:
        return spare.available(backing=self._settings.backing, groups=self._groups)

    def _memory(self) -> Memory:
        return Memory(
            offered=self._reclaimer.offered,
            leased=self._reclaimer.used,
            populated=self._custodian.populated,
            available=self._available(),
            headroom=self._settings.headroom,
        )

    # --- what is asked of it --------------------------------------------------------------------

    async def on_request(self, message: Message) -> Message:
        """The broker's."""
        match message:
            case Grant():
                return await self._custodian.grant(message.spec)
            case Receive():
                return await self._custodian.grant(message.spec, message.timeout)
            case Free():
                return await self._custodian.free(message.lease, message.reason)
            case MoveAway():
                await self._custodian.bring_home(message.lease)
                return Done()
            case Reclaim():
                await self._line.caught_up()  # whoever asked may have given up while this process stood still
                return await self.reclaim(message)
            case Lend():
                return await self.lend(message)
        raise ProtocolError(f"a donor does not answer {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"a donor is told no {type(message).__name__}")

    async def reclaim(self, message: Reclaim) -> Reclaimed:
        """Raises UsageError."""
        _check_holder(message.holder)
        self._nursery.start_soon(self._reports.send_soon)  # the offer is lower: nobody is to be placed here
        deadline = min(message.deadline, LONGEST_DEADLINE_S)
        reclaimed = await self._reclaimer.reclaim(message.size, deadline, message.holder, in_all=message.in_all)
        self._reports.must_follow()
        return reclaimed

    async def reclaim_for_neighbour(self, message: Reclaim) -> Reclaimed:
        """As `reclaim`, for a program of this node, so that the broker has to be told. Raises UsageError."""
        reclaimed = await self.reclaim(message)
        if reclaimed.asked > 0:
            self._nursery.start_soon(self._line.say, reclaimed)
        return reclaimed

    async def lend(self, message: Lend) -> Lent:
        """Raises UsageError."""
        _check_holder(message.holder)
        lent = self._reclaimer.lend(message.holder)
        self._reports.must_follow()
        await self._reports.send()  # who has our answer may ask the broker for the room at once
        return Lent(size=lent)

    def _leave_behind(self) -> None:
        """At once, for the next agent: this one may be killed, and whoever asked may have died."""
        asked, due = self._reclaimer.asked, self._reclaimer.due
        for holders in (asked, due):
            holders.pop(HOLDER, None)  # the next agent looks for itself
        if (asked, due) != self._left_behind:
            self._left_behind = asked, due
            due = {holder: at + _clocks_apart() for holder, at in due.items()}
            self._home.leave_behind(Legacy(asked, due, self._reclaimer.nominal))

    # --- what the broker is told ----------------------------------------------------------------

    async def _register(self, channel: rpc.Channel, address: str) -> None:
        told = self._settings.listen_host
        # Clients reach us by the address that we have on the way to the broker, unless told otherwise.
        host = self._custodian.host = address if told in (None, "0.0.0.0", "::") else told
        register = Register(
            donor=self._name,
            node=boot_id(),
            host=host,
            memory=self._memory(),
            held=self._custodian.held,
            arriving=self._custodian.arriving,
            spill=self._settings.backing is not None,
            device=local_device(self._settings.device),
        )
        answer = await channel.request(register, Registered, _REGISTER_S)
        logger.info("donor %s: registered, lends %s", self._name, format_size(self._reclaimer.offered))
        for lease in answer.drop:
            self._custodian.free_unasked(lease)
        if not self._ready:
            self._ready = True
            self._on_ready(role="donor", donor=self._name, host=host, offered=self._reclaimer.offered)
        self._reports.must_follow()

    def _draft(self) -> DonorReport:
        custodies = self._custodian.custodies
        return DonorReport(
            memory=self._memory(),
            links={one.spec.lease: one.links for one in custodies if one.links},
            populated={one.spec.lease: one.populated for one in custodies},
            reclaimed=self._reclaimer.reclaimed,
        )


def _clocks_apart() -> float:
    """Seconds by which `time.monotonic`, the same for all processes, is ahead of trio's clock."""
    return time.monotonic() - trio.current_time()


def _check_holder(holder: str) -> None:
    if not 1 <= len(holder) <= _LONGEST_HOLDER or not holder.isprintable() or holder.isspace():
        raise UsageError(f"{holder[:40]!r} is not a holder's name: 1 to {_LONGEST_HOLDER} printable characters")
    if holder == HOLDER:
        # What the watch took back is lent again bit by bit, and forgotten by the next agent.
        raise UsageError(f"the holder {HOLDER!r} is the donor itself, when its node is short of memory; take another")


async def run_donor(settings: DonorSettings, on_ready: Callable[..., None] = process.announce) -> None:
    """Runs a donor until it is cancelled, and then takes all memory back before it returns.

    `on_ready` gets `donor`, `host` and `offered` (bytes) once the broker knows it. Raises AccessError,
    ProtocolError, UsageError.
    """
    secret = auth.read_secret(settings.secret_path)
    process.allow_many_files()
    await Agent(settings, secret, on_ready).run()


def main(settings: DonorSettings) -> None:
    """`memfaas donor`: runs until SIGTERM or SIGINT."""
    trio.run(process.until_signal, lambda: run_donor(settings))
