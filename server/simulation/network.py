"""How long it takes to copy bytes from node to node.

Each node sends and receives at a rate that its copies share evenly; the network between the nodes is never
the bottleneck. A copy goes on in pieces, and each piece has the share that is right when it begins.
"""

from __future__ import annotations

from collections import Counter

import trio

from memfaas.units import MIB

_PIECE = 64 * MIB
_PIECES = 16
"""At most, so that the copy of a large lease does not cost more events than that of a small one."""


class Network:
    """`rate` is what one node sends, and what it receives, in bytes per second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.sent = 0
        """Bytes that were copied so far, also those of copies that were broken off."""
        self._slow: dict[str, float] = {}
        self._sending: Counter[str] = Counter()
        self._receiving: Counter[str] = Counter()

    def slow_down(self, node: str, rate: float) -> None:
        """What this node receives goes to a medium that takes only so many bytes per second."""
        self._slow[node] = rate

    async def copy(self, source: str, target: str, size: int) -> None:
        """Returns when `size` bytes are there."""
        self._sending[source] += 1
        self._receiving[target] += 1
        piece = max(_PIECE, -(-size // _PIECES))
        try:
            while size > 0:
                now = min(piece, size)
                await trio.sleep(now / self._share(source, target))
                self.sent += now
                size -= now
        finally:
            self._sending[source] -= 1
            self._receiving[target] -= 1

    def _share(self, source: str, target: str) -> float:
        into = min(self.rate, self._slow.get(target, self.rate))
        return min(self.rate / self._sending[source], into / self._receiving[target])
