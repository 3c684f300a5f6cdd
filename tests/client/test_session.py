"""Sessions, stores and regions on a local cluster of real processes."""

from __future__ import annotations

import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import memfaas
from memfaas import auth, fabric
from memfaas.client import keeper as keepers
from memfaas.client.local import LocalCluster
from memfaas.client.session import Session, _close_all
from memfaas.errors import (
    AccessError,
    CapacityError,
    ClosedError,
    FabricUnavailable,
    LeaseLost,
    MemfaasError,
    StoreFull,
    TicketExpired,
    UnknownStore,
    UsageError,
)
from memfaas.units import MIB


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_child(work: Callable[[], None]) -> None:
    """Runs it in a forked child; fails when it fails there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            _close_all()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- stores -----------------------------------------------------------------------------------------


def test_a_store_over_each_fabric(cluster: LocalCluster, choice: fabric.Choice) -> None:
    large = os.urandom(20 * MIB)
    with memfaas.connect(cluster.address, fabric=choice) as session:
        store = session.store("s", size="96MiB")
        store.put("a", b"1")
        store.put("large", large)
        store.put("x", np.arange(12).reshape(3, 4))
        assert store.get("a") == b"1"
        assert store.get("large") == large
        assert store.get_array("x").shape == (3, 4)
        store.put_many({f"k{n}": b"%d" % n for n in range(300)})
        assert store.get_many([f"k{n}" for n in range(300)]) == [b"%d" % n for n in range(300)]
        assert len(store) == 303
        assert store.delete("a")
        assert "a" not in store
        info = store.info()
        assert {shard.fabric for shard in info.shards} == {choice}
        assert {shard.fallback for shard in info.shards} == {None}
        assert {shard.donor for shard in info.shards} <= {"donor0", "donor1"}
        store.clear()
        assert store.info().keys == 0


def test_the_best_fabric_is_taken(session: Session) -> None:
    store = session.store("s", size="8MiB")
    store.put("a", b"1")
    assert "shm" in store.fabrics()


def test_two_sessions_share_a_store(cluster: LocalCluster, session: Session) -> None:
    store = session.store("shared", size="16MiB")
    store.put("a", b"1")
    with memfaas.connect(cluster.address, fabric="tcp") as second:
        other = second.store("shared")
        assert other.get("a") == b"1"
        other.put("a", b"2")
        assert second.stores()[0].sessions == 2
    assert store.get("a") == b"2"


def test_a_store_that_is_open_is_the_same_object(session: Session) -> None:
    assert session.store("s", size="8MiB") is session.store("s") is session.store("s", size="1GiB")


def test_a_store_ends_with_its_last_session(cluster: LocalCluster, session: Session) -> None:
    with memfaas.connect(cluster.address) as second:
        second.store("short", size="8MiB").put("a", b"1")
    with pytest.raises(UnknownStore):
        session.store("short")


def test_a_closed_store_is_free_and_can_be_made_again(session: Session) -> None:
    store = session.store("s", size="8MiB")
    store.put("a", b"1")
    store.close()
    with pytest.raises(UnknownStore):
        session.store("s")
    again = session.store("s", size="8MiB")
    assert "a" not in again
    with pytest.raises(ClosedError):
        store.get("a")


def test_a_persistent_store_outlives_its_session(cluster: LocalCluster, session: Session) -> None:
    with memfaas.connect(cluster.address) as second:
        second.store("kept", size="8MiB", persistent=True).put("a", b"1")
    assert session.store("kept").get("a") == b"1"
    session.delete_store("kept")
    with pytest.raises(UnknownStore):
        session.store("kept")


def test_a_store_that_is_deleted_is_lost_to_those_who_use_it(cluster: LocalCluster, session: Session) -> None:
    store = session.store("doomed", size="8MiB")
    store.put("a", b"1")
    with memfaas.connect(cluster.address) as second:
        second.delete_store("doomed")
    with pytest.raises(LeaseLost, match="doomed"):
        store.get("a")
    fresh = session.store("doomed", size="8MiB")
    assert fresh is not store
    assert "a" not in fresh


def test_only_what_others_delete_is_logged_as_a_loss(
    cluster: LocalCluster, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with memfaas.connect(cluster.address) as second:
        for name, deleter in (("mine", session), ("theirs", second)):
            keepers = session.store(name, size="8MiB").keepers
            deleter.delete_store(name)
            until(lambda keepers=keepers: all(keeper.gone for keeper in keepers))  # type: ignore[misc]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "shard 0 of store 'theirs' is lost: store 'theirs' was deleted" in warnings
    assert not any("mine" in message for message in warnings)


def test_compression_is_the_creators_choice(cluster: LocalCluster, session: Session) -> None:
    session.store("packed", size="8MiB", compression="lz4").put("a", b"abcd" * 10_000)
    with memfaas.connect(cluster.address, fabric="tcp") as second:
        store = second.store("packed", compression="none")
        assert store.get("a") == b"abcd" * 10_000
        assert store.info().used < 5000
        assert store.spec.compression == "lz4"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda session: session.store("none"), UnknownStore),
        (lambda session: session.store("odd", size="4MiB", compression="zip"), UsageError),
        (lambda session: session.store("odd", size="4MiB", on_reclaim="keep"), UsageError),
        (lambda session: session.delete_store("none"), UnknownStore),
        (lambda session: session.store("s", size="much"), UsageError),
        (lambda session: session.store("", size="8MiB"), UsageError),
        (lambda session: session.store("s", size="100GiB"), CapacityError),
        (lambda session: session.lease("100GiB"), CapacityError),
        (lambda session: session.lease("x"), UsageError),
    ],
)
def test_what_cannot_be_had(session: Session, call: Callable[[Session], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(session)
    assert session.status().leases == []


def test_what_is_free_takes_values_of_other_sizes(cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(cluster.address, fabric=choice) as session:
        store = session.store("mixed", size="8MiB")
        with pytest.raises(StoreFull):
            store.put_many((f"k{n}", bytes(60_000)) for n in range(1000))
        for key in sorted(store.keys())[::2]:
            store.delete(key)
        store.put("small", b"12345")
        store.put("page", bytes(4096))
        store.put("large", bytes(range(256)) * 2048)  # in pieces, for no span is whole
        assert store.get("large") == bytes(range(256)) * 2048
        store.close()


@pytest.mark.parametrize("key", [5, None, b"a" * 65_537, "\ud800", bytearray(b"a")])
def test_what_is_no_key(session: Session, key: Any) -> None:
    store = session.store("keys", size="4MiB")
    calls: list[Callable[[], Any]] = [
        lambda: store.put(key, b"1"),
        lambda: store.get(key),
        lambda: store.get_array(key),
        lambda: store.put_from(key, io.BytesIO(b"1")),
        lambda: store.keys(key),
        lambda: store.get_many([key]),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    assert store.keys() == []
    store.close()


def test_closing_a_session_ends_what_other_threads_wait_for(cluster: LocalCluster) -> None:
    for _ in range(10):
        session = memfaas.connect(cluster.address)
        ended = threading.Event()

        def work(session: Session = session, ended: threading.Event = ended) -> None:
            try:
                while True:
                    session.lease("1MiB").release()
            except MemfaasError:
                ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.02)
        session.close()
        assert ended.wait(30)
        thread.join()


def test_an_interrupted_request_for_memory_holds_none_that_nobody_knows(session: Session) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def lease_for_ever(timer: threading.Timer) -> None:
        timer.start()  # from now on it may come
        while True:
            session.lease("1MiB")

    for delay in (0.001, 0.003, 0.006, 0.01, 0.015):
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            lease_for_ever(timer)
        timer.join()
    until(lambda: {lease.lease for lease in session.status().leases} == set(session._regions))
    for region in list(session._regions.values()):
        region.release()


def test_memory_of_python_objects_is_neither_read_nor_written(session: Session) -> None:
    store, region = session.store("objects", size="4MiB"), session.lease("64KiB")
    objects = np.array([object(), object()])
    store.put("a", bytes(16))
    calls: list[Callable[[], Any]] = [
        lambda: store.get_into("a", objects),
        lambda: region.read_into(0, objects),
        lambda: region.write(0, objects),
        lambda: store.put("b", objects),
        lambda: store.get_into("a", np.zeros((4, 4))[:, ::2]),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    dates = np.zeros(2, "M8[s]")
    assert store.get_into("a", dates) == 16
    region.release()
    store.close()


def test_the_last_of_several_values_for_one_key_stays(cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(cluster.address, fabric=choice) as session:
        store = session.store("twice", size="4MiB")
        pairs: list[tuple[str | bytes, Any]] = [
            ("a", b"1"),
            (b"a", bytearray(b"2")),
            ("b", b"1"),
            (b"b", b"2"),
            ("b", b"3"),
        ]
        store.put_many(pairs)
        assert store.get_many(["a", "b"]) == [b"2", b"3"]
        store.close()


def test_another_tenant_sees_and_gets_nothing(cluster: LocalCluster, session: Session) -> None:
    store = session.store("private", size="8MiB")
    store.put("a", b"1")
    with memfaas.connect(cluster.address, tenant="mallory") as other:
        with pytest.raises(UnknownStore):
            other.store("private")
        assert other.stores() == []
        assert other.status().leases == []
        with pytest.raises(AccessError):
            other.locate(store.keepers[0].place.lease, 5)
        other.store("private", size="8MiB").put("a", b"2")
    assert store.get("a") == b"1"


def test_a_forged_ticket_opens_nothing(session: Session, choice: fabric.Choice) -> None:
    place = session.store("s", size="8MiB").keepers[0].place
    deadline = time.monotonic() + 60
    ticket = auth.Ticket.decode(place.ticket)
    late = msgspec.structs.replace(ticket, expires=time.time() + 1e6).encode()
    forgeries = {
        "no proof": msgspec.structs.replace(place, proof_key=bytes(32)),
        "longer life": msgspec.structs.replace(place, ticket=late),
        "garbage": msgspec.structs.replace(place, ticket=b"\x00garbage"),
    }
    for forged in forgeries.values():
        with pytest.raises(memfaas.MemfaasError) as caught:
            fabric.open_link(forged, choice, deadline, 1.0)
        assert not isinstance(caught.value, FabricUnavailable)
    old = msgspec.structs.replace(place, ticket=msgspec.structs.replace(ticket, expires=1.0).encode())
    with pytest.raises(TicketExpired):
        fabric.open_link(old, choice, deadline, 1.0)
    fabric.open_link(place, choice, deadline, 1.0).link.close()


def test_shm_that_fails_falls_back_loudly(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = session.store("s", size="8MiB")
    for keeper in store.keepers:
        nowhere = msgspec.structs.replace(keeper.place.endpoint, unix_path="/does/not/exist")
        keeper.place = msgspec.structs.replace(keeper.place, endpoint=nowhere)
    store.put("a", b"1")
    assert store.get("a") == b"1"
    assert "over tcp, which is slower" in caplog.text
    assert {shard.fallback is None for shard in store.info().shards} == {False}


def test_the_best_fabric_is_tried_again_and_taken_when_it_works(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "_BETTER_S", 0.1)
    store = session.store("s", size="8MiB")
    good = {keeper: keeper.place for keeper in store.keepers}
    for keeper, place in good.items():
        keeper._better_s = 0.1
        nowhere = msgspec.structs.replace(place.endpoint, unix_path="/does/not/exist")
        keeper.place = msgspec.structs.replace(place, endpoint=nowhere)
    store.put("a", b"1")
    assert "tcp" in {shard.fabric for shard in store.info().shards}
    for keeper, place in good.items():
        keeper.place = place
    until(lambda: store.get("a") == b"1" and {shard.fabric for shard in store.info().shards} <= {"shm", None})
    assert {shard.fallback for shard in store.info().shards} == {None}


def test_a_pinned_fabric_that_fails_is_an_error(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address, fabric="shm", timeout=0.5) as session:
        store = session.store("s", size="8MiB")
        for keeper in store.keepers:
            keeper._ask_broker = lambda deadline: None  # type: ignore[method-assign]
            nowhere = msgspec.structs.replace(keeper.place.endpoint, unix_path="/does/not/exist")
            keeper.place = msgspec.structs.replace(keeper.place, endpoint=nowhere)
        with pytest.raises(FabricUnavailable, match="/does/not/exist"):
            store.put("a", b"1")
        elsewhere = msgspec.structs.replace(store.keepers[0].place.endpoint, node="another")
        places = [msgspec.structs.replace(keeper.place, endpoint=elsewhere) for keeper in store.keepers]
        with pytest.raises(FabricUnavailable, match="another node"):
            memfaas.Store(session, store.spec, places)


def test_verbs_that_fails_falls_back_loudly(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    session.device = "none7"
    store = session.store("s", size="8MiB")
    for keeper in store.keepers:
        elsewhere = msgspec.structs.replace(keeper.place.endpoint, node="another", verbs="mlx5_0:1:3")
        keeper.place = msgspec.structs.replace(keeper.place, endpoint=elsewhere)
    store.put("a", b"1")
    assert store.get("a") == b"1"
    assert "could be reached over verbs, but" in caplog.text
    used = [shard for shard in store.info().shards if shard.fallback]
    assert {shard.fabric for shard in used} == {"tcp"}
    assert {"no RDMA device none7" in (shard.fallback or "") for shard in used} == {True}


def test_who_demands_verbs_gets_an_error_where_there_is_no_device(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMFAAS_DEVICE", "none7")
    with memfaas.connect(cluster.address, fabric="verbs", timeout=0.5) as session:
        store = session.store("s", size="8MiB")
        region = session.lease("1MiB")
        operations: list[Callable[[], Any]] = [
            lambda: store.put("a", b"1"),
            lambda: store.get("a"),
            lambda: region.read(0, 1),
        ]
        for operation in operations:
            with pytest.raises(FabricUnavailable, match="this node has no RDMA device none7"):
                operation()
        assert {shard.fabric for shard in store.info().shards} == {None}


# --- many at once -----------------------------------------------------------------------------------


def test_many_threads_use_one_store(cluster: LocalCluster, choice: fabric.Choice) -> None:
    errors: list[BaseException] = []
    with memfaas.connect(cluster.address, fabric=choice) as session:
        store = session.store("threads", size="64MiB")

        def work(number: int) -> None:
            try:
                for step in range(50):
                    key, value = f"{number}/{step % 7}", b"%d" % step * 100
                    store.put(key, value)
                    assert store.get(key) == value
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(store) == 40 * 7


WORKER = """
import memfaas, sys
with memfaas.connect(sys.argv[1]) as session:
    store = session.store("processes")
    for step in range(200):
        store.put(f"{sys.argv[2]}/{step}", b"%d" % step)
    print(len(store.keys(f"{sys.argv[2]}/")))
"""


@pytest.mark.slow
def test_several_processes_use_one_store(cluster: LocalCluster, session: Session) -> None:
    store = session.store("processes", size="32MiB")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, cluster.address, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    assert [worker.communicate(timeout=60)[0] for worker in workers] == ["200\n"] * 3
    assert len(store) == 600


# --- fork -------------------------------------------------------------------------------------------


def test_a_forked_child_has_links_and_a_session_of_its_own(cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(cluster.address, fabric=choice) as session:
        store = session.store("forked", size="16MiB")
        region = session.lease("4MiB")
        store.put("a", b"parent")
        region.write(0, b"parent")
        mine = session.status().sessions

        def child() -> None:
            assert store.get("a") == b"parent"
            store.put("b", b"child")
            assert region.read(0, 6) == b"parent"
            region.write(8, b"child")
            sessions = {one.session for one in session.status().sessions}
            assert len(sessions - {one.session for one in mine}) == 1
            region.release()  # ends the child's use of it alone
            session.close()

        in_child(child)
        assert store.get_many(["a", "b"]) == [b"parent", b"child"]
        assert region.read(8, 5) == b"child"
        assert len(session.status().leases) == len(store.keepers) + 1


def test_a_child_that_dies_at_once_does_not_disturb(session: Session) -> None:
    store = session.store("forked", size="8MiB")
    store.put("a", b"1")
    for _ in range(5):
        in_child(lambda: None)
        assert store.get("a") == b"1"
    in_child(lambda: sys.exit(0) if store.get("a") != b"1" else None)
    assert session.status().sessions


def test_a_child_may_fork_again(session: Session) -> None:
    store = session.store("forked", size="8MiB")
    store.put("a", b"1")

    def child() -> None:
        store.put("a", b"2")
        in_child(lambda: store.put("a", store.get("a") + b"3"))

    in_child(child)
    assert store.get("a") == b"23"


# --- regions ----------------------------------------------------------------------------------------


def test_a_region_is_raw_memory(cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(cluster.address, fabric=choice) as session:
        with session.lease("8MiB") as region:
            assert region.size == 8 * MIB
            assert region.read(0, 16) == bytes(16)
            assert region.write(100, b"abc") == 3
            buffer = bytearray(3)
            assert region.read_into(100, buffer) == 3
            assert buffer == b"abc"
            array = np.arange(1000.0)
            region.write(4096, array)
            back = np.empty(1000)
            region.read_into(4096, back)
            np.testing.assert_array_equal(back, array)
            assert region.compare_swap(0, 0, 5) == 0
            assert region.compare_swap(0, 0, 6) == 5
            assert region.fetch_add(0, 2) == 5
            assert int.from_bytes(region.read(0, 8), "little") == 7
            assert region.fabric == choice
            for bad in (
                lambda: region.read(8 * MIB, 1),
                lambda: region.write(-1, b"x"),
                lambda: region.fetch_add(4, 1),
            ):
                with pytest.raises(UsageError):
                    bad()
            assert "8388608 bytes" in repr(region)
        assert region.released
        region.release()
        with pytest.raises(ClosedError):
            region.read(0, 1)
        assert session.status().leases == []


def test_additions_of_many_threads_all_count(cluster: LocalCluster, choice: fabric.Choice) -> None:
    with memfaas.connect(cluster.address, fabric=choice) as session, session.lease("1MiB") as region:

        def add() -> None:
            for _ in range(200):
                region.fetch_add(64, 1)

        threads = [threading.Thread(target=add) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert region.fetch_add(64, 0) == 1200


# --- the session itself -------------------------------------------------------------------------------


def test_a_closed_session_says_so(cluster: LocalCluster) -> None:
    session = memfaas.connect(cluster.address)
    store, region = session.store("s", size="8MiB"), session.lease("1MiB")
    store.put("a", b"1")
    session.close()
    session.close()
    assert session.closed
    assert "closed" in repr(session)
    calls: list[Callable[[], Any]] = [
        lambda: session.store("s"),
        lambda: session.lease("1MiB"),
        session.status,
        lambda: store.get("a"),
        lambda: region.read(0, 1),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    store.close()
    region.release()


def test_closing_frees_all_at_once(cluster: LocalCluster, session: Session) -> None:
    with memfaas.connect(cluster.address) as second:
        second.store("s", size="16MiB").put("a", b"1")
        second.lease("4MiB").write(0, b"x")
        assert len(session.status().leases) >= 2
    assert session.status().leases == []
    until(lambda: all(donor.memory.leased == 0 for donor in session.status().donors))


def test_a_session_that_dies_is_noticed_and_its_leases_end(tmp_path: Path) -> None:
    with LocalCluster(donors=1, memory="64MiB", lease_ttl=0.5) as cluster, memfaas.connect(cluster.address) as session:
        code = (
            "import memfaas, os, signal, sys\n"
            "session = memfaas.connect(sys.argv[1])\n"
            "session.store('s', size='8MiB').put('a', b'1')\n"
            "session.store('kept', size='8MiB', persistent=True).put('a', b'1')\n"
            "session.lease('1MiB').write(0, b'x')\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        subprocess.run([sys.executable, "-c", code, cluster.address], check=False)
        until(lambda: [lease.store for lease in session.status().leases] == ["kept"])
        until(lambda: sum(donor.memory.leased for donor in session.status().donors) < 12 * MIB)
        assert session.store("kept").get("a") == b"1"


def test_a_session_is_renewed_for_as_long_as_it_is_open(tmp_path: Path) -> None:
    with LocalCluster(donors=1, memory="64MiB", lease_ttl=0.3) as cluster, memfaas.connect(cluster.address) as session:
        store = session.store("s", size="8MiB")
        store.put("a", b"1")
        time.sleep(1.2)
        assert store.get("a") == b"1"


def test_a_process_that_forgets_to_close_ends_cleanly(cluster: LocalCluster, session: Session) -> None:
    code = (
        "import memfaas, sys\n"
        "session = memfaas.connect(sys.argv[1])\n"
        "store = session.store('forgotten', size='8MiB')\n"
        "store.put('a', b'1')\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, cluster.address], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with pytest.raises(UnknownStore):
        session.store("forgotten")


def test_a_session_leaves_no_thread_and_no_descriptor(cluster: LocalCluster) -> None:
    def use() -> None:
        with memfaas.connect(cluster.address) as session:
            store = session.store("s", size="8MiB")
            store.put("a", b"1")
            with session.lease("1MiB") as region:
                region.write(0, b"x")

    use()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(5):
        use()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads


def test_addresses_and_secrets(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place, _, _ = cluster.address.removeprefix("memfaas://").partition("?")
    secret = cluster.folder / "secret"
    with memfaas.connect(place, secret_file=secret, tenant="alice") as session:
        assert session.tenant == "alice"
    monkeypatch.setenv("MEMFAAS_BROKER", cluster.address)
    with memfaas.connect() as session:
        assert session.address == cluster.address
    key = tmp_path / "bob.key"
    auth.write_tenant_key(key, auth.Credentials.of_tenant(auth.read_secret(secret), "bob"))
    with memfaas.connect(place, secret_file=key) as session:
        assert session.tenant == "bob"
    with pytest.raises(AccessError):
        memfaas.connect(place, secret_file=key, tenant="alice")
    auth.create_secret(tmp_path / "other")
    with pytest.raises(AccessError):
        memfaas.connect(place, secret_file=tmp_path / "other")


def test_handles_cannot_be_pickled_by_mistake(session: Session) -> None:
    for thing in (session, session.store("s", size="8MiB"), session.lease("1MiB")):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing)


async def test_a_sync_session_works_inside_of_an_event_loop(cluster: LocalCluster) -> None:
    with memfaas.connect(cluster.address) as session:
        store = session.store("s", size="8MiB")
        store.put("a", b"1")
        assert store.get("a") == b"1"


async def test_an_async_session(cluster: LocalCluster) -> None:
    async with memfaas.open_session(cluster.address) as session:
        store = await session.store("async", size="16MiB")
        await store.put("a", b"1")
        assert await store.get("a") == b"1"
        assert [one.spec.name for one in await session.stores()] == ["async"]
        region = await session.lease("1MiB")
        await region.write(0, b"abc")
        assert await region.read(0, 3) == b"abc"
        buffer = bytearray(3)
        await region.read_into(0, buffer)
        assert buffer == b"abc"
        assert await region.compare_swap(8, 0, 1) == 0
        assert await region.fetch_add(8, 1) == 1
        assert region.size == MIB
        await region.release()
        await store.close()
        with pytest.raises(UnknownStore):
            await session.store("async")
        assert len((await session.status()).donors) == 2
        await session.store("kept", size="8MiB", persistent=True)
        await session.delete_store("kept")
