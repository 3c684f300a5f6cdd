"""Connections that have not yet said who they are: few of them, and none for long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Lobby:
    """At most `places` strangers at a time; one more sends the oldest away.

    An honest handshake takes milliseconds, so it is the silent ones that go, and nobody can keep
    the others out by opening connections.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._strangers: dict[trio.CancelScope, None] = {}

    def __len__(self) -> int:
        return len(self._strangers)

    @contextmanager
    def stranger(self, timeout_s: float) -> Iterator[trio.CancelScope]:
        """Within it, all is cancelled when time is up or the place is needed: see `cancelled_caught`."""
        while len(self._strangers) >= self._places:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
        with trio.move_on_after(timeout_s) as scope:
            self._strangers[scope] = None
            try:
                yield scope
            finally:
                self._strangers.pop(scope, None)
