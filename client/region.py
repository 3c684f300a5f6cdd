"""A region: a lease used as raw memory."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from memfaas._native import RegionCore
from memfaas.client.keeper import Keeper
from memfaas.errors import ClosedError
from memfaas.messages import short

if TYPE_CHECKING:
    from memfaas import messages
    from memfaas.client.session import Session


class Region(RegionCore):
    """`size` bytes of a donor's memory, all zero at first. Made by `Session.lease`.

    `read`, `read_into`, `write`, `compare_swap` and `fetch_add` are inherited from the native core.
    The two atomic ones are atomic to each other on every fabric; plain reads and writes that race
    may see each other's bytes in part. An offset or length outside of the region is a UsageError.
    When the lease ends or its donor is lost, every operation raises LeaseLost.

    A child process that was forked may use its parent's region while the parent holds the lease.
    """

    def __init__(self, session: Session, place: messages.Place, owner: bytes) -> None:
        super().__init__(place.size)
        self.lease = place.lease
        self.owner = owner
        """The session that holds the lease; another one after a fork."""
        self._session = session
        self._released = False
        self.keeper = Keeper(
            f"lease {short(place.lease)}", place, session, current=self._get_link, install=self._set_link
        )

    @property
    def donor(self) -> str:
        """Whose memory it is."""
        return self.keeper.place.donor

    @property
    def fabric(self) -> str | None:
        """How it is reached: `shm` or `tcp`; None until it is first used."""
        link = self._get_link()
        return None if link is None else link.fabric

    @property
    def released(self) -> bool:
        return self._released

    def release(self) -> None:
        """Gives the memory back. Releasing twice, or after the lease was lost, does nothing."""
        if not self._released:
            self.shut()
            self._session.close_region(self)

    def shut(self) -> None:
        """The session is closed, and the lease with it."""
        self._released = True
        self._set_link(None)

    def _repair(self, shard: int, reason: int, attempt: int) -> None:
        if self._released:
            raise ClosedError(f"lease {short(self.lease)} was released")
        self.keeper.mend(reason, attempt)

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._released else f"{self.size} bytes on donor {self.donor}"
        return f"<Region {short(self.lease)}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a region cannot be pickled: its lease belongs to this session")
