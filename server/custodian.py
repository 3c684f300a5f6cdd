"""All leases in the hands of a donor's agent: grants and frees them, and sees to what becomes of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from memfaas.config import DonorSettings
from memfaas.errors import CapacityError, LeaseLost, MemfaasError, TransportError, UsageError
from memfaas.fabric import boot_id
from memfaas.fabric.devices import local_device
from memfaas.messages import Arrived, Endpoint, Freed, Granted, HeldLease, LeaseGone, LeaseSpec, Memory, Target, short
from memfaas.server import memory, mover, process
from memfaas.server.adoption import Adopted, adopt_all
from memfaas.server.custody import Custody
from memfaas.server.descriptors import make_descriptors
from memfaas.server.home import Home
from memfaas.server.line import Line
from memfaas.server.placement import lease_bytes
from memfaas.server.pool import Pool
from memfaas.server.reclaim import Reclaimer
from memfaas.server.reports import Reports
from memfaas.server.victims import Moved
from memfaas.units import format_size

_HOME_S = 600.0
"""For a lease to move from a spill donor back to memory; nothing is lost when it takes longer."""
_LOOK_S = 10.0
"""How often each lease is looked at."""

logger = logging.getLogger(__name__)


class Custodian:
    """`run` must be running. `memory` says how much of it the donor has, and how much of that is taken."""

    def __init__(
        self,
        settings: DonorSettings,
        ticket_key: bytes,
        *,
        home: Home,
        pool: Pool,
        line: Line,
        reports: Reports,
        reclaimer: Reclaimer,
        memory: Callable[[], Memory],
    ) -> None:
        self.host = settings.listen_host or ""
        """Where clients on other nodes reach new leases."""
        self._settings = settings
        self._donor = settings.name
        self._ticket_key = ticket_key
        self._home = home
        self._pool = pool
        self._line = line
        self._reports = reports
        self._reclaimer = reclaimer
        self._memory = memory
        self._custodies: dict[bytes, Custody] = {}
        self._granting: dict[bytes, trio.Event] = {}
        self._stopping = False
        self._nursery: trio.Nursery

    async def run(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; what goes on for its leases does so in `nursery`. Starts with those of an earlier agent."""
        self._nursery = nursery
        await adopt_all(self._home, nursery, self._take_over)
        self._home.forget_all_but(one.endpoint.unix_path for one in self.custodies)
        task_status.started()
        while True:
            self._look()
            await trio.sleep(_LOOK_S)

    @property
    def custodies(self) -> list[Custody]:
        return list(self._custodies.values())

    @property
    def held(self) -> list[HeldLease]:
        return [one.held for one in self.custodies if one.state in ("serving", "moving")]

    @property
    def arriving(self) -> list[bytes]:
        return [one.spec.lease for one in self.custodies if one.state == "arriving"]

    @property
    def populated(self) -> int:
        """Bytes of all leases that are backed by pages."""
        return sum(one.populated for one in self.custodies)

    # --- how leases come ------------------------------------------------------------------------

    def _custody(
        self, spec: LeaseSpec, endpoint: Endpoint, descriptors: list[int], arrives_within: float | None
    ) -> Custody:
        custody = Custody(
            spec,
            endpoint,
            descriptors,
            donor=self._donor,
            ticket_key=self._ticket_key,
            spill=self._settings.backing is not None,
            arrives_within=arrives_within,
            on_change=self._reports.changed,
            on_arrived=lambda custody: self._nursery.start_soon(self._take_in, custody),
            on_doubt=lambda custody, target: self._nursery.start_soon(self._settle, custody, target),
            on_evicted=lambda custody, notice: self._nursery.start_soon(self._after_eviction, custody, notice),
            on_lost=lambda custody, reason: self._nursery.start_soon(self._lose, custody, reason),
            mover=self._move,
        )
        self._custodies[spec.lease] = custody
        return custody

    async def _take_over(self, adopted: Adopted) -> None:
        serving = adopted.serving
        custody = self._custody(serving.spec, serving.endpoint, adopted.descriptors, 0.0 if serving.arriving else None)
        await self._nursery.start(custody.keep, self._nursery, self._pool, adopted.function)
        logger.info("lease %s: adopted function %d", custody.name, adopted.function.process.pid)
        if serving.in_doubt is not None:
            self._nursery.start_soon(self._settle, custody, serving.in_doubt)

    async def grant(self, spec: LeaseSpec, arrives_within: float | None = None) -> Granted:
        """Makes memory for a lease, and has it served; `arrives_within`: once another donor has sent it, in that time.

        Comes to its end even when the one who asked goes away; what frees the lease meanwhile waits for that.
        Raises CapacityError, TransportError, UsageError.
        """
        if spec.lease in self._granting:
            raise UsageError(f"lease {short(spec.lease)} is being granted already")
        self._granting[spec.lease] = trio.Event()  # before anything else: the next request may be to free it
        try:
            await self._line.caught_up()  # whoever asked may have given up while this process stood still
        except trio.Cancelled:
            self._end_granting(spec.lease)
            raise

        async def grant() -> Granted:
            try:
                return await self._grant(spec, arrives_within)
            finally:
                self._end_granting(spec.lease)

        return await process.detached(self._nursery, grant)

    def _end_granting(self, lease: bytes) -> None:
        self._granting.pop(lease).set()

    async def _grant(self, spec: LeaseSpec, arrives_within: float | None) -> Granted:
        await self._check(spec)
        path = self._home.unix_path(spec.lease)
        # In a thread: to allocate a large file takes a while.
        descriptors, port = await trio.to_thread.run_sync(
            make_descriptors, spec, path, self.host, self._settings.backing
        )
        try:
            await self._check(spec)  # a reclaim, or another lease, may have taken the room meanwhile
        except MemfaasError:
            for descriptor in descriptors:
                os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        # What is registered is pinned in memory, and a disk is to relieve that.
        device = local_device(self._settings.device) if self._settings.backing is None else ""
        endpoint = Endpoint(node=boot_id(), unix_path=str(path), host=self.host, port=port, verbs=device)
        custody = self._custody(spec, endpoint, descriptors, arrives_within)
        try:
            await self._nursery.start(custody.keep, self._nursery, self._pool)
        except MemfaasError:
            await self._drop(custody, "no function could serve it")
            raise
        logger.info("lease %s of %s: granted, %s %s", custody.name, spec.tenant, spec.kind, format_size(spec.size))
        self._reports.must_follow()
        return Granted(endpoint=endpoint, memory=self._memory())

    async def _check(self, spec: LeaseSpec) -> None:
        """Whether a lease may be granted now: then this returns without having waited. Raises MemfaasError."""
        if self._stopping:
            raise TransportError(f"donor {self._donor} is stopping")
        if spec.lease in self._custodies:
            raise UsageError(f"lease {short(spec.lease)} is held already")
        what = f"donor {self._donor}: the {spec.kind}"
        try:
            memory.check_room(self._memory(), lease_bytes(spec.kind, spec.size), what)
        except CapacityError:
            await self._reports.send()  # the broker believed that there was room
            raise

    async def _take_in(self, custody: Custody) -> None:
        self._reclaimer.changed()
        await self._line.say(Arrived(held=custody.held))
        self._reports.must_follow()

    # --- how they go ----------------------------------------------------------------------------

    async def free(self, lease: bytes, reason: str) -> Freed:
        """Gives its memory back, if it is here; comes to its end even when the one who asked goes away."""

        async def free() -> Freed:
            if lease in self._granting:  # whoever asked for it has given up
                await self._granting[lease].wait()
            custody = self._custodies.get(lease)
            if custody is not None:
                await self._drop(custody, reason)
            return Freed(memory=self._memory())

        return await process.detached(self._nursery, free)

    def free_unasked(self, lease: bytes) -> None:
        """The broker says that it is over, and hears when it is."""
        self._nursery.start_soon(self._free_and_say, lease)

    async def _free_and_say(self, lease: bytes) -> None:
        await self.free(lease, "the broker says that it is over")
        await self._line.say(LeaseGone(lease=lease, reason="it was over"))

    async def free_all(self) -> None:
        """The donor is to stop: from now on nothing is granted."""
        self._stopping = True
        logger.info("donor %s: stopping, gives back %d leases", self._donor, len(self._custodies))
        for custody in self.custodies:
            await self._line.say(custody.gone(f"donor {self._donor} was stopped"))
        async with trio.open_nursery() as nursery:
            for custody in self.custodies:
                nursery.start_soon(self._drop, custody, "the donor was stopped")

    async def _drop(self, custody: Custody, reason: str) -> None:
        await custody.end(reason)
        self._forget(custody)

    def _forget(self, custody: Custody) -> None:
        if self._custodies.get(custody.spec.lease) is custody:
            del self._custodies[custody.spec.lease]
        self._reclaimer.changed()
        self._reports.must_follow()

    async def _lose(self, custody: Custody, reason: str) -> None:
        notice = custody.gone(reason)
        await self._drop(custody, reason)
        await self._line.say(notice)

    async def _after_eviction(self, custody: Custody, notice: LeaseGone) -> None:
        await self._line.say(notice)
        await custody.clear_up()
        self._forget(custody)

    # --- how they move --------------------------------------------------------------------------

    async def bring_home(self, lease: bytes) -> None:
        """Moves it to a donor that has it in memory; also comes to its end by itself. Raises MemfaasError."""

        async def move() -> None:
            custody = self._custodies.get(lease)
            if custody is None:
                raise LeaseLost(f"lease {short(lease)} is not here")
            await custody.move(trio.current_time() + _HOME_S)

        await process.detached(self._nursery, move)

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

    # --- how they are looked after --------------------------------------------------------------

    def _look(self) -> None:
        for custody in self.custodies:
            custody.sample()
            if custody.punched > 0 or custody.unsure:
                self._nursery.start_soon(self._restrain, custody)

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
