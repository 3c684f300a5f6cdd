"""The donor agent: lends this node's memory, and sees to it that memory functions serve it.

It makes the memory of each lease, has a function serve it, tells the broker what it holds, and gives
memory back when the node needs it. It is not in the way of any data. When it is killed, its functions go
on, and the next agent finds them; when it is told to stop, it takes all memory back first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import trio

from memfaas import auth, cgroups, node, rpc
from memfaas.config import DonorSettings
from memfaas.errors import CapacityError, LeaseLost, MemfaasError, ProtocolError, TransportError, UsageError
from memfaas.fabric import boot_id
from memfaas.messages import (
    LONGEST_DEADLINE_S,
    Adopt,
    Arrived,
    Done,
    DonorReport,
    Endpoint,
    Free,
    Freed,
    Grant,
    Granted,
    LeaseGone,
    LeaseSpec,
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
    Serving,
    Target,
)
from memfaas.server import memory, mover, process, spare
from memfaas.server.custody import Custody, FunctionLink
from memfaas.server.descriptors import check_host, make_descriptors
from memfaas.server.desk import Desk
from memfaas.server.fds import FdStream, peer_of
from memfaas.server.governor import margin
from memfaas.server.home import Home
from memfaas.server.line import Line
from memfaas.server.placement import lease_bytes
from memfaas.server.pool import FunctionProcess, Pool
from memfaas.server.pressure import HOLDER, watch_node
from memfaas.server.reclaim import Reclaimer
from memfaas.server.serving import DESCRIPTORS
from memfaas.server.victims import Moved
from memfaas.units import GIB, MIB, format_size

_ADOPT_S = 5.0
_REGISTER_S = 10.0
_STOP_S = 60.0
_HOME_S = 600.0
"""For a lease to move from a spill donor back to memory; nothing is lost when it takes longer."""
_LOOK_S = 10.0
"""How often the node's memory is looked at; nothing tells when it changes."""
_REPORT_PAUSE_S = 1.0
_REPORT_AFTER_S = 0.01
_LONGEST_HOLDER = 255
_NOTICEABLE = 64 * MIB
_EVICT_RATE_4K = GIB
_EVICT_RATE_2M = 32 * GIB
"""Bytes per second that a busy node's kernel takes back of memory that clients have mapped, at least."""

logger = logging.getLogger(__name__)


class Agent:
    """One donor, within `run`."""

    def __init__(self, settings: DonorSettings, secret: bytes, on_ready: Callable[..., None]) -> None:
        self._settings = settings
        self._name = settings.name
        self._ticket_key = auth.ticket_key(secret, settings.name)
        self._on_ready = on_ready
        self._home = Home(settings.home)
        self._pool = Pool(settings.warm)
        self._custodies: dict[bytes, Custody] = {}
        self._granting: dict[bytes, trio.Event] = {}
        self._reclaimer = Reclaimer(
            settings.name,
            lambda: list(self._custodies.values()),
            evict_rate=_EVICT_RATE_2M if node.gives_huge_pages() else _EVICT_RATE_4K,
            on_reserved=self._keep_reserved,
        )
        credentials = auth.Credentials.of_donor(secret, settings.name)
        self._line = Line(settings.name, settings.broker, credentials, self, self._register)
        self._desk = Desk(self._home.desk_path, _DeskPeer(self))
        self._host = settings.listen_host or ""
        self._ready = False
        self._serving = True
        self._stopping = False
        self._changed = trio.Event()
        self._groups = cgroups.groups()
        self._kept: dict[str, int] = {}
        self._sampled = 0.0
        self._reported: DonorReport | None = None
        self._failure: MemfaasError | None = None
        self._failed = trio.Event()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Until cancelled: then all memory is given back before this returns.

        When it ends by an error the functions stay, for the next agent. Raises AccessError,
        UsageError, ProtocolError.
        """
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
                            await self._give_all_back()
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
                        if self._settings.listen_host is not None:
                            check_host(self._settings.listen_host)
                        if self._settings.backing is not None:
                            memory.check_backing(self._settings.backing)
                        await self._nursery.start(self._reclaimer.run)
                        await self._adopt_all()
                        self._kept = self._home.reserved()
                        self._reclaimer.restore(self._kept)  # or what was cut out would grow back
                        self._reclaimer.nominal = self._offer()
                        self._nursery.start_soon(self._report_changes)
                        self._nursery.start_soon(self._desk.run)
                        if self._settings.backing is None:
                            self._nursery.start_soon(
                                watch_node,
                                self._reclaimer,
                                self._settings.headroom,
                                self._populated,
                                self._answer_gave_memory,
                                self._line.say,
                            )
                        await self._line.run()
                    except MemfaasError as error:
                        self._failure = error
                        self._failed.set()
        finally:
            self._serving = False

    async def _give_all_back(self) -> None:
        self._stopping = True
        logger.info("donor %s: stopping, gives back %d leases", self._name, len(self._custodies))
        for custody in list(self._custodies.values()):
            await self._line.say(custody.gone(f"donor {self._name} was stopped"))
        async with trio.open_nursery() as nursery:
            for custody in list(self._custodies.values()):
                nursery.start_soon(self._drop, custody, "the donor was stopped")

    # --- memory ---------------------------------------------------------------------------------

    def _offer(self) -> int:
        """How much to lend in all. Raises UsageError when that is nothing."""
        headroom = self._settings.headroom
        lendable = self._available() + self._populated() - headroom
        if self._settings.backing is None and not node.gives_huge_pages():
            logger.warning(
                "this node gives shared memory no 2 MiB pages, so it comes back about 50 times slower when it "
                "is needed (some 5 GiB/s); run as root: echo advise > %s",
                node.SHMEM_ENABLED,
            )
        if self._settings.memory == "auto":
            keep = margin(headroom)  # or the next small program would take something back
            # Whoever it is set aside for uses some of it already, perhaps, and no more than that.
            offer = max(lendable - keep, min(self._home.nominal(), lendable - keep + sum(self._kept.values())))
            if offer < MIB:
                raise UsageError(
                    f"nothing to lend: {format_size(max(0, lendable + headroom))} are available on this node, "
                    f"and --headroom keeps {format_size(headroom)} of it, with {format_size(keep)} to spare"
                )
            return offer
        if self._settings.memory > lendable:
            logger.warning(
                "donor %s is to lend %s, but the node could spare only %s beyond the headroom now",
                self._name,
                format_size(self._settings.memory),
                format_size(max(0, lendable)),
            )
        return self._settings.memory

    def _available(self) -> int:
        return spare.available(backing=self._settings.backing, groups=self._groups)

    def _populated(self) -> int:
        return sum(one.populated for one in self._custodies.values())

    def _memory(self) -> Memory:
        return Memory(
            offered=self._reclaimer.offered,
            leased=self._reclaimer.used,
            populated=self._populated(),
            available=self._available(),
            headroom=self._settings.headroom,
        )

    # --- leases ---------------------------------------------------------------------------------

    def _custody(self, spec: LeaseSpec, endpoint: Endpoint, descriptors: list[int], incoming: float | None) -> Custody:
        custody = Custody(
            spec,
            endpoint,
            descriptors,
            donor=self._name,
            ticket_key=self._ticket_key,
            spill=self._settings.backing is not None,
            incoming=incoming,
            on_change=self._change,
            on_arrived=lambda custody: self._nursery.start_soon(self._take_in, custody),
            on_doubt=lambda custody, target: self._nursery.start_soon(self._settle, custody, target),
            on_evicted=lambda custody, notice: self._nursery.start_soon(self._after_eviction, custody, notice),
            on_lost=lambda custody, reason: self._nursery.start_soon(self._lose, custody, reason),
            mover=self._move,
        )
        self._custodies[spec.lease] = custody
        return custody

    async def _begin_grant(self, spec: LeaseSpec, incoming: float | None = None) -> Granted:
        """See `_grant`. What frees the lease while this goes on waits for its end."""
        if spec.lease in self._granting:
            raise UsageError(f"lease {spec.lease.hex()[:8]} is being granted already")
        self._granting[spec.lease] = trio.Event()  # before anything else: the next request may be to free it
        try:
            await self._line.caught_up()  # whoever asked may have given up while this process stood still
        except trio.Cancelled:
            self._end_granting(spec.lease)
            raise

        async def grant() -> Granted:
            try:
                return await self._grant(spec, incoming)
            finally:
                self._end_granting(spec.lease)

        return await process.detached(self._nursery, grant)

    def _end_granting(self, lease: bytes) -> None:
        self._granting.pop(lease).set()

    async def _grant(self, spec: LeaseSpec, incoming: float | None = None) -> Granted:
        """Makes memory for a lease, and has it served; `incoming`: once another donor has sent it, in that time."""
        await self._check(spec)
        path = self._home.unix_path(spec.lease)
        # In a thread: to allocate a large file takes a while.
        descriptors, port = await trio.to_thread.run_sync(
            make_descriptors, spec, path, self._host, self._settings.backing
        )
        try:
            await self._check(spec)  # a reclaim, or another lease, may have taken the room meanwhile
        except MemfaasError:
            for descriptor in descriptors:
                os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        endpoint = Endpoint(node=boot_id(), unix_path=str(path), host=self._host, port=port)
        custody = self._custody(spec, endpoint, descriptors, incoming)
        try:
            await self._nursery.start(custody.keep, self._nursery, self._pool)
        except MemfaasError:
            await self._drop(custody, "no function could serve it")
            raise
        logger.info("lease %s of %s: granted, %s %s", custody.name, spec.tenant, spec.kind, format_size(spec.size))
        self._answer_gave_memory()
        return Granted(endpoint=endpoint, memory=self._memory())

    async def _check(self, spec: LeaseSpec) -> None:
        """Whether a lease may be granted now: then this returns without having waited. Raises MemfaasError."""
        if self._stopping:
            raise TransportError(f"donor {self._name} is stopping")
        if spec.lease in self._custodies:
            raise UsageError(f"lease {spec.lease.hex()[:8]} is held already")
        try:
            memory.check_room(self._memory(), lease_bytes(spec.kind, spec.size), f"donor {self._name}: the {spec.kind}")
        except CapacityError:
            await self._report()  # the broker believed that there was room
            raise

    async def _free(self, lease: bytes, reason: str) -> Freed:
        if lease in self._granting:  # whoever asked for it has given up
            await self._granting[lease].wait()
        custody = self._custodies.get(lease)
        if custody is not None:
            await self._drop(custody, reason)
        return Freed(memory=self._memory())

    async def _drop(self, custody: Custody, reason: str) -> None:
        await custody.end(reason)
        self._forget(custody)

    def _forget(self, custody: Custody) -> None:
        if self._custodies.get(custody.spec.lease) is custody:
            del self._custodies[custody.spec.lease]
        self._reclaimer.changed()
        self._answer_gave_memory()

    async def _lose(self, custody: Custody, reason: str) -> None:
        notice = custody.gone(reason)
        await self._drop(custody, reason)
        await self._line.say(notice)

    # --- giving memory back ---------------------------------------------------------------------

    async def reclaim(self, message: Reclaim) -> Reclaimed:
        """Raises UsageError."""
        _check_holder(message.holder)
        self._nursery.start_soon(self._report_soon)  # the offer is lower: nobody is to be placed here
        deadline = min(message.deadline, LONGEST_DEADLINE_S)
        reclaimed = await self._reclaimer.reclaim(message.size, deadline, message.holder, in_all=message.in_all)
        self._answer_gave_memory()
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
        self._answer_gave_memory()
        await self._report()  # who has our answer may ask the broker for the room at once
        return Lent(size=lent)

    def _keep_reserved(self) -> None:
        """At once, for the next agent: this one may be killed, and whoever asked may have died."""
        asked = self._reclaimer.asked
        asked.pop(HOLDER, None)  # the next agent looks for itself
        if asked != self._kept:
            self._kept = asked
            self._home.save_reserved(asked, self._reclaimer.nominal)

    async def _move(self, custody: Custody, deadline: float) -> Moved:
        try:
            moved = await mover.move(custody, self._line, deadline)
        except LeaseLost as error:
            await self._lose(custody, str(error))
            raise
        self._forget(custody)
        return moved

    async def _settle(self, custody: Custody, target: Target) -> None:
        """What an earlier agent, or a function that this one did not ask, has left in doubt."""
        try:
            if await mover.settle(custody, self._line, target):
                await mover.leave(custody, self._line, target.place.donor)
                self._forget(custody)
        except MemfaasError as error:
            await self._lose(custody, str(error))

    async def _take_in(self, custody: Custody) -> None:
        self._reclaimer.changed()
        await self._line.say(Arrived(held=custody.held))
        self._answer_gave_memory()

    async def _after_eviction(self, custody: Custody, notice: LeaseGone) -> None:
        await self._line.say(notice)
        await custody.clear_up()
        self._forget(custody)

    async def _restrain(self, custody: Custody) -> None:
        """What was cut out of a lease is the node's; it must not come back into it."""
        try:
            excess = await custody.restrain()
        except MemfaasError as error:
            logger.warning("lease %s: what was cut out of it cannot be looked after now: %s", custody.name, error)
            return
        self._reclaimer.changed()  # more of it may be punched than we knew
        if excess > 0:
            logger.error(
                "lease %s of tenant %s takes %s of the node that were taken back from it; so it has to go",
                custody.name,
                custody.spec.tenant,
                format_size(excess),
            )
            self._reclaimer.evict(custody, "its clients used memory that the node had taken back from it")

    async def _bring_home(self, lease: bytes) -> Done:
        custody = self._custodies.get(lease)
        if custody is None:
            raise LeaseLost(f"lease {lease.hex()[:8]} is not here")
        await custody.move(trio.current_time() + _HOME_S)
        return Done()

    # --- functions of an earlier agent ----------------------------------------------------------

    async def _adopt_all(self) -> None:
        for path in self._home.control_paths():
            try:
                with trio.fail_after(_ADOPT_S):
                    await self._adopt(path)
            except (ConnectionRefusedError, FileNotFoundError):
                self._home.forget(path)  # it died after its agent, and its memory with it
            except (OSError, MemfaasError, trio.TooSlowError) as error:
                logger.error("the memory function at %s cannot be adopted: %r", path, error)
        self._home.forget_all_but(one.endpoint.unix_path for one in self._custodies.values())

    async def _adopt(self, path: Path) -> None:
        stream = FdStream((await trio.open_unix_socket(str(path))).socket)
        pid, _ = peer_of(stream.socket)
        link = FunctionLink(FunctionProcess(pid, stream))
        self._nursery.start_soon(link.run)
        try:
            serving, descriptors = await self._ask_to_serve_us(link)
        except LeaseLost:
            try:
                await link.ended.wait()  # when it has ended its memory is free: until then we must not say so
            finally:
                await link.process.let_go()
            return
        except BaseException:
            await link.process.let_go()
            raise
        custody = self._custody(serving.spec, serving.endpoint, descriptors, 0.0 if serving.incoming else None)
        await self._nursery.start(custody.keep, self._nursery, self._pool, link)
        logger.info("lease %s: adopted function %d", custody.name, pid)
        if serving.in_doubt is not None:
            self._nursery.start_soon(self._settle, custody, serving.in_doubt)

    async def _ask_to_serve_us(self, link: FunctionLink) -> tuple[Serving, list[int]]:
        stream = link.process.stream
        log = _log_descriptor()
        try:
            stream.attach([log])
            serving = await link.channel.request(Adopt(), Serving)
        finally:
            os.close(log)
        try:
            return serving, stream.take(DESCRIPTORS)
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    # --- the broker -----------------------------------------------------------------------------

    def _learn_host(self, local: str) -> None:
        """Clients reach us by the address that we have on the way to the broker, unless told otherwise."""
        told = self._settings.listen_host
        self._host = local if told in (None, "0.0.0.0", "::") else told

    async def _register(self, channel: rpc.Channel, address: str) -> None:
        self._learn_host(address)
        self._reported = None
        register = Register(
            donor=self._name,
            node=boot_id(),
            host=self._host,
            memory=self._memory(),
            held=[one.held for one in self._custodies.values() if one.state in ("serving", "moving")],
            arriving=[one.spec.lease for one in self._custodies.values() if one.state == "arriving"],
            spill=self._settings.backing is not None,
        )
        answer = await channel.request(register, Registered, _REGISTER_S)
        logger.info("donor %s: registered, lends %s", self._name, format_size(self._reclaimer.offered))
        for lease in answer.drop:
            self._nursery.start_soon(self._drop_and_say, lease)
        if not self._ready:
            self._ready = True
            self._on_ready(role="donor", donor=self._name, host=self._host, offered=self._reclaimer.offered)
        self._answer_gave_memory()

    async def _drop_and_say(self, lease: bytes) -> None:
        await self._free(lease, "the broker says that it is over")
        await self._line.say(LeaseGone(lease=lease, reason="it was over"))

    async def on_request(self, message: Message) -> Message:
        match message:
            case Grant():
                return await self._begin_grant(message.spec)
            case Receive():
                return await self._begin_grant(message.spec, message.timeout)
            case Free():
                return await process.detached(self._nursery, lambda: self._free(message.lease, message.reason))
            case Reclaim():
                await self._line.caught_up()  # whoever asked may have given up while this process stood still
                return await self.reclaim(message)
            case Lend():
                return await self.lend(message)
            case MoveAway():
                return await process.detached(self._nursery, lambda: self._bring_home(message.lease))
        raise ProtocolError(f"a donor does not answer {type(message).__name__}")

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"a donor is told no {type(message).__name__}")

    # --- reports --------------------------------------------------------------------------------

    def _change(self) -> None:
        self._changed.set()

    def _answer_gave_memory(self) -> None:
        """Answers given at about the same time may overtake each other, so a report has to follow."""
        self._reported = None
        self._change()

    async def _report_changes(self) -> None:
        while True:
            with trio.move_on_after(_LOOK_S):
                await self._changed.wait()
            self._changed = trio.Event()
            self._sample()
            if self._reported is None or _differs(self._reported, self._draft()):
                await self._report()
                await trio.sleep(_REPORT_PAUSE_S)

    def _sample(self) -> None:
        if trio.current_time() - self._sampled >= _LOOK_S:
            self._sampled = trio.current_time()
            for custody in self._custodies.values():
                custody.sample()
                if custody.punched > 0 or custody.unsure:
                    self._nursery.start_soon(self._restrain, custody)

    def _draft(self) -> DonorReport:
        custodies = self._custodies.values()
        return DonorReport(
            memory=self._memory(),
            links={one.spec.lease: one.links for one in custodies if one.links},
            populated={one.spec.lease: one.populated for one in custodies},
            reclaimed=self._reclaimer.reserved,
        )

    async def _report_soon(self) -> None:
        """To look at the node takes a millisecond, which a reclaim has first. Who is placed here before is refused."""
        await trio.sleep(_REPORT_AFTER_S)
        await self._report()

    async def _report(self) -> None:
        if self._line.open:
            self._reported = self._draft()
            await self._line.say(self._reported)


class _DeskPeer:
    """What a program of this node may ask."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def on_request(self, message: Message) -> Message:
        match message:
            case Reclaim():
                # Whoever asked may have given up while this process stood still, and its `Lend` be done: then
                # the connection has ended, and this is cancelled here.
                await trio.lowlevel.checkpoint()
                return await self._agent.reclaim_for_neighbour(message)
            case Lend():
                return await self._agent.lend(message)
        raise ProtocolError(f"a donor answers no {type(message).__name__} here")

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"a donor is told no {type(message).__name__}")


def _check_holder(holder: str) -> None:
    if not 1 <= len(holder) <= _LONGEST_HOLDER or not holder.isprintable() or holder.isspace():
        raise UsageError(f"{holder[:40]!r} is not a holder's name: 1 to {_LONGEST_HOLDER} printable characters")
    if holder == HOLDER:
        # What the watch took back is lent again bit by bit, and forgotten by the next agent.
        raise UsageError(f"the holder {HOLDER!r} is the donor itself, when its node is short of memory; take another")


def _differs(old: DonorReport, new: DonorReport) -> bool:
    """Whether the broker should know."""
    return (
        old.links != new.links
        or old.reclaimed != new.reclaimed
        or old.memory.offered != new.memory.offered
        or old.memory.leased != new.memory.leased
        or abs(old.memory.populated - new.memory.populated) >= min(_NOTICEABLE, new.memory.leased // 8 or 1)
        or abs(old.memory.available - new.memory.available) >= _NOTICEABLE
    )


def _log_descriptor() -> int:
    """Where functions write what goes wrong: our own standard error."""
    try:
        return os.dup(2)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_WRONLY)


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
