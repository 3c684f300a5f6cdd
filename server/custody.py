"""The agent's side of one lease: it keeps the memory, and a function that serves it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
import trio

from memfaas import _native
from memfaas.errors import DeadlineExceeded, LeaseLost, MemfaasError, TransportError
from memfaas.messages import (
    Endpoint,
    FunctionReport,
    HeldLease,
    InDoubt,
    LeaseGone,
    LeaseSpec,
    Message,
    Received,
    Sent,
    Serve,
    Target,
    short,
)
from memfaas.server import memory
from memfaas.server.descriptors import Descriptors
from memfaas.server.function import control_path
from memfaas.server.function_peer import PUNCH_S, FunctionPeer
from memfaas.server.placement import lease_bytes
from memfaas.server.pool import Pool
from memfaas.server.victims import HoldingState, Moved, describe, may_drop
from memfaas.units import MIB, format_size

_LEEWAY = 2 * MIB
"""Bytes: the kernel may count a page of this size where only a part of it is the lease's."""
_DEATHS_WINDOW_S = 30.0
_RESTART_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
"""Between functions that die one after the other: by what is wrong with the node, perhaps; the memory is whole."""

logger = logging.getLogger(__name__)


class Custody:
    """One lease in the agent's hands: a `Holding`.

    `on_change` is called when its function reports something; `on_arrived` when a lease that another donor
    sends is here; `on_doubt` when nobody knows whether it was sent away; `on_evicted` when its memory is gone, for
    the one called to tell the broker and to clear up; `on_lost` when it can no longer
    be served, and then the one called ends it. `mover` moves it.
    """

    def __init__(
        self,
        spec: LeaseSpec,
        endpoint: Endpoint,
        descriptors: list[int],
        *,
        donor: str,
        ticket_key: bytes,
        spill: bool,
        arrives_within: float | None = None,
        on_change: Callable[[], None],
        on_arrived: Callable[[Custody], None],
        on_doubt: Callable[[Custody, Target], None],
        on_evicted: Callable[[Custody, LeaseGone], None],
        on_lost: Callable[[Custody, str], None],
        mover: Callable[[Custody, float], Awaitable[Moved]],
    ) -> None:
        self.endpoint = endpoint
        self.name = short(spec.lease)
        self.links: dict[str, int] = {}
        self.state: HoldingState = "serving" if arrives_within is None else "arriving"
        self.punched = 0
        """Bytes of it that are not for it to use now. Clients can write what its memory says of this, so it counts
        only as far as the kernel bears it out."""
        self.unsure = False
        """Whether its function may have punched more than it said, or less."""
        self._spec = spec
        self._size = lease_bytes(spec.kind, spec.size)
        self._descriptors = Descriptors(descriptors, self.name)
        self._donor = donor
        self._ticket_key = ticket_key
        self._spill = spill
        self._arrives_within = arrives_within
        self._on_change = on_change
        self._on_arrived = on_arrived
        self._on_doubt = on_doubt
        self._on_evicted = on_evicted
        self._on_lost = on_lost
        self._mover = mover
        self._function: FunctionPeer | None = None
        self._ending: FunctionPeer | None = None
        """One that no longer serves it, whose process may still be there."""
        self._found_function = trio.Event()
        self._lock = trio.Lock()
        self._pages = trio.Lock()
        self._free = trio.Event()
        self._cut: memory.Cut | None = None
        self._operations = (trio.current_time(), 0)
        self._deaths: list[float] = []

    @property
    def spec(self) -> LeaseSpec:
        return self._spec

    @property
    def bytes(self) -> int:
        """What it takes of the node."""
        return 0 if self._free.is_set() else self._size - self.punched

    @property
    def populated(self) -> int:
        """Bytes of it that are backed by pages."""
        return self._descriptors.populated

    @property
    def held(self) -> HeldLease:
        return HeldLease(spec=self._spec, endpoint=self.endpoint)

    def activity(self) -> float:
        """Operations per second since the last `sample`."""
        then, before = self._operations
        elapsed = trio.current_time() - then
        return (self._count_operations() - before) / elapsed if elapsed > 0 else 0.0

    def sample(self) -> None:
        """From now on its activity counts."""
        self._operations = (trio.current_time(), self._count_operations())

    def _count_operations(self) -> int:
        try:
            with self._descriptors.mapped() as mapped:
                return 0 if mapped is None else mapped.operations()
        except TransportError as error:
            logger.debug("%s", error)
            return self._operations[1]

    # --- having it served -----------------------------------------------------------------------

    async def keep(
        self,
        nursery: trio.Nursery,
        pool: Pool,
        function: FunctionPeer | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Has the lease served until `end`: a function that dies is replaced, on the same memory.

        `function` serves it already. Raises MemfaasError when there is none and the first could not serve it.
        """
        if function is None:
            function = await self._start(nursery, pool, fresh=True)
        else:
            await self._count_punched()
        task_status.started()
        try:
            while function is not None:
                await self._watch(function)
                function = await self._replace(nursery, pool)
        except MemfaasError as error:
            logger.error("lease %s: given up: %s", self.name, error)
            self._on_lost(self, str(error))

    async def _start(self, nursery: trio.Nursery, pool: Pool, *, fresh: bool) -> FunctionPeer:
        async with self._lock:  # nobody closes the descriptors meanwhile
            if self.state == "ending":
                raise LeaseLost(f"lease {self.name} is over")
            function = FunctionPeer(await pool.take())
            nursery.start_soon(function.run)
            try:
                serve = Serve(
                    donor=self._donor,
                    spec=self._spec,
                    endpoint=self.endpoint,
                    ticket_key=self._ticket_key,
                    fresh=fresh,
                    arrives_within=self._arrives_within if fresh else None,
                    spill=self._spill,
                )
                await function.serve(serve, self._descriptors.numbers)
            except BaseException:
                await function.kill()
                raise
            self._function = function
            logger.info("lease %s: served by function %d", self.name, function.process.pid)
            return function

    async def _watch(self, function: FunctionPeer) -> None:
        self._function = function
        self._found_function.set()
        function.listen(self._hear)
        await function.ended.wait()
        self._function, self._ending = None, function
        self._found_function = trio.Event()
        await function.kill()
        self._ending = None

    def _hear(self, message: Message) -> None:
        match message:
            case FunctionReport():
                self.links = message.links
                self._on_change()
            case Received():
                self._arrive()
            case InDoubt():
                self._on_doubt(self, message.target)

    def _arrive(self) -> None:
        if self.state == "arriving":
            self.state = "serving"
            logger.info("lease %s: arrived", self.name)
            self._on_arrived(self)

    async def _replace(self, nursery: trio.Nursery, pool: Pool) -> FunctionPeer | None:
        """Another function on the same memory; None when the lease is over. Raises when nobody can serve it."""
        if self.state == "arriving":
            if await self._descriptors.known_state() != "serving":
                raise LeaseLost("its function ended before all of it had come")
            self._arrive()
        while not self._is_ending():
            now = trio.current_time()
            self._deaths = [at for at in self._deaths if now - at < _DEATHS_WINDOW_S] + [now]
            pause = min(_LONGEST_PAUSE_S, _RESTART_PAUSE_S * (2 ** (len(self._deaths) - 1) - 1))
            logger.warning("lease %s: its function died, starting another on the same memory in %g s", self.name, pause)
            await trio.sleep(pause)
            if self._is_ending():
                break
            try:
                return await self._start(nursery, pool, fresh=False)
            except TransportError as error:
                logger.warning("lease %s: %s", self.name, error)
        return None

    def _is_ending(self) -> bool:
        return self.state == "ending"

    async def _some_function(self, timeout_s: float) -> FunctionPeer:
        """The function, once there is one again. Raises TransportError."""
        with trio.move_on_after(timeout_s):
            while self._function is None:
                await self._found_function.wait()
            return self._function
        raise TransportError(f"lease {self.name} has no function now")

    # --- moving it ------------------------------------------------------------------------------

    async def move(self, deadline: float) -> Moved:
        """Moves it to another donor; see `Holding.move`."""
        if self.state != "serving":
            raise TransportError(f"lease {self.name} cannot be moved while it is {self.state}")
        self.state = "moving"
        try:
            return await self._mover(self, deadline)
        finally:
            if self.state == "moving":
                self.state = "serving"

    async def send(self, target: Target, timeout_s: float) -> Sent:
        """Has the function send it. A function that died may have sent all of it: then that is in doubt."""
        function = await self._some_function(timeout_s)
        try:
            return await function.send(target, timeout_s)
        except DeadlineExceeded as error:
            return Sent(outcome="in doubt", reason=str(error))
        except MemfaasError as error:
            # Its own word, or it died; if before it froze the memory then nothing can have come of it.
            sure = not function.closed or self._descriptors.surely_served()
            return Sent(outcome="stayed" if sure else "in doubt", reason=str(error))

    async def resume(self, epoch: int, timeout_s: float) -> None:
        """It is not served elsewhere and never will be: it is served here, under this epoch. Raises MemfaasError."""
        self._spec = msgspec.structs.replace(self._spec, epoch=epoch)
        function = await self._some_function(timeout_s)
        await function.resume(epoch, timeout_s)

    # --- its pages ------------------------------------------------------------------------------

    async def punch(self, size: int) -> int:
        """Gives free bytes back to the kernel; see `Holding.punch`."""
        function = await self._some_function(PUNCH_S)
        async with self._pages:
            leeway = min(self._excess, _LEEWAY)
            self.unsure = True
            said = await function.punch(size)
            self.unsure = False
            before = self.punched
            self._believe(before + said, leeway)
            return self.punched - before

    async def unpunch(self) -> None:
        function = await self._some_function(PUNCH_S)
        async with self._pages:
            # It may do so without being able to say so; and until that is known, it has all of it.
            self.punched, self.unsure = 0, True
            await function.unpunch()
            self.unsure = False

    async def restrain(self) -> int:
        """Has pages cut out again that came back in what was punched; returns how many bytes are still too many.

        Its clients can bring them back, by no more than reading where nothing is theirs. Raises MemfaasError.
        """
        if self.unsure:
            async with self._pages:
                await self._count_punched()
        if self.state != "serving" or self._excess <= _LEEWAY:
            return 0
        logger.warning(
            "lease %s: %s takes %s more than what was left to it; they are cut out again",
            self.name,
            describe(self._spec),
            format_size(self._excess),
        )
        function = await self._some_function(PUNCH_S)
        async with self._pages:
            try:
                # Only what is free is cut out, so nothing may be held by that holder which is nobody.
                await function.unpunch()
                await function.punch(self.punched)
            except DeadlineExceeded as error:
                logger.warning("lease %s: nothing was cut out of it: %s", self.name, error)
        return self._excess if self.state == "serving" and self._excess > _LEEWAY else 0

    @property
    def _excess(self) -> int:
        """Bytes that it takes beyond what was left to it."""
        return max(0, self.populated - (self._size - self.punched))

    def _believe(self, punched: int, leeway: int = 0) -> None:
        self.punched = max(self.punched, min(punched, self._size, self._size - self.populated + leeway))

    async def _count_punched(self) -> None:
        """Whoever had it done, and whether or not its function could say so: it stands in the memory."""
        try:
            self._believe(await self._descriptors.with_memory(_punched))
            self.unsure = False
        except (TransportError, ValueError) as error:
            logger.debug("lease %s: what is punched cannot be told now: %s", self.name, error)

    # --- ending it ------------------------------------------------------------------------------

    def gone(self, reason: str) -> LeaseGone:
        """What to tell the broker when it ends now."""
        certain = self.state != "moving" and self._descriptors.surely_served()
        return LeaseGone(lease=self._spec.lease, reason=reason, spec=self._spec if certain else None)

    async def end(self, reason: str) -> None:
        """Gives the memory back and removes the sockets. Never raises MemfaasError."""
        self.state = "ending"
        async with self._lock:
            if self._descriptors.closed:
                return  # it was ended before
            freed = self._free.is_set() or await self._stop_function(reason)
            if not freed:
                try:
                    await self._cut_off(keep_index=False)
                except TransportError as error:
                    # No function and no agent has it any more, so it is free when its clients have let go of it.
                    logger.error("lease %s: its clients are not told that it has ended: %s", self.name, error)
            await self._close()
            logger.info("lease %s: its memory is given back: %s", self.name, reason)

    async def evict(self, reason: str) -> int:
        """Like `end`, but at once and without help of its function, which may hang; see `Holding.evict`.

        Of a cache its index goes last: to count the keys in it takes longer than to free all the rest.
        """
        if self._descriptors.closed or self._free.is_set():
            return 0
        with trio.CancelScope(shield=True):
            keys = await self._evict(reason)
        return keys

    async def _evict(self, reason: str) -> int:
        keys, cut = 0, self._cut
        if cut is None:
            cut = self._cut = await self._cut_off(keep_index=may_drop(self._spec))
            if cut.index is not None:
                return 0
        elif cut.index is not None:
            keys = await self._descriptors.with_memory(partial(memory.cut_off_index, cut.index))
        self._free.set()
        logger.info("lease %s: evicted: %s", self.name, reason)
        notice = LeaseGone(
            lease=self._spec.lease,
            reason=reason,
            dropped=keys if may_drop(self._spec) else None,
            # What was not even frozen has not been sent whole.
            spec=self._spec if cut.before == "serving" else None,
        )
        self._on_evicted(self, notice)
        return keys

    async def clear_up(self) -> None:
        """After `evict`: ends the function and removes the sockets."""
        async with self._lock:
            if not self._descriptors.closed:
                await self._close()

    async def _close(self) -> None:
        self._free.set()
        if self._function is not None:
            await self._function.kill()
        self._descriptors.close()
        for path in (Path(self.endpoint.unix_path), control_path(self.endpoint.unix_path)):
            path.unlink(missing_ok=True)

    async def _stop_function(self, reason: str) -> bool:
        function = self._function
        if function is None:
            return False
        try:
            await function.stop(reason)
            return True
        except MemfaasError as error:
            logger.warning("lease %s: its function did not stop by itself: %s", self.name, error)
            return False
        finally:
            await function.kill()

    async def _cut_off(self, *, keep_index: bool) -> memory.Cut:
        """What the function would have done: clients that map the memory see that it is revoked.

        Raises TransportError when nothing was done.
        """
        state, self.state = self.state, "ending"
        arriving = state == "arriving"
        try:
            cut = await self._descriptors.with_memory(partial(memory.cut_off, keep_index=keep_index))
        except TransportError:
            self.state = state
            raise
        for function in (self._function, self._ending):
            if self.endpoint.verbs and function is not None:
                await function.kill()  # what it has registered with the device is free only then
        if cut.index is not None:
            self._size, self.punched = self._size - cut.size, 0
        if arriving and cut.before == "serving":  # it had come just now, and was nowhere else any more
            self._on_arrived(self)
        return cut


def _punched(data: int, control: int) -> int:
    mapped = _native.Memory(data, control)
    try:
        return mapped.punched()
    finally:
        mapped.close()
