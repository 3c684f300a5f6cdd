"""Malformed, truncated, oversized and random frames on every port: one connection ends, nothing else."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgpack
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfaas import auth, messages, rpc
from memfaas.fabric import handshake
from memfaas.messages import Place
from memfaas.units import MIB
from tests.server.support import LIMIT_S, SECRET, DonorProcess, client, open_shard

TYPES = sorted(messages.TYPES)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
)
things = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.one_of(st.text(max_size=10), st.binary(max_size=17)), inner)
    ),
    max_leaves=12,
)


def field_names(name: str) -> list[str]:
    return list(messages.TYPES[name].__struct_fields__)


@st.composite
def near_messages(draw: st.DrawFn) -> bytes:
    """Messages that exist, with fields that they have, and whatever in them."""
    name = draw(st.sampled_from(TYPES))
    fields = draw(st.lists(st.sampled_from(field_names(name) or [""]), unique=True))
    packed: bytes = msgpack.packb([name, {field: draw(things) for field in fields}])
    return packed


payloads = st.one_of(st.binary(max_size=200), things.map(msgpack.packb), near_messages())


@st.composite
def channel_frames(draw: st.DrawFn) -> bytes:
    kind = draw(st.one_of(st.integers(0, 3), scalars))
    packed: bytes = msgpack.packb([kind, draw(st.one_of(st.integers(0, 5), scalars)), draw(payloads)])
    return packed


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def streams_of(payload: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    whole = st.lists(payload.map(framed), min_size=1, max_size=4).map(b"".join)
    cut = st.tuples(whole, st.integers(1, 60)).map(lambda pair: pair[0][: -pair[1]])
    oversized = st.integers(5000, 2**32 - 1).map(lambda n: struct.pack(">I", n) + bytes(100))
    return st.one_of(st.binary(max_size=300), whole, cut, oversized)


thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Cluster:
    """A broker and a donor in processes of their own, and a store that outlives its session."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "log").open("w+")
        (folder / "secret").touch(0o600)
        (folder / "secret").write_text(SECRET.hex())
        script = (
            "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
            "from memfaas.config import BrokerSettings\n"
            "from memfaas.server import broker\n"
            "broker.main(BrokerSettings(listen_port=0, secret_file=sys.argv[1]))\n"
        )
        self._broker = subprocess.Popen(
            [sys.executable, "-c", script, str(folder / "secret")], stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._broker.stdout is not None
        self.port = int(json.loads(self._broker.stdout.readline())["address"].rpartition(":")[2])
        self._donor = DonorProcess(self.port, folder, stderr=self._log)
        trio.run(self._donor.start)
        self.place: Place = trio.run(self._open)

    async def _open(self) -> Place:
        async with client(self.port) as ann:
            return (await ann.open_store("fuzzed", 8 * MIB, persistent=True)).places[0]

    def check(self) -> None:
        """Everything still works, and nothing went wrong inside."""
        self.place = trio.run(self._open)
        for fabric in ("shm", "tcp"):
            store = open_shard(self.place, fabric)
            store.put(b"key", b"value")
            assert store.get(b"key") == b"value"
        assert self._broker.poll() is None
        self._log.seek(0)
        assert "Traceback" not in self._log.read()

    def close(self) -> None:
        trio.run(self._donor.stop)
        self._broker.terminate()
        assert self._broker.wait(LIMIT_S) == 0
        assert self._broker.stdout is not None
        self._broker.stdout.close()
        self._log.close()


@pytest.fixture(scope="module")
def cluster(own_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = own_world / "fuzz"
    folder.mkdir()
    cluster = Cluster(folder)
    yield cluster
    cluster.close()


def connect_unix(place: Place) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(place.endpoint.unix_path)
    return sock


def connect_tcp(place: Place) -> socket.socket:
    return socket.create_connection((place.endpoint.host, place.endpoint.port), timeout=LIMIT_S)


def bombard(sock: socket.socket, data: bytes) -> None:
    with sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(LIMIT_S)
            while sock.recv(4096):
                pass
        except TimeoutError:
            raise
        except OSError:  # it has hung up already, and each step says so in its own way
            pass


DOORS: dict[str, Callable[[Cluster], socket.socket]] = {
    "broker": lambda cluster: socket.create_connection(("127.0.0.1", cluster.port), timeout=LIMIT_S),
    "function over shm": lambda cluster: connect_unix(cluster.place),
    "function over tcp": lambda cluster: connect_tcp(cluster.place),
}


@pytest.mark.parametrize("door", DOORS)
def test_nonsense_instead_of_a_handshake(cluster: Cluster, door: str) -> None:
    @thorough
    @given(data=streams_of(payloads))
    def throw(data: bytes) -> None:
        bombard(DOORS[door](cluster), data)

    throw()
    cluster.check()


hello = messages.Hello(version=messages.VERSION, role="session", name="ann", nonce=auth.new_nonce())


def flipped(data: bytes, at: int, bits: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


@pytest.mark.parametrize("door", DOORS)
def test_a_handshake_with_a_flipped_byte(cluster: Cluster, door: str) -> None:
    fabric: Literal["shm", "tcp"] = "shm" if "shm" in door else "tcp"
    place = cluster.place
    greeting: messages.Message = hello
    if door != "broker":
        greeting = messages.TicketHello(
            version=messages.VERSION, ticket=place.ticket, nonce=auth.new_nonce(), fabric=fabric
        )
    data = framed(messages.encode(greeting)) + framed(messages.encode(messages.Answer(proof=bytes(32))))

    @thorough
    @given(at=st.integers(0, 1000), bits=st.integers(1, 255))
    def throw(at: int, bits: int) -> None:
        bombard(DOORS[door](cluster), flipped(data, at, bits))

    throw()
    cluster.check()


@pytest.mark.parametrize("role", ["session", "donor"])
def test_nonsense_of_an_admitted_peer(cluster: Cluster, role: str) -> None:
    """It knows the secret, and ruins only its own connection."""
    credentials = (
        auth.Credentials.of_tenant(SECRET, "mad") if role == "session" else auth.Credentials.of_donor(SECRET, "mad")
    )

    async def send(data: bytes) -> None:
        stream = await rpc.dial("127.0.0.1", cluster.port, role, credentials)
        try:
            with trio.fail_after(LIMIT_S):
                await stream.send_all(data)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(stream)

    @thorough
    @given(data=streams_of(channel_frames()))
    def throw(data: bytes) -> None:
        trio.run(send, data)

    throw()
    cluster.check()


def test_nonsense_of_an_admitted_client_over_tcp(cluster: Cluster) -> None:
    place = cluster.place

    @thorough
    @given(data=st.binary(max_size=500))
    def throw(data: bytes) -> None:
        sock = connect_tcp(place)
        handshake.present_ticket(sock, place, "tcp", time.monotonic() + LIMIT_S)
        bombard(sock, data)

    throw()
    cluster.check()
