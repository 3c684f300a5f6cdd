"""How much memory a donor lends in all, as it starts."""

from __future__ import annotations

import logging

from memfaas import node
from memfaas.config import DonorSettings
from memfaas.errors import UsageError
from memfaas.server.governor import margin
from memfaas.units import MIB, format_size

logger = logging.getLogger(__name__)


def decide(settings: DonorSettings, spare: int, *, before: int, reclaimed: int) -> int:
    """Bytes. Warns of what is unwise, and raises UsageError when that is nothing.

    `spare`: what the node could give to programs, with what leases take of it already. An earlier agent lent `before`
    in all, and `reclaimed` of it are not lent now.
    """
    if settings.backing is None and not node.gives_huge_pages():
        logger.warning(
            "this node gives shared memory no 2 MiB pages, so it comes back about 50 times slower when it "
            "is needed (some 5 GiB/s); run as root: echo advise > %s",
            node.SHMEM_ENABLED,
        )
    lendable = spare - settings.headroom
    if settings.memory == "auto":
        return _as_much_as_possible(settings.headroom, lendable, before, reclaimed)
    if settings.memory > lendable:
        logger.warning(
            "donor %s is to lend %s, but the node could spare only %s beyond the headroom now",
            settings.name,
            format_size(settings.memory),
            format_size(max(0, lendable)),
        )
    return settings.memory


def _as_much_as_possible(headroom: int, lendable: int, before: int, reclaimed: int) -> int:
    keep = margin(headroom)  # or the next small program would take something back
    # Whoever has reclaimed it uses some of it already, perhaps, and no more than that.
    offer = max(lendable - keep, min(before, lendable - keep + reclaimed))
    if offer < MIB:
        raise UsageError(
            f"nothing to lend: {format_size(max(0, lendable + headroom))} are available on this node, "
            f"and --headroom keeps {format_size(headroom)} of it, with {format_size(keep)} to spare"
        )
    return offer
