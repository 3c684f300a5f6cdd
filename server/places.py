"""What a client or a donor needs in order to open a lease: its place, with a ticket that is good from now."""

from __future__ import annotations

import time

from memfaas import auth
from memfaas.messages import Endpoint, LeaseSpec, Place
from memfaas.server.records import Lease, State


def place_of(lease: Lease, secret: bytes) -> Place:
    """Where a lease is. What nobody holds now has neither address nor ticket."""
    if lease.state is State.HELD:
        return place(lease.spec, lease.donor, lease.endpoint, secret)
    return _place(lease.spec, lease.donor, lease.endpoint, b"", b"")


def place(spec: LeaseSpec, donor: str, endpoint: Endpoint, secret: bytes) -> Place:
    ticket = auth.Ticket(
        tenant=spec.tenant,
        lease=spec.lease,
        epoch=spec.epoch,
        donor=donor,
        expires=time.time() + auth.TICKET_LIFE_S,
        uid=None,
    ).encode()
    return _place(spec, donor, endpoint, ticket, auth.proof_key(auth.ticket_key(secret, donor), ticket))


def _place(spec: LeaseSpec, donor: str, endpoint: Endpoint, ticket: bytes, proof_key: bytes) -> Place:
    return Place(
        lease=spec.lease,
        donor=donor,
        epoch=spec.epoch,
        kind=spec.kind,
        size=spec.size,
        endpoint=endpoint,
        ticket=ticket,
        proof_key=proof_key,
    )
