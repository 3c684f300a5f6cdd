"""A trio loop in a thread of its own, for a session whose user has no loop, or a busy one.

Leases stay renewed also while the program computes, or blocks its own event loop.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from memfaas.errors import ClosedError

if TYPE_CHECKING:
    from memfaas.client.control import Control

T = TypeVar("T")


class ControlLoop:
    """Runs one `Control` in a daemon thread."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stopping: trio.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self, *, patient: bool) -> None:
        """Returns when the session is open; raises why it can't be. See `Control.run`."""
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=trio.run, args=(self._main, patient, ready), name="memfaas-control", daemon=True
        )
        self._thread.start()
        try:
            ready.result()
        except BaseException:  # also Ctrl-C: leave nothing behind that still tries
            if not ready.cancel():
                self.stop(join_s=0)
            raise

    async def _main(self, patient: bool, ready: concurrent.futures.Future[None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await nursery.start(partial(self.control.run, patient=patient))
            except Exception as error:
                if ready.set_running_or_notify_cancel():
                    ready.set_exception(error)
                return
            if ready.set_running_or_notify_cancel():
                ready.set_result(None)
                await self._stopping.wait()
            # else: nobody waits for the session any more
            await self.control.say_goodbye()
            nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, cancel: bool = True) -> T:
        """Runs an async function in the loop, and waits for it. Ctrl-C cancels it, or lets it end alone.

        Unlike `trio.from_thread.run` it may be called inside of another trio loop (and blocks it).
        Raises ClosedError when the loop has ended.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        scope = trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    try:
                        future.set_result(await function(*args))
                    except Exception as error:
                        future.set_exception(error)
            finally:  # also when the whole nursery is cancelled, which is not our scope
                if not future.done():
                    future.set_exception(ClosedError("the session was closed meanwhile"))

        self._soon(lambda: self._spawn(run, future))
        try:
            return future.result()
        except BaseException:
            if cancel and not future.done():
                self._soon(scope.cancel)
            raise

    def _spawn(self, run: Callable[[], Awaitable[None]], future: concurrent.futures.Future[T]) -> None:
        assert self._nursery is not None
        try:
            self._nursery.start_soon(run)
        except RuntimeError:  # the nursery has closed, and the loop is about to end
            future.set_exception(ClosedError("the session is closed"))

    def _soon(self, function: Callable[[], object]) -> None:
        try:
            assert self._token is not None
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            raise ClosedError("the session is closed") from None

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Calls it in the loop's thread after so long, unless the loop ends before. Never waits."""

        async def wait() -> None:
            await trio.sleep(delay_s)
            action()

        def start() -> None:
            assert self._nursery is not None
            with suppress(RuntimeError):  # the nursery has closed, and the loop is about to end
                self._nursery.start_soon(wait)

        with suppress(ClosedError):
            self._soon(start)

    def stop(self, join_s: float) -> None:
        """Ends the session with the broker, and the thread. May be called more than once."""
        stopping = self._stopping
        if stopping is not None:
            try:
                self._soon(stopping.set)
            except ClosedError:
                pass
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(join_s)
