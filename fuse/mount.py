"""The process of a mount: from the session to the last request."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from memfaas import mounts
from memfaas.client.local import LocalCluster
from memfaas.client.session import Session, connect
from memfaas.client.store import Store
from memfaas.config import ClientSettings
from memfaas.errors import MemfaasError, UnknownStore, UsageError
from memfaas.fs.pulse import Pulse
from memfaas.fs.volume import Volume
from memfaas.fuse import _extra
from memfaas.fuse.extra import Extra
from memfaas.fuse.operations import Operations
from memfaas.units import MIB, format_size

_TICK_S = 1.0
_LOCAL_SHARE = 0.8
"""Of a local donor's memory, for the store: its index comes on top."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MountOptions:
    store: str
    folder: Path
    size: int | None = None
    """Of the store, if it has to be made."""
    read_only: bool = False
    allow_other: bool = False
    cache_s: float = 1.0
    local: bool = False
    """On a cluster of its own, on this machine, which ends with the mount."""
    flags: tuple[str, ...] = ()
    """For the kernel: of those of mount(8) that libfuse knows."""


def serve(options: MountOptions, settings: ClientSettings, ready: Callable[[], None]) -> None:
    """Mounts, calls `ready`, and answers requests until it is unmounted or gets SIGTERM or SIGINT.

    Raises UsageError when it cannot be mounted there, and what opening the store raises.
    """
    _check_folder(options.folder)
    if not _extra.fits():
        raise UsageError(
            f"memfaas was built for libfuse {_extra.built_for()}, and here is {_extra.here()}, "
            "whose structures are others: install memfaas and pyfuse3 anew"
        )
    with ExitStack() as stack:
        session = stack.enter_context(_session(options, settings, stack))
        store = _store(session, options)
        volume = Volume(store, cache_s=options.cache_s)
        stack.callback(volume.close)
        stack.enter_context(Pulse(store, volume.members))
        operations = Operations(volume, store._room, options.cache_s)
        extra = Extra(operations)
        _extra.install(extra)
        try:
            pyfuse3.init(operations, str(options.folder), _fuse_options(options))
        except RuntimeError as error:
            raise UsageError(f"cannot mount on {options.folder}: {error}") from error
        try:
            if not _extra.used():
                raise UsageError(
                    "memfaas and pyfuse3 were built for different libfuses, so locks would not hold: "
                    "install memfaas and pyfuse3 anew"
                )
            trio.run(_serve, volume, extra, options, ready)
            log.info("unmounting %s", options.folder)
        finally:
            pyfuse3.close(unmount=True)


def _check_folder(folder: Path) -> None:
    """Raises UsageError. What a killed mount left there is taken away."""
    if mounts.is_mounted(folder):
        if not mounts.is_dead(folder):
            raise UsageError(f"{folder} is a mount of memfaas already")
        log.warning("what was mounted on %s has no process any more: unmounting it", folder)
        mounts.unmount(folder, lazy=True)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder to mount on")


def _session(options: MountOptions, settings: ClientSettings, stack: ExitStack) -> Session:
    if not options.local:
        return Session.open(settings)
    size = options.size or 512 * MIB
    cluster = stack.enter_context(LocalCluster(memory=int(size / _LOCAL_SHARE) + 16 * MIB))
    return connect(cluster.address)


def _store(session: Session, options: MountOptions) -> Store:
    if options.local:
        return session.store(options.store, size=options.size or 512 * MIB)
    try:
        return session.store(options.store)
    except UnknownStore:
        if options.size is None:
            raise UnknownStore(
                f"there is no store {options.store!r}; say with --size how large it is to be, and it is made"
            ) from None
    made = session.store(options.store, size=options.size, persistent=True)
    log.info("created store %r of %s", options.store, format_size(made.spec.size))
    return made


def _fuse_options(options: MountOptions) -> set[str]:
    chosen = {"default_permissions", "subtype=memfaas", f"fsname={options.store}", *options.flags}
    if options.read_only:
        chosen.add("ro")
    if options.allow_other:
        chosen.add("allow_other")
    return chosen


async def _serve(volume: Volume, extra: Extra, options: MountOptions, ready: Callable[[], None]) -> None:
    failed: list[OSError] = []

    async def look() -> None:
        """Who waits for the mount shall find one that answers."""
        try:
            await trio.to_thread.run_sync(os.stat, options.folder, abandon_on_cancel=True)
        except OSError as error:
            failed.append(error)
            pyfuse3.terminate()
        else:
            log.info("mounted %r on %s", options.store, options.folder)
            ready()

    async with trio.open_nursery() as nursery:
        extra.nursery = nursery
        nursery.start_soon(_end_at_signal)
        nursery.start_soon(_tick, volume)
        nursery.start_soon(look)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()
    if failed:
        raise failed[0]


async def _end_at_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            pyfuse3.terminate()


async def _tick(volume: Volume) -> None:
    while True:
        await trio.sleep(_TICK_S)
        try:
            volume.tick()
        except (OSError, MemfaasError) as error:
            log.warning("%s", error)
