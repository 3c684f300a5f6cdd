"""What a function's door does about network devices, as far as it takes none to see it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio.testing

from memfaas import _native, messages, rpc
from memfaas.errors import FabricUnavailable
from memfaas.messages import Endpoint, LeaseSpec, Serve
from memfaas.server import door as door_module
from memfaas.server import memory
from memfaas.server.door import Door
from memfaas.server.doorman import Doorman
from memfaas.server.serving import Served

SPEC = LeaseSpec(lease=b"L" * 16, tenant="ann", kind="shard", size=8 << 20, epoch=1)
KEY = bytes(32)


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    made = list(memory.make("shard", SPEC.size, "test"))
    yield made
    for descriptor in made:
        os.close(descriptor)


@pytest.fixture
def mapped(descriptors: list[int]) -> _native.Memory:
    _native.format_memory(
        *descriptors, kind="shard", size=SPEC.size, lease=SPEC.lease, store=bytes(16), shard=0, epoch=1, arriving=False
    )
    return _native.Memory(*descriptors)


@pytest.fixture
def door(mapped: _native.Memory, descriptors: list[int]) -> Door:
    return Door(mapped, descriptors, Doorman(SPEC, "d", KEY), "rxe0:1:0", lambda: None)


def refusal(door: Door) -> str:
    with pytest.raises(FabricUnavailable) as caught:
        door._server.verbs_end(b"", bytes(32))
    return str(caught.value)


def test_it_stays_closed_until_it_was_opened_for_each_reason(door: Door) -> None:
    door.close_verbs("the lease is moving")
    door.close_verbs("memory is given back")
    door.open_verbs("memory is given back")
    assert "the lease is moving" in refusal(door)
    door.open_verbs("memory is given back")  # once more
    assert "the lease is moving" in refusal(door)
    door.open_verbs("the lease is moving")
    assert "the client speaks version 0" in refusal(door)


def test_memory_that_may_be_served_elsewhere_is_not_shown_to_devices(door: Door, mapped: _native.Memory) -> None:
    """As after a function that died while it sent the memory away."""
    mapped.freeze()
    assert "the lease is moving" in refusal(door)
    mapped.thaw()
    assert "the client speaks version 0" in refusal(door)
    mapped.revoke()
    assert "the lease is over" in refusal(door)


class End:
    welcome = bytes(80)


def test_a_welcome_that_does_not_go_out_at_once_ends_the_connection() -> None:
    near, far = socket.socketpair()
    with near, far:
        door_module._welcome(near, End())  # type: ignore[arg-type]
        assert len(far.recv(4096)) > len(End.welcome)
        near.setblocking(False)
        with suppress(BlockingIOError):
            while near.send(bytes(65536)):
                pass
        near.setblocking(True)
        door_module._welcome(near, End())  # type: ignore[arg-type]
        while far.recv(1 << 20):
            pass


@pytest.mark.parametrize("device", ["", "rxe0:1:0"])
async def test_a_lease_that_was_granted_without_a_device_has_none(
    descriptors: list[int], tmp_path: Path, device: str
) -> None:
    endpoint = Endpoint(node="n", unix_path=str(tmp_path / "u"), host="127.0.0.1", port=1, verbs=device)
    serve = Serve(donor="d", spec=SPEC, endpoint=endpoint, ticket_key=KEY, fresh=True)
    served = Served(serve, [*descriptors, -1, -1], lambda: None, lambda: None)
    await served.prepare()
    near, far = trio.testing.memory_stream_pair()
    await rpc.send_message(near, messages.VerbsHello(address=bytes(32)))
    with pytest.raises(FabricUnavailable) as caught:
        await served._door._queue_pair(far)  # type: ignore[arg-type]
    assert ("or has it on a disk" in str(caught.value)) == (not device)
