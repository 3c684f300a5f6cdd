"""A broker on loopback, and peers that speak to it over real sockets."""

from __future__ import annotations

import json
import math
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import trio

from memfaas import _native, auth, fabric, messages, rpc
from memfaas.errors import CapacityError, MemfaasError, TransportError
from memfaas.messages import Endpoint, HeldLease, Memory, Message
from memfaas.server.broker import Broker
from memfaas.testing.lease import BareRegion, BareStore
from memfaas.units import MIB

SECRET = bytes(range(32))
LIMIT_S = 20.0
"""For what a test waits for: far more than it takes, so that only a hang is a failure."""

R = TypeVar("R", bound=Message)


async def eventually(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():  # noqa: ASYNC110  # what it looks at sends no events
            await trio.sleep(0.005)


class Served:
    """A running broker."""

    def __init__(self, broker: Broker, port: int, scope: trio.CancelScope) -> None:
        self.broker = broker
        self.port = port
        self._scope = scope

    def kill(self) -> None:
        self._scope.cancel()


async def serve_broker(nursery: trio.Nursery, *, port: int = 0, ttl: float = 30.0) -> Served:
    """Starts a broker in this process; `kill` drops all its connections and all that it knows."""
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    broker = Broker(SECRET, ttl)
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await broker.run(listeners)

    nursery.start_soon(run)
    return Served(broker, listeners[0].socket.getsockname()[1], scope)


class Client:
    """A session's side of a control connection."""

    def __init__(self, channel: rpc.Channel, session: bytes) -> None:
        self.channel = channel
        self.session = session
        self.gone: list[messages.LeaseGone] = []
        self.moved: list[messages.Place] = []

    async def on_request(self, message: Message) -> Message:
        raise AssertionError(f"the broker asked {message}")

    def on_notice(self, message: Message) -> None:
        if isinstance(message, messages.LeaseMoved):
            self.moved.append(message.place)
        else:
            assert isinstance(message, messages.LeaseGone)
            self.gone.append(message)

    async def ask(self, message: Message, reply: type[R]) -> R:
        return await self.channel.request(message, reply, LIMIT_S)

    async def open_store(
        self,
        name: str = "s",
        size: int | None = 8 * MIB,
        persistent: bool = False,
        on_reclaim: messages.OnReclaim = "migrate",
    ) -> messages.StoreOpened:
        request = messages.OpenStore(name=name, size=size, persistent=persistent, on_reclaim=on_reclaim)
        return await self.ask(request, messages.StoreOpened)

    async def open_region(self, size: int = MIB) -> messages.Place:
        return (await self.ask(messages.OpenRegion(size=size), messages.RegionGranted)).place

    async def locate(self, lease: bytes) -> messages.Place:
        return (await self.ask(messages.Locate(lease=lease), messages.Located)).place

    async def status(self) -> messages.StatusReport:
        return await self.ask(messages.Status(), messages.StatusReport)


@asynccontextmanager
async def client(
    port: int,
    tenant: str = "ann",
    session: bytes | None = None,
    stores: list[bytes] | None = None,
    leases: list[bytes] | None = None,
) -> AsyncIterator[Client]:
    stream = await rpc.dial("127.0.0.1", port, "session", auth.Credentials.of_tenant(SECRET, tenant))
    self = Client.__new__(Client)
    self.__init__(rpc.Channel(stream, self, "broker"), session or secrets.token_bytes(16))  # type: ignore[misc]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(self.channel.run)
        await self.ask(
            messages.OpenSession(session=self.session, stores=stores or [], leases=leases or []),
            messages.SessionOpened,
        )
        yield self
        nursery.cancel_scope.cancel()


class FakeDonor:
    """Speaks like a donor, and holds leases without any memory. Reconnects like one."""

    def __init__(self, name: str, offered: int = 256 * MIB, *, spill: bool = False) -> None:
        self.name = name
        self.offered = offered
        self.spill = spill
        self.arriving: dict[bytes, HeldLease] = {}
        self.asked: list[Message] = []
        """What it was asked that is not about one lease that begins or ends."""
        self.held: dict[bytes, HeldLease] = {}
        self.freed: list[bytes] = []
        self.before_grant: Callable[[messages.Grant], Awaitable[None]] | None = None
        self.before_receive: Callable[[messages.Receive], Awaitable[None]] | None = None
        self.channel: rpc.Channel | None = None
        self._scope = trio.CancelScope()

    def memory(self) -> Memory:
        leased = sum(one.spec.size for one in self.held.values())
        return Memory(
            offered=self.offered, leased=leased, populated=leased, available=self.offered - leased + MIB, headroom=MIB
        )

    async def run(self, port: int) -> None:
        credentials = auth.Credentials.of_donor(SECRET, self.name)
        self._scope = trio.CancelScope()
        with self._scope:
            while True:
                try:
                    stream = await rpc.dial("127.0.0.1", port, "donor", credentials)
                    await self._serve(stream)
                except TransportError:
                    pass
                await trio.sleep(0.02)

    def kill(self) -> None:
        """The agent dies; what it holds stays held until another `run`."""
        self._scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        channel = rpc.Channel(stream, self, "broker")
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await channel.run()
                nursery.cancel_scope.cancel()

            nursery.start_soon(serve)
            registered = await channel.request(
                messages.Register(
                    donor=self.name,
                    node="node-" + self.name,
                    host="127.0.0.1",
                    memory=self.memory(),
                    held=list(self.held.values()),
                    spill=self.spill,
                ),
                messages.Registered,
                LIMIT_S,
            )
            for lease in registered.drop:
                self.free(lease)
                await channel.notify(messages.LeaseGone(lease=lease, reason="dropped"))
            self.channel = channel
            await trio.sleep(math.inf)

    def free(self, lease: bytes) -> None:
        if self.held.pop(lease, None) is not None or self.arriving.pop(lease, None) is not None:
            self.freed.append(lease)

    async def on_request(self, message: Message) -> Message:
        match message:
            case messages.Grant():
                if self.before_grant is not None:
                    await self.before_grant(message)
                return self.make(message.spec, self.held)
            case messages.Receive():
                if self.before_receive is not None:
                    await self.before_receive(message)
                return self.make(message.spec, self.arriving)
            case messages.Reclaim():
                self.asked.append(message)
                return messages.Reclaimed(
                    donor=self.name, asked=message.size, freed=message.size, seconds=0.01, in_time=True, steps=[]
                )
            case messages.Lend():
                self.asked.append(message)
                return messages.Lent(size=MIB)
            case messages.MoveAway():
                self.asked.append(message)
                return messages.Done()
        assert isinstance(message, messages.Free)
        self.free(message.lease)
        return messages.Freed(memory=self.memory())

    def make(self, spec: messages.LeaseSpec, where: dict[bytes, HeldLease]) -> messages.Granted:
        if spec.size > self.memory().available - MIB:
            raise CapacityError("it would cut into the headroom")
        endpoint = Endpoint(node="node-" + self.name, unix_path=f"/{self.name}", host="127.0.0.1", port=7)
        where[spec.lease] = HeldLease(spec=spec, endpoint=endpoint)
        return messages.Granted(endpoint=endpoint, memory=self.memory())

    async def ask(self, message: Message, reply: type[R]) -> R:
        assert self.channel is not None
        return await self.channel.request(message, reply, LIMIT_S)

    async def say(self, message: Message) -> None:
        assert self.channel is not None
        await self.channel.notify(message)

    async def arrives(self, lease: bytes) -> None:
        """All of a lease has come."""
        self.held[lease] = self.arriving.pop(lease)
        await self.say(messages.Arrived(held=self.held[lease]))

    def on_notice(self, message: Message) -> None:
        raise AssertionError(f"the broker said {message}")


async def start_donors(nursery: trio.Nursery, served: Served, *donors: FakeDonor) -> None:
    for donor in donors:
        nursery.start_soon(donor.run, served.port)
    await eventually(lambda: all(donor.channel is not None and not donor.channel.closed for donor in donors))


async def refusal(what: Awaitable[object]) -> MemfaasError:
    """The error that this raises."""
    try:
        await what
    except MemfaasError as error:
        return error
    raise AssertionError("it was not refused")


# --- donors with real memory --------------------------------------------------------------------------


class DonorProcess:
    """A donor agent in a process of its own, with its zygote and functions."""

    def __init__(
        self, port: int, folder: Path, name: str = "d", stderr: IO[str] | None = None, **settings: Any
    ) -> None:
        self.name = name
        self._stderr = stderr
        self.home = folder / "run" / name
        secret = folder / "secret"
        if not secret.exists():
            secret.touch(0o600)
            secret.write_text(SECRET.hex())
        self._given = {
            "broker": f"127.0.0.1:{port}",
            "name": name,
            "memory": "256MiB",
            "headroom": 0,
            "runtime_dir": str(folder / "run"),
            "secret_file": str(secret),
            **settings,
        }
        self.process: subprocess.Popen[str] | None = None
        self.ready: dict[str, object] = {}

    async def start(self) -> None:
        """Until it is registered."""
        self.launch()
        with trio.fail_after(LIMIT_S):
            line = await trio.to_thread.run_sync(self._first_line, abandon_on_cancel=True)
        self.ready = json.loads(line)

    def launch(self) -> None:
        script = (
            "import json, logging, sys; logging.basicConfig(level=logging.INFO)\n"
            "from memfaas.config import DonorSettings\n"
            "from memfaas.server import donor\n"
            "donor.main(DonorSettings(**json.loads(sys.argv[1])))\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(self._given)],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def _first_line(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    async def kill(self) -> None:
        """The agent alone; its functions go on."""
        assert self.process is not None
        self.process.kill()
        await self.wait()

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await self.wait()

    async def wait(self) -> int:
        process, self.process = self.process, None
        assert process is not None
        with trio.fail_after(LIMIT_S):
            status = await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        assert process.stdout is not None
        process.stdout.close()
        return status


@asynccontextmanager
async def donor_process(served: Served, folder: Path, name: str = "d", **settings: Any) -> AsyncIterator[DonorProcess]:
    donor = DonorProcess(served.port, folder, name, **settings)
    try:
        await donor.start()
        yield donor
    finally:
        with trio.CancelScope(shield=True):
            if donor.process is None:  # it was killed, and its functions wait for an agent: take them along
                donor.launch()
                await eventually(lambda: not list(donor.home.glob("*.ctl")) or name in served.broker.tables.donors)
            await donor.stop()


def function_pid(place: messages.Place) -> int:
    """The process that serves a lease now: the one that listens for agents."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(place.endpoint.unix_path.replace(".sock", ".ctl"))
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def open_link(place: messages.Place, choice: fabric.Choice) -> _native.Link:
    return fabric.open_link(place, choice, time.monotonic() + LIMIT_S, LIMIT_S).link


def open_shard(place: messages.Place, choice: fabric.Choice = "shm") -> BareStore:
    store = BareStore(_native.part_size(place.size))
    store._set_link(0, open_link(place, choice))
    return store


def open_region(place: messages.Place, choice: fabric.Choice = "shm") -> BareRegion:
    region = BareRegion(place.size)
    region._set_link(open_link(place, choice))
    return region
