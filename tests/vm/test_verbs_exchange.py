"""Nonsense in the exchange of addresses, through the real door over a real socket, at either end."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memfaas import _native, auth, fabric, messages, rpc
from memfaas.errors import FabricUnavailable, MemfaasError
from memfaas.fabric import devices, handshake, verbs
from memfaas.messages import Endpoint, LeaseSpec, Place
from memfaas.server.door import Door
from memfaas.server.doorman import Doorman
from memfaas.server.places import place
from memfaas.testing.lease import BareStore, make_memory
from memfaas.units import MIB
from tests.e2e.scene import until
from tests.vm.hostile import Welcome

pytestmark = [pytest.mark.vm(cpus=2), pytest.mark.slow]

SECRET = bytes(range(32))
SIZE = 8 * MIB
PATIENCE_S = 20.0
thorough = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class World:
    """A door in a thread, which serves one lease, and a listener beside it that admits as the door does and then, over
    verbs, says whatever `says` gives for a client's hello."""

    def __init__(self, folder: Path) -> None:
        self.spec = LeaseSpec(lease=os.urandom(16), tenant="ann", kind="shard", size=SIZE, epoch=1)
        self.device = devices.chosen_device()
        self.says: Callable[[messages.Message], bytes] = lambda hello: b""
        self._folder = folder
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _run(self) -> None:
        self._token, self._scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
        data, control = make_memory("shard", SIZE)
        memory = _native.Memory(data, control)
        self._doorman = Doorman(self.spec, "d", auth.ticket_key(SECRET, "d"))
        self.door = Door(memory, [data, control], self._doorman, self.device, lambda: None)
        with self._scope:
            unix = trio.socket.socket(socket.AF_UNIX)
            await unix.bind(str(self._folder / "unix"))
            unix.listen()
            (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            (false,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.place, self.false = (self._place(one.socket.getsockname()[1]) for one in (tcp, false))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.door.run, trio.SocketListener(unix), tcp)
                nursery.start_soon(trio.serve_listeners, self._pretend, [false])
                self._ready.set()
        assert await trio.to_thread.run_sync(self.door.stop, PATIENCE_S)
        os.close(data)
        os.close(control)

    def _place(self, port: int) -> Place:
        endpoint = Endpoint(node="", unix_path="", host="127.0.0.1", port=port, verbs=self.device)
        return place(self.spec, "d", endpoint, SECRET)

    async def _pretend(self, stream: trio.SocketStream) -> None:
        if admitted := await self._doorman.admit(stream, "tcp", "verbs"):
            await rpc.send_message(stream, messages.Welcome())
            if admitted.fabric == "tcp":
                sock = socket.socket(fileno=stream.socket.detach())
                sock.setblocking(True)
                self.door._server.serve(sock.detach())
                return
            hello = await rpc.receive_message(stream)
            try:
                await stream.send_all(self.says(hello))
                await stream.send_eof()
                with trio.move_on_after(PATIENCE_S):
                    while await stream.receive_some():
                        pass
            except trio.BrokenResourceError:
                pass

    def link(self, where: Place) -> _native.VerbsLink:
        return verbs.open_link(where, self.device, time.monotonic() + PATIENCE_S, PATIENCE_S)

    def goes_on(self) -> None:
        self.serves()
        until(lambda: self.door.links() == {})

    def serves(self) -> None:
        store = BareStore(MIB)
        store._set_link(0, self.link(self.place))
        store.put(b"k", b"value")
        assert store.get(b"k") == b"value"

    def close(self) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("door"))
    yield world
    world.close()


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=9), st.binary(max_size=99)
)


def nearly(name: str, field: str, good: bytes) -> st.SearchStrategy[bytes]:
    """Frames like those of a message with one field, which holds some bytes."""
    flips = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(1, 255)), max_size=3)

    def flipped(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(good)
        for at, bits in changes:
            changed[at] ^= bits
        return bytes(changed)

    contents = st.one_of(flips.map(flipped), st.binary(min_size=len(good), max_size=len(good)), scalars)
    pack: Callable[[Any], bytes] = msgpack.packb
    whole = contents.map(lambda content: framed(pack([name, {field: content}])))
    strange = st.one_of(scalars, st.lists(scalars, max_size=3)).map(lambda thing: framed(pack(thing)))
    cut = st.tuples(whole, st.integers(1, 30)).map(lambda pair: pair[0][: -pair[1]])
    return st.one_of(whole, strange, cut, st.binary(max_size=200))


def exchange(world: World, data: bytes) -> None:
    """Gets in, says that, and waits until the other end hangs up or has nothing to say."""
    port = world.place.endpoint.port
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock:
        handshake.present_ticket(sock, world.place, "verbs", time.monotonic() + PATIENCE_S)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except ConnectionError:
            pass


def test_a_door_survives_every_hello(world: World) -> None:
    pair = _native.VerbsLink(world.device.encode(), 5).queue_pair()

    @thorough
    @given(data=nearly("VerbsHello", "address", pair.address))
    def throw(data: bytes) -> None:
        exchange(world, data)

    throw()
    until(lambda: world.door.links() == {})
    world.goes_on()


def test_requests_before_the_welcome_keep_nobody_else_out(world: World) -> None:
    """Their answers, which nobody takes, fill what the welcome has to go through."""
    pair = _native.VerbsLink(world.device.encode(), 5).queue_pair()
    stats = struct.pack("<4B3I4Q", 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    hello = framed(messages.encode(messages.VerbsHello(address=pair.address)))
    socks = []
    for _ in range(5):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", world.place.endpoint.port))
        handshake.present_ticket(sock, world.place, "verbs", time.monotonic() + PATIENCE_S)
        sock.settimeout(1)
        try:
            sock.sendall(hello + stats * 100_000)
        except TimeoutError:
            pass
        socks.append(sock)
    world.serves()
    for sock in socks:
        sock.close()
    world.goes_on()


def test_a_client_survives_every_welcome(world: World) -> None:
    good = Welcome.of(_welcome_of(world)).pack()
    outcomes: list[str] = []

    @settings(thorough, max_examples=25)
    @given(data=nearly("VerbsWelcome", "welcome", good))
    def throw(data: bytes) -> None:
        world.says = partial(_say, data)
        try:
            world.link(world.false)
        except MemfaasError as error:
            outcomes.append(type(error).__name__)

    throw()
    assert outcomes
    world.goes_on()


def _welcome_of(world: World) -> bytes:
    said: list[bytes] = []
    end = partial(world.door._server.verbs_end, world.device.encode())

    def says(hello: messages.Message) -> bytes:
        assert isinstance(hello, messages.VerbsHello)
        said.append(end(hello.address).welcome)
        return b""

    world.says = says
    with pytest.raises(MemfaasError):
        world.link(world.false)
    return said[0]


def test_a_welcome_with_random_numbers_is_refused(world: World) -> None:
    chance = random.Random(2)
    good = Welcome.of(_welcome_of(world))
    for forged in (good._replace(data=chance.getrandbits(48)), good._replace(first_key=chance.getrandbits(32))):
        said = framed(messages.encode(messages.VerbsWelcome(welcome=forged.pack())))
        world.says = partial(_say, said)
        with pytest.raises(MemfaasError):
            world.link(world.false)
    world.goes_on()


def test_a_connection_that_fails_its_test_is_left_for_tcp_loudly(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = msgspec.structs.replace(world.false.endpoint, node="another")
    said = framed(messages.encode(messages.VerbsWelcome(welcome=Welcome.of(_welcome_of(world)).pack())))
    world.says = partial(_say, said)  # of a queue pair that is connected to nobody
    there = msgspec.structs.replace(world.false, endpoint=elsewhere)
    opened = fabric.open_link(there, "auto", time.monotonic() + PATIENCE_S, PATIENCE_S)
    assert opened.link.fabric == "tcp"
    assert "does not answer ours" in (opened.fallback or "")
    assert "could be reached over verbs, but" in caplog.text
    store = BareStore(MIB)
    store._set_link(0, opened.link)
    store.put(b"k", b"over tcp")
    assert store.get(b"k") == b"over tcp"
    with pytest.raises(FabricUnavailable, match="does not answer ours"):
        fabric.open_link(there, "verbs", time.monotonic() + PATIENCE_S, PATIENCE_S)
    opened.link.close()
    world.goes_on()


def _say(said: bytes, hello: messages.Message) -> bytes:
    return said
