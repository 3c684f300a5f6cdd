"""The donor watches its node, so that programs that nobody announced find memory too.

The kernel says when programs wait for memory (PSI) and when a control group comes near its limit; but
no event says that MemAvailable is low, so that is looked at: the more often the nearer it is to the
headroom, for no node gets there faster than it can allocate.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from memfaas import cgroups
from memfaas.messages import Reclaimed
from memfaas.server import spare
from memfaas.server.governor import Governor, Reading
from memfaas.server.reclaim import Reclaimer
from memfaas.units import GIB, format_size

HOLDER = "pressure"
DEADLINE_S = 2.0
"""Until then the headroom has to do."""
_ALLOCATION_RATE = 10 * GIB
"""Bytes per second that programs take at most."""
_OFTEN_S = 0.05
_SELDOM_S = 1.0
_CALMLY_S = 4.0
"""So often it is looked whether more can be lent."""
_CLOSELY_S = 0.25
# Without CAP_SYS_RESOURCE the kernel takes only windows of whole 2 s.
# It also cuts off the last byte, whatever it is.
_PSI_TRIGGER = b"some 100000 2000000\0"

logger = logging.getLogger(__name__)


class Gauge:
    """What `spare.available` says, for looking often.

    It may say too little, by what lies in processors' lists; `closely` counts that too, which takes a
    hundred times as long.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._meminfo = os.open(proc / "meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._groups = [group for group in cgroups.groups(proc) if group.limit() < cgroups.NO_LIMIT]
        self._listed = 0
        self._listed_at = float("-inf")

    def available(self) -> int:
        text = os.pread(self._meminfo, 256, 0)
        start = text.index(b"MemAvailable:") + len(b"MemAvailable:")
        node = int(text[start : text.index(b"kB", start)]) * 1024
        return min([node, *(group.available() for group in self._groups)])

    def closely(self) -> int:
        now = trio.current_time()
        if now - self._listed_at > _CLOSELY_S:
            self._listed_at = now
            self._listed = max(0, spare.available(self._proc) - self.available())
        return self.available() + self._listed

    def close(self) -> None:
        os.close(self._meminfo)


class Lookout:
    """Looks at a gauge, and while it is below `mark` makes `event` readable, an eventfd.

    In a thread of its own: there a look costs a third of what it costs among the donor's tasks.
    """

    def __init__(self, gauge: Gauge, headroom: int) -> None:
        self.mark = 0
        """Bytes; 0: nobody wants to know."""
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._gauge = gauge
        self._headroom = headroom
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._look, name="lookout")

    def _look(self) -> None:
        end = select.poll()
        end.register(self._end, select.POLLIN)
        pause_s = _OFTEN_S
        while not end.poll(pause_s * 1000):
            if self.mark == 0:
                pause_s = _SELDOM_S
                continue
            available = self._gauge.available()
            if available < self.mark:
                os.eventfd_write(self.event, 1)
            pause_s = pause_for(available, self._headroom)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join()
        os.close(self._end)
        os.close(self.event)


class Watch:
    """Wakes the donor when memory gets scarce. `watched` says by what; `lookout` is an eventfd that says so too."""

    def __init__(self, headroom: int, proc: Path = Path("/proc"), lookout: int | None = None) -> None:
        self.watched: list[str] = []
        self._epoll = select.epoll()
        self._pressure: set[int] = set()
        self._thresholds: set[int] = set()
        self._lookout = lookout
        if lookout is not None:
            self._epoll.register(lookout, select.EPOLLIN)
        self._watch_pressure(proc / "pressure/memory")
        for group in cgroups.groups(proc):
            self._watch_pressure(group.folder / "memory.pressure")
            self._watch_threshold(group, headroom)
        self.watched.append("MemAvailable")
        logger.info("memory pressure is watched by %s", ", ".join(self.watched))

    def _watch_pressure(self, file: Path) -> None:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        try:
            os.write(descriptor, _PSI_TRIGGER)
            self._epoll.register(descriptor, select.EPOLLPRI)
        except OSError:
            os.close(descriptor)
            return
        self._pressure.add(descriptor)
        self.watched.append(str(file))

    def _watch_threshold(self, group: cgroups.Group, headroom: int) -> None:
        """Version 1 of control groups tells when usage crosses a threshold."""
        control = group.folder / "cgroup.event_control"
        limit = group.limit()
        if not headroom < limit < cgroups.NO_LIMIT or not control.exists():
            return
        event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            usage = os.open(group.folder / group.usage, os.O_RDONLY | os.O_CLOEXEC)
            try:
                control.write_text(f"{event} {usage} {limit - headroom}")
            finally:
                os.close(usage)
        except OSError:
            os.close(event)
            return
        self._epoll.register(event, select.EPOLLIN)
        self._thresholds.add(event)
        self.watched.append(f"{group.folder} below {format_size(limit - headroom)}")

    async def wait(self, seconds: float) -> bool:
        """Returns after so long, or at once when the kernel says that memory is scarce: then True."""
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self._epoll.fileno())
        return self._said()

    def _said(self) -> bool:
        said = False
        for descriptor, what in self._epoll.poll(0):
            if what & select.EPOLLERR and descriptor in self._pressure:  # its group was removed
                self._epoll.unregister(descriptor)
                self._pressure.remove(descriptor)
                os.close(descriptor)
            elif descriptor in self._thresholds or descriptor == self._lookout:
                os.eventfd_read(descriptor)
                said = True
            else:
                said = True
        return said

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._epoll.fileno())
        self._epoll.close()
        for descriptor in self._pressure | self._thresholds:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def pause_for(available: int, headroom: int) -> float:
    """Seconds within which programs cannot take what is available beyond the headroom, or a moment."""
    return min(_SELDOM_S, max(_OFTEN_S, (available - headroom) / _ALLOCATION_RATE))


async def watch_node(
    reclaimer: Reclaimer,
    headroom: int,
    populated: Callable[[], int],
    on_change: Callable[[], None],
    on_reclaimed: Callable[[Reclaimed], Awaitable[None]],
    *,
    proc: Path = Path("/proc"),
) -> None:
    """Takes memory back when the node has too little, and lends it again later; until cancelled.

    `populated` says how many bytes leases have taken now, `on_change` is called when the offer has changed,
    and `on_reclaimed` with what came of it when memory was taken back.
    """
    governor = Governor(headroom, trio.current_time)
    gauge = Gauge(proc)
    try:
        with Lookout(gauge, headroom) as lookout, Watch(headroom, proc, lookout.event) as watch:
            async with trio.open_nursery() as nursery:
                while True:
                    reading = _read(reclaimer, gauge.available(), populated())
                    if governor.room(reading) < 0:
                        # Looked at closely before anything is taken back.
                        reading = _read(reclaimer, gauge.closely(), populated())
                    change = governor.decide(reading)
                    if change < 0:
                        logger.warning(
                            "this node has %s available, and %s are its headroom: takes back %s",
                            format_size(reading.available),
                            format_size(headroom),
                            format_size(-change),
                        )
                        await nursery.start(_take_back, reclaimer, -change, on_change, on_reclaimed)
                    elif change > 0:
                        logger.info("this node has memory again: lends %s more", format_size(change))
                        reclaimer.lend(HOLDER, change)
                        on_change()
                    # Who lends nothing has nothing to give, however little there is.
                    offered = reclaimer.offered
                    lookout.mark = max(0, headroom + offered - populated()) if offered else 0
                    await watch.wait(_CALMLY_S)
    finally:
        gauge.close()


async def _take_back(
    reclaimer: Reclaimer,
    size: int,
    on_change: Callable[[], None],
    on_reclaimed: Callable[[Reclaimed], Awaitable[None]],
    task_status: trio.TaskStatus[None],
) -> None:
    task_status.started()  # who waits for this goes on when the offer is lower, and asks for nothing twice
    reclaimed = await reclaimer.reclaim(size, DEADLINE_S, HOLDER)
    on_change()
    await on_reclaimed(reclaimed)


def _read(reclaimer: Reclaimer, available: int, populated: int) -> Reading:
    return Reading(
        available=available,
        populated=populated,
        offered=reclaimer.offered,
        reclaimed=reclaimer.reclaimed.get(HOLDER, 0),
    )
