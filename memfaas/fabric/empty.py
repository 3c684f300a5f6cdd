"""A stand-in for a shard that has no memory behind it: nothing is in it, and nothing goes in."""

from __future__ import annotations

import os

from memfaas._native import Memory, ShmLink, format_memory, geometry
from memfaas.units import MIB

_SIZE = 128 * MIB
"""Of its heap, none of which has pages: in such a shard no value that a store puts in one piece is too large."""
_TIMEOUT_S = 10.0

_links: dict[int, ShmLink] = {}


def full_link() -> ShmLink:
    """A link to memory of this process, the same for all who ask: no keys, and every put is StoreFull."""
    pid = os.getpid()  # after a fork, the parent's is none of ours
    if pid not in _links:
        _links[pid] = _make()
    return _links[pid]


def _make() -> ShmLink:
    descriptors: list[int] = []
    try:
        for name, size in zip(("data", "control"), geometry("shard", _SIZE), strict=True):
            descriptors.append(os.memfd_create(f"memfaas-empty:{name}", os.MFD_CLOEXEC))
            os.ftruncate(descriptors[-1], size)
        data, control = descriptors
        format_memory(data, control, kind="shard", size=_SIZE, lease=bytes(16), store=bytes(16), shard=0, epoch=0)
        memory = Memory(data, control)
        memory.punch(data, _SIZE, _TIMEOUT_S)
        link = ShmLink(data, control, memory.attach(os.getpid(), 0), _TIMEOUT_S)
        memory.close()
        return link
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
