"""Bad days: what is full, too large, not there, not allowed, dead or hanging, as users see it.

Each is one clear exception, in time, and what was stored stays.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

import memfaas
from memfaas import auth, fabric, messages, rpc
from memfaas.addresses import parse_address
from memfaas.client.local import LocalCluster
from memfaas.errors import (
    AccessError,
    BrokerUnavailable,
    CapacityError,
    DeadlineExceeded,
    FabricUnavailable,
    LeaseLost,
    MemfaasError,
    StoreFull,
    TransportError,
    ValueLost,
    ValueTooLarge,
)
from memfaas.units import KIB, MIB
from tests.e2e.crew import Crew
from tests.e2e.scene import functions_of, kill, until

FABRICS: tuple[fabric.Choice, ...] = ("shm", "tcp")
TOO_LATE_S = 10.0
"""What an operation may take beyond its deadline on a machine that has other things to do."""


@pytest.fixture(params=FABRICS)
def choice(request: pytest.FixtureRequest) -> fabric.Choice:
    found: fabric.Choice = request.param
    return found


# --- full, and too large --------------------------------------------------------------------------------


def fill(store: memfaas.Store, value: bytes) -> list[bytes]:
    """Puts until the store is full; returns the keys that it took."""
    keys: list[bytes] = []
    while True:
        key = b"fill/%d" % len(keys)
        try:
            store.put(key, value)
        except StoreFull:
            return keys
        keys.append(key)


def test_a_full_store_keeps_what_it_has_and_takes_more_after_deletes(
    calm_cluster: LocalCluster, choice: fabric.Choice
) -> None:
    with memfaas.connect(calm_cluster.address, fabric=choice) as session:
        store = session.store("s", size="16MiB")
        value = os.urandom(100 * KIB)
        keys = fill(store, value)
        assert len(keys) * len(value) > store.spec.size / 2
        assert store.get_many(keys) == [value] * len(keys)
        used = store.info().used
        refused = [b"more/%d" % n for n in range(200)]
        with pytest.raises(StoreFull):
            store.put_many(dict.fromkeys(refused, value))
        with pytest.raises(StoreFull):
            store.put("large", os.urandom(12 * MIB))
        assert "large" not in store
        for key in refused:  # those that had room in a shard that was not full
            store.delete(key)
        assert store.info().used == used
        assert store.get_many(keys) == [value] * len(keys)

        other = os.urandom(len(value))
        for round_ in range(3):
            for key in keys[round_::2]:
                assert store.delete(key)
            for key in keys[round_::2]:
                store.put(key, other)
        assert sorted(store.keys()) == sorted(keys)
        store.clear()
        assert (store.info().used, len(store)) == (0, 0)
        store.put("large", os.urandom(12 * MIB))
        store.delete("large")
        assert len(fill(store, value)) >= len(keys)


def test_a_value_that_the_store_cannot_hold_leaves_nothing(calm_cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(calm_cluster.address, fabric=choice) as session:
        store = session.store("s", size="16MiB")
        store.put("kept", b"1")
        used = store.info().used
        with pytest.raises(ValueTooLarge):
            store.put("large", bytes(store.spec.size + 1))
        with pytest.raises(StoreFull):
            store.put("large", bytes(store.spec.size))
        with pytest.raises(StoreFull):
            store.put_from("large", io.BytesIO(bytes(3 * store.spec.size)))
        with pytest.raises(ValueTooLarge):
            store.put(bytes(64 * KIB + 1), b"")
        assert store.keys() == [b"kept"]
        assert store.info().used == used


def test_without_room_beyond_the_headroom_nothing_is_lent() -> None:
    with LocalCluster(donors=1, memory="64MiB", headroom="100TiB") as cluster, memfaas.connect(cluster.address) as one:
        with pytest.raises(CapacityError):
            one.store("s", size="8MiB")
        with pytest.raises(CapacityError):
            one.lease("1MiB")
        assert one.status().leases == []


# --- not there, or not allowed --------------------------------------------------------------------------


def test_a_broker_that_is_none(calm_cluster: LocalCluster, own_world: Path) -> None:
    known = parse_address(calm_cluster.address)
    wrong = own_world / "wrong-secret"
    auth.create_secret(wrong)
    try:
        with pytest.raises(AccessError):
            memfaas.connect(f"{known.host}:{known.port}", secret_file=wrong)
        with pytest.raises(AccessError):
            memfaas.connect(f"{known.host}:{known.port}", secret_file=own_world / "none")
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # nobody listens there
            with pytest.raises(BrokerUnavailable):
                memfaas.connect(f"127.0.0.1:{closed.getsockname()[1]}", secret_file=wrong)
        # A memory function is a peer of ours, but not a broker.
        with memfaas.connect(calm_cluster.address) as session:
            endpoint = session.lease("1MiB").keeper.place.endpoint
            with pytest.raises(TransportError):
                memfaas.connect(f"{endpoint.host}:{endpoint.port}", secret_file=known.secret_file)
    finally:
        wrong.unlink()


def spoil(store: memfaas.Store, change: Callable[[messages.Place], messages.Place]) -> None:
    """The store has no links, and other places."""
    for shard, keeper in enumerate(store.keepers):
        store._set_link(shard, None)
        keeper.place = change(keeper.place)


def with_ticket(place: messages.Place, **changes: object) -> messages.Place:
    ticket = msgspec.structs.replace(auth.Ticket.decode(place.ticket), **changes).encode()
    return msgspec.structs.replace(place, ticket=ticket)


def test_a_ticket_that_is_no_good_is_replaced_by_one_that_is(calm_cluster: LocalCluster, choice: fabric.Choice) -> None:
    """Nothing is opened with it, but the session may ask for a good one."""
    with memfaas.connect(calm_cluster.address, fabric=choice) as session:
        store = session.store("s", size="16MiB")
        changes: list[Callable[[messages.Place], messages.Place]] = [
            lambda place: with_ticket(place, expires=1.0),
            lambda place: with_ticket(place, expires=time.time() + 1e6),
            lambda place: with_ticket(place, lease=bytes(16)),
            lambda place: msgspec.structs.replace(place, proof_key=bytes(32)),
        ]
        keys = [some[0] for some in two_keys_of_each_shard(store).values()]
        for change in changes:
            spoil(store, change)
            spoilt = [keeper.place for keeper in store.keepers]
            for key in keys:
                store.put(key, b"1")
            for keeper, place in zip(store.keepers, spoilt, strict=True):
                assert keeper.place.ticket != place.ticket
                assert auth.Ticket.decode(keeper.place.ticket).lease == place.lease


# --- dead, or hanging -----------------------------------------------------------------------------------


class Busy:
    """Threads that put and get small and large values of one shard each, whatever happens.

    `stores`: through which to use each shard.
    """

    def __init__(self, stores: list[memfaas.Store]) -> None:
        keys = two_keys_of_each_shard(stores[0])
        self.errors: dict[int, list[BaseException]] = {shard: [] for shard in keys}
        self.rounds = dict.fromkeys(keys, 0)
        self.longest_s = dict.fromkeys(keys, 0.0)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(stores[shard], shard, key, length))
            for shard, some in keys.items()
            for key, length in zip(some, (100, 300_000), strict=True)
        ]

    def _run(self, store: memfaas.Store, shard: int, key: bytes, length: int) -> None:
        step = 0
        perhaps = {0}  # steps whose put failed: it may still take effect
        while not self._stop.is_set():
            step += 1
            started = time.monotonic()
            try:
                perhaps.add(step)
                store.put(key, step.to_bytes(4, "little") * (length // 4))
                perhaps.discard(step)
                put = time.monotonic()
                self.longest_s[shard] = max(self.longest_s[shard], put - started)
                started = put
                value = store.get(key)
                found = int.from_bytes(value[:4], "little")
                assert value == found.to_bytes(4, "little") * (length // 4)
                assert found == step or found in perhaps
                self.rounds[shard] += 1
            except BaseException as error:
                self.errors[shard].append(error)
            finally:
                self.longest_s[shard] = max(self.longest_s[shard], time.monotonic() - started)

    def goes_on(self, shard: int) -> None:
        before = self.rounds[shard]
        until(lambda: self.rounds[shard] > before + 20)

    def __enter__(self) -> Busy:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def two_keys_of_each_shard(store: memfaas.Store) -> dict[int, list[bytes]]:
    keys: dict[int, list[bytes]] = {}
    for number in range(1000):
        some = keys.setdefault(store._shard_of(b"%d" % number, 0), [])
        if len(some) < 2:
            some.append(b"%d" % number)
    return keys


@contextmanager
def busy_store(
    cluster: LocalCluster, choice: fabric.Choice, hasty: int | None = None, timeout_s: float = 10.0
) -> Iterator[tuple[memfaas.Store, Busy]]:
    """A store with traffic. The shard `hasty` is used by a session with a timeout of its own."""
    with (
        memfaas.connect(cluster.address, fabric=choice) as session,
        memfaas.connect(cluster.address, fabric=choice, timeout=timeout_s) as other,
    ):
        store = session.store("s", size="64MiB")
        stores = [store] * store.spec.shards
        if hasty is not None:
            stores[hasty] = other.store("s")
        with Busy(stores) as busy:
            for shard in busy.rounds:
                busy.goes_on(shard)
            yield store, busy


@pytest.mark.slow
def test_a_donor_that_vanishes_is_one_error_in_time_and_the_others_serve(
    cluster: LocalCluster, choice: fabric.Choice
) -> None:
    timeout_s = 0.5
    victim = 0
    survivor = 1 - victim
    with busy_store(cluster, choice, victim, timeout_s) as (store, busy):
        key = two_keys_of_each_shard(store)[victim][0]
        donor = int(store.keepers[victim].place.donor.removeprefix("donor"))
        lost = functions_of(cluster)[store.keepers[victim].place.lease.hex()[:8]]
        cluster.kill_donor(donor)
        kill(lost)
        if choice == "tcp":
            until(lambda: len(busy.errors[victim]) > 4)
            assert {type(error) for error in busy.errors[victim]} <= {DeadlineExceeded, FabricUnavailable}
        busy.goes_on(survivor)
        cluster.restart_donor(donor)  # which says that it no longer has the memory
        until(lambda: any(isinstance(error, LeaseLost) for error in busy.errors[victim]))
        busy.goes_on(survivor)
        with pytest.raises(LeaseLost, match=f"shard {victim} of store 's'"):
            store.get(key)
        with pytest.raises(LeaseLost):
            store.get_many([key])
        with memfaas.connect(cluster.address, fabric=choice) as newcomer:
            assert newcomer.stores()[0].lost_shards == [victim]
            with pytest.raises(LeaseLost):
                newcomer.store("s").get(key)
    assert busy.errors[survivor] == []
    assert {type(error) for error in busy.errors[victim]} <= {DeadlineExceeded, FabricUnavailable, ValueLost}
    assert busy.longest_s[victim] < timeout_s + TOO_LATE_S
    with memfaas.connect(cluster.address, fabric=choice) as session:
        fresh = session.store("s", size="64MiB")
        assert {keeper.place.donor for keeper in fresh.keepers} == {"donor0", "donor1"}
        assert key not in fresh


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that hang: they are there, and do not answer."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_memory_function_that_hangs_is_one_error_in_time(cluster: LocalCluster) -> None:
    timeout_s = 0.3
    victim = 0
    with busy_store(cluster, "tcp", victim, timeout_s) as (store, busy):
        key = two_keys_of_each_shard(store)[victim][0]
        with stopped(functions_of(cluster)[store.keepers[victim].place.lease.hex()[:8]]):
            until(lambda: len(busy.errors[victim]) > 4)
            busy.goes_on(1 - victim)
            with memfaas.connect(cluster.address, fabric="shm", timeout=2) as newcomer:
                found = newcomer.store("s")
                with pytest.raises(DeadlineExceeded):
                    found.get(key)  # it lets nobody in either, on no fabric
        busy.goes_on(victim)
    assert busy.errors[1 - victim] == []
    assert {type(error) for error in busy.errors[victim]} == {DeadlineExceeded}
    assert busy.longest_s[victim] < timeout_s + TOO_LATE_S


def test_who_has_the_memory_mapped_does_not_need_the_function(cluster: LocalCluster) -> None:
    with busy_store(cluster, "shm") as (_, busy), stopped(*functions_of(cluster).values()):
        for shard in busy.rounds:
            busy.goes_on(shard)
    assert not any(busy.errors.values())


@pytest.mark.slow
def test_a_broker_that_hangs_stops_only_who_needs_it(cluster: LocalCluster, choice: fabric.Choice) -> None:
    with (
        busy_store(cluster, choice) as (_, busy),
        memfaas.connect(cluster.address, timeout=0.3) as session,
    ):
        with stopped(cluster.broker_pid):
            operations: list[Callable[[], object]] = [
                lambda: session.store("t", size="8MiB"),
                lambda: session.lease("1MiB"),
                session.status,
            ]
            for operation in operations:
                with pytest.raises((DeadlineExceeded, BrokerUnavailable)):
                    operation()
            for shard in busy.rounds:
                busy.goes_on(shard)
        until(lambda: _succeeds(session.status))
        for shard in busy.rounds:
            busy.goes_on(shard)
    assert not any(busy.errors.values())


def _succeeds(operation: Callable[[], object]) -> bool:
    try:
        operation()
    except MemfaasError:
        return False
    return True


# --- idle connections -----------------------------------------------------------------------------------

IDLE = 1000


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * IDLE + 200
    if hard < needed:
        pytest.skip(f"needs {needed} open files, and the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def admitted_session(host: str, port: int, credentials: auth.Credentials) -> socket.socket:
    """A connection that has proved who it is, and then says nothing."""
    sock = socket.create_connection((host, port))
    hello = messages.Hello(version=messages.VERSION, role="session", name=credentials.name, nonce=auth.new_nonce())
    rpc.send_message_blocking(sock, hello)
    rpc.send_message_blocking(sock, auth.answer(hello, rpc.receive_message_blocking(sock), credentials.key))
    assert isinstance(rpc.receive_message_blocking(sock), messages.Welcome)
    return sock


@pytest.mark.slow
def test_a_thousand_idle_connections_disturb_nobody(cluster: LocalCluster, many_files: None, tmp_path: Path) -> None:
    address = parse_address(cluster.address)
    assert address.secret_file is not None
    credentials = auth.read_credentials(address.secret_file)
    with ExitStack() as stack:
        session = stack.enter_context(memfaas.connect(cluster.address))
        store = session.store("s", size="64MiB")
        place = store.keepers[0].place
        function = functions_of(cluster)[place.lease.hex()[:8]]
        crew = stack.enter_context(Crew(cluster.address, tmp_path))
        crew.join("shm")
        crew.join("tcp")
        idle: list[socket.socket] = []
        stack.callback(close_all, idle)
        for _ in range(IDLE):
            idle.append(admitted_session(address.host, address.port, credentials))
            idle.append(socket.socket(fileno=fabric.tcp.dial(place, time.monotonic() + TOO_LATE_S)))
            idle.append(socket.create_connection((address.host, address.port)))  # it does not say who it is
        crew.goes_on()
        crew.join("tcp")
        crew.goes_on()
        for choice in FABRICS:
            with memfaas.connect(cluster.address, fabric=choice) as newcomer:
                newcomer.store("s").put("a", b"1")
                newcomer.store("new", size="8MiB").put("a", b"1")
                newcomer.lease("1MiB").write(0, b"1")
        until(lambda: links_of(session, place.lease).get("tcp", 0) > IDLE)
        assert len(os.listdir(f"/proc/{function}/task")) > IDLE
        close_all(idle)
        until(lambda: links_of(session, place.lease).get("tcp", 0) < 20)
        until(lambda: len(os.listdir(f"/proc/{function}/task")) < 50)
        crew.goes_on()
        store.delete("a")
        crew.finish()


def close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def links_of(session: memfaas.Session, lease: bytes) -> dict[str, int]:
    return next(one.links for one in session.status().leases if one.lease == lease)
