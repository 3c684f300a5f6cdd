"""What the broker hears of a donor without asking: when something that it should know has changed."""

from __future__ import annotations

from collections.abc import Callable

import trio

from memfaas.messages import DonorReport
from memfaas.server.line import Line
from memfaas.units import MIB

_LOOK_S = 10.0
"""How often the node's memory is looked at; nothing tells when it changes."""
_PAUSE_S = 1.0
_SOON_S = 0.01
_NOTICEABLE = 64 * MIB


class Reports:
    """Sent within `run`; `draft` makes one of how things are now."""

    def __init__(self, line: Line, draft: Callable[[], DonorReport]) -> None:
        self._line = line
        self._draft = draft
        self._changed = trio.Event()
        self._told: DonorReport | None = None
        """What the broker knows by the last of them; None when it may believe something else by now."""

    def changed(self) -> None:
        """To be called when a report may be different from now on."""
        self._changed.set()

    def must_follow(self) -> None:
        """To be called when an answer tells the broker of memory: such answers may overtake each other."""
        self._told = None
        self.changed()

    async def run(self) -> None:
        while True:
            with trio.move_on_after(_LOOK_S):
                await self._changed.wait()
            self._changed = trio.Event()
            if self._told is None or _differs(self._told, self._draft()):
                await self.send()
                await trio.sleep(_PAUSE_S)

    async def send(self) -> None:
        """Now, whether or not anything has changed."""
        if self._line.open:
            self._told = self._draft()
            await self._line.say(self._told)

    async def send_soon(self) -> None:
        """To look at the node takes a millisecond, which a reclaim has first. Who is placed here before is refused."""
        await trio.sleep(_SOON_S)
        await self.send()


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
