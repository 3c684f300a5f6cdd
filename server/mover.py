"""The donor's part of a move: finds out from the broker where to, has the function send it, and settles doubts.

The lease is served here until it is certain that it is served there, and the other way round; see
docs/architecture.md, "How a lease moves".
"""

from __future__ import annotations

import logging

import trio

from memfaas.errors import DeadlineExceeded, LeaseLost, MemfaasError, TransportError
from memfaas.messages import LeaseGone, Relocate, Settle, Settled, Target
from memfaas.server.custody import Custody
from memfaas.server.line import Line
from memfaas.server.victims import Moved

_ASK_S = 5.0
_PAUSE_S = 0.2
_LEAST_S = 0.02
"""With less time than this no copy is begun."""
_RESUME_S = 10.0

logger = logging.getLogger(__name__)


async def move(custody: Custody, line: Line, deadline: float) -> Moved:
    """Moves a lease to another donor; its memory here is free when this returns.

    Tries one donor after the other until the deadline (by trio's clock). Raises MemfaasError when the lease
    stays here: CapacityError when no donor has room, DeadlineExceeded, TransportError; LeaseLost when
    nobody can tell any more where it is.
    """
    avoid: list[str] = []
    reason = "there was no time"
    while (left := deadline - trio.current_time()) > _LEAST_S:
        request = Relocate(lease=custody.spec.lease, epoch=custody.spec.epoch, timeout=left, avoid=avoid)
        target = await line.ask(request, Target, left)
        sent = await custody.send(target, max(_LEAST_S, deadline - trio.current_time()))
        there = target.place.donor
        if sent.outcome == "moved" or (sent.outcome == "in doubt" and await settle(custody, line, target)):
            await leave(custody, line, there)
            return Moved(spill=target.spill, pause=sent.pause)
        reason = sent.reason
        logger.warning("lease %s: could not be moved to donor %s: %s", custody.name, there, reason)
        avoid.append(there)
    raise DeadlineExceeded(f"lease {custody.name} could not be moved in time: {reason}")


async def leave(custody: Custody, line: Line, target: str) -> None:
    """It is served there: gives its memory here back."""
    reason = f"it was moved to donor {target}"
    await custody.end(reason)
    await line.say(LeaseGone(lease=custody.spec.lease, reason=reason, moved_to=target))


async def settle(custody: Custody, line: Line, target: Target) -> bool:
    """Asks until the broker knows whether the lease is served there; otherwise has it served here again.

    Raises LeaseLost when nobody can tell, TransportError when it cannot be served here.
    """
    request = Settle(lease=custody.spec.lease, epoch=target.place.epoch, donor=target.place.donor)
    while True:
        try:
            settled = await line.ask(request, Settled, _ASK_S)
            break
        except LeaseLost:
            raise
        except MemfaasError as error:
            if custody.state == "ending":
                raise TransportError(f"lease {custody.name} is over") from error
            logger.warning("lease %s: not settled yet: %s", custody.name, error)
            await trio.sleep(_PAUSE_S)
    if not settled.moved:
        await custody.resume(settled.epoch, _RESUME_S)
    return settled.moved
