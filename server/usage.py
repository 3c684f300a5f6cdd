"""Who used how much of whose memory: byte-seconds, added up for each tenant on each donor.

`Accounts` are told of every change and add up only then, so that a change costs the same however many
leases there are. They have no clock of their own and do no I/O; `take_up` reads the sums from a file, and
`keep` keeps them there, in the form of what `memfaas usage --json` prints.

What was leased while no broker ran is in nobody's account.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from memfaas.errors import UsageError
from memfaas.messages import DonorUsage, Usage, UsageReport

SAVE_EVERY_S = 60.0

logger = logging.getLogger(__name__)


@dataclass
class _Meter:
    """The integral over time of something that changes by steps."""

    total: float = 0.0
    """Byte-seconds, up to `at`."""
    level: int = 0
    """Bytes, since then."""
    at: float = 0.0

    def change(self, now: float, by: int) -> None:
        self.total = self.until(now)
        self.level += by
        self.at = now

    def until(self, now: float) -> float:
        return self.total + self.level * (now - self.at)


class _Account:
    """One tenant's, on one donor."""

    def __init__(self) -> None:
        self.leased = _Meter()
        self.populated = _Meter()


class _DonorAccount:
    def __init__(self) -> None:
        self.offered = _Meter()
        self.leased = _Meter()
        self.reclaims = 0
        self.reclaimed = 0
        self.in_time = 0


@dataclass
class _Lease:
    tenant: str
    donor: str
    size: int
    populated: int = 0


class Accounts:
    """`clock` gives seconds that only go on, `wall` seconds since 1970.

    Every method may be told again what it knows already.
    """

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self._since = wall()
        self._leases: dict[bytes, _Lease] = {}
        self._accounts: dict[tuple[str, str], _Account] = defaultdict(_Account)
        self._donors: dict[str, _DonorAccount] = defaultdict(_DonorAccount)
        self._leased: dict[str, int] = defaultdict(int)

    # --- what happens -----------------------------------------------------------------------------

    def lease_is_at(self, lease: bytes, tenant: str, donor: str, size: int) -> None:
        """From now on this lease takes `size` bytes of that donor's memory, and of no other's."""
        known = self._leases.get(lease)
        if known is not None:
            if (known.tenant, known.donor, known.size) == (tenant, donor, size):
                return
            self.lease_ended(lease)
        self._leases[lease] = _Lease(tenant, donor, size)
        self._change(tenant, donor, size)

    def lease_ended(self, lease: bytes) -> None:
        known = self._leases.pop(lease, None)
        if known is not None:
            self._accounts[known.tenant, known.donor].populated.change(self._clock(), -known.populated)
            self._change(known.tenant, known.donor, -known.size)

    def _change(self, tenant: str, donor: str, by: int) -> None:
        now = self._clock()
        self._accounts[tenant, donor].leased.change(now, by)
        self._donors[donor].leased.change(now, by)
        self._leased[tenant] += by

    def lease_is_populated(self, lease: bytes, size: int) -> None:
        """So many of its bytes are backed by pages."""
        known = self._leases.get(lease)
        if known is not None and known.populated != size:
            self._accounts[known.tenant, known.donor].populated.change(self._clock(), size - known.populated)
            known.populated = size

    def donor_offers(self, donor: str, size: int) -> None:
        """What it lends at most; nothing while it is away."""
        offered = self._donors[donor].offered
        if offered.level != size:
            offered.change(self._clock(), size - offered.level)

    def donor_reclaimed(self, donor: str, size: int, in_time: bool) -> None:
        account = self._donors[donor]
        account.reclaims += 1
        account.reclaimed += size
        account.in_time += in_time

    # --- what came of it --------------------------------------------------------------------------

    def leased(self, tenant: str) -> int:
        """Bytes of donors' memory that the tenant's leases take now."""
        return self._leased.get(tenant, 0)

    def report(self, tenant: str | None = None) -> UsageReport:
        """One tenant's part, without what donors gave to all; for None everything."""
        now = self._clock()
        return UsageReport(
            since=self._since,
            now=self._wall(),
            tenant=tenant,
            tenants=[
                Usage(
                    tenant=whose, donor=donor, leased=account.leased.until(now), populated=account.populated.until(now)
                )
                for (whose, donor), account in sorted(self._accounts.items())
                if tenant in (None, whose)
            ],
            donors=[
                DonorUsage(
                    donor=donor,
                    offered=account.offered.until(now),
                    leased=account.leased.until(now),
                    reclaims=account.reclaims,
                    reclaimed=account.reclaimed,
                    in_time=account.in_time,
                )
                for donor, account in sorted(self._donors.items())
                if tenant is None
            ],
        )

    def go_on_from(self, earlier: UsageReport) -> None:
        """Adds what an earlier broker had counted."""
        self._since = min(self._since, earlier.since)
        for usage in earlier.tenants:
            account = self._accounts[usage.tenant, usage.donor]
            account.leased.total += usage.leased
            account.populated.total += usage.populated
        for lent in earlier.donors:
            donor = self._donors[lent.donor]
            donor.offered.total += lent.offered
            donor.leased.total += lent.leased
            donor.reclaims += lent.reclaims
            donor.reclaimed += lent.reclaimed
            donor.in_time += lent.in_time


# --- the file -------------------------------------------------------------------------------------


def load(path: Path) -> UsageReport | None:
    """What was saved there; None when nothing was. Raises UsageError for a file that is something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=UsageReport)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot go on from the usage in {path}: {reason}; move it away to count anew") from error


def save(path: Path, report: UsageReport) -> None:
    """Whole or not at all, whenever the machine stops. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(report))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def take_up(accounts: Accounts, path: Path) -> None:
    """Goes on from what is in the file. Raises UsageError for a file that cannot be used."""
    earlier = load(path)
    if earlier is not None:
        accounts.go_on_from(earlier)
    try:
        save(path, accounts.report())
    except OSError as error:
        raise UsageError(f"cannot keep the usage in {path}: {error.strerror or error}") from error


async def keep(accounts: Accounts, path: Path) -> None:
    """Saves them now and then, and once more when it is cancelled."""
    try:
        while True:
            await trio.sleep(SAVE_EVERY_S)
            await _try_to_save(accounts, path)
    finally:
        with trio.CancelScope(shield=True):
            await _try_to_save(accounts, path)


async def _try_to_save(accounts: Accounts, path: Path) -> None:
    """Counting goes on while a disk is full."""
    try:
        await trio.to_thread.run_sync(save, path, accounts.report())
    except OSError as error:
        logger.error("the usage could not be saved in %s: %s", path, error)
