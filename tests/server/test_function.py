"""A memory function's doors: who gets in, who does not, and who is only there to disturb."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import trio

from memfaas import auth, messages, rpc
from memfaas.errors import AccessError, FabricUnavailable, MemfaasError, ProtocolError, TicketExpired, from_code
from memfaas.fabric import handshake
from memfaas.messages import Place
from memfaas.server import function as function_module
from memfaas.server import memory
from memfaas.server.fds import FdStream
from memfaas.server.function import Function, control_path
from tests.server.support import (
    LIMIT_S,
    SECRET,
    Client,
    Served,
    client,
    donor_process,
    open_link,
    open_region,
    open_shard,
)

Fabric = Literal["shm", "tcp", "verbs"]


def knock(place: Place, fabric: Fabric) -> socket.socket:
    """A raw connection to the lease's function."""
    if fabric == "shm":
        sock = socket.socket(socket.AF_UNIX)
        while sock.connect_ex(place.endpoint.unix_path) != 0:
            time.sleep(0.001)  # the backlog is full
        sock.settimeout(LIMIT_S)
        return sock
    return socket.create_connection((place.endpoint.host, place.endpoint.port), timeout=LIMIT_S)


def present(place: Place, fabric: Fabric) -> messages.Welcome:
    with knock(place, fabric) as sock:
        return handshake.present_ticket(sock, place, fabric, time.monotonic() + LIMIT_S)


def with_ticket(place: Place, key: bytes | None = None, **changes: Any) -> Place:
    """A place whose ticket the broker's secret has signed, but says something else (or another secret has)."""
    ticket = msgspec.structs.replace(auth.Ticket.decode(place.ticket), **changes).encode()
    proof = auth.proof_key(auth.ticket_key(key or SECRET, place.donor), ticket)
    return msgspec.structs.replace(place, ticket=ticket, proof_key=proof)


FORGERIES: dict[str, tuple[Callable[[Place], Place], type[MemfaasError]]] = {
    "expired": (lambda place: with_ticket(place, expires=time.time() - 60), TicketExpired),
    "of another secret": (lambda place: with_ticket(place, key=b"x" * 32), AccessError),
    "prolonged by its holder": (
        lambda place: msgspec.structs.replace(
            place, ticket=msgspec.structs.replace(auth.Ticket.decode(place.ticket), expires=2e9).encode()
        ),
        AccessError,
    ),
    "without its proof": (lambda place: msgspec.structs.replace(place, proof_key=b"x" * 32), AccessError),
    "of another tenant": (lambda place: with_ticket(place, tenant="bob"), AccessError),
    "for another lease": (lambda place: with_ticket(place, lease=b"x" * 16), AccessError),
    "for another donor": (lambda place: with_ticket(place, donor="e"), AccessError),
    "no ticket at all": (lambda place: msgspec.structs.replace(place, ticket=b"ticket"), ProtocolError),
}


@pytest.mark.parametrize("fabric", ["shm", "tcp", "verbs"])
async def test_only_a_good_ticket_opens_the_door(served: Served, folder: Path, fabric: Fabric) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        place = await ann.open_region()
        for what, (forge, error) in FORGERIES.items():
            with pytest.raises(error) as caught:
                present(forge(place), fabric)
            # Who does not even know the secret stops at our proof, and the function would at theirs.
            assert type(caught.value) is error, what
        present(place, fabric)


@pytest.mark.parametrize("fabric", ["shm", "tcp", "verbs"])
async def test_a_forger_who_ignores_the_functions_proof_is_refused_by_it(
    served: Served, folder: Path, fabric: Fabric
) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        place = with_ticket(await ann.open_region(), key=b"x" * 32)
        with knock(place, fabric) as sock:
            hello = messages.TicketHello(
                version=messages.VERSION, ticket=place.ticket, nonce=auth.new_nonce(), fabric=fabric
            )
            rpc.send_message_blocking(sock, hello)
            assert isinstance(rpc.receive_message_blocking(sock), messages.Challenge)
            rpc.send_message_blocking(sock, messages.Answer(proof=b"x" * 32))
            refused = rpc.receive_message_blocking(sock)
            assert isinstance(refused, messages.Refused)
            assert isinstance(from_code(refused.code, refused.text), AccessError)
            with pytest.raises(EOFError):
                rpc.receive_message_blocking(sock)


async def test_a_recorded_handshake_is_worth_nothing(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        place = await ann.open_region()
        hello = messages.TicketHello(
            version=messages.VERSION, ticket=place.ticket, nonce=auth.new_nonce(), fabric="tcp"
        )
        with knock(place, "tcp") as sock:
            rpc.send_message_blocking(sock, hello)
            answer = auth.answer(hello, rpc.receive_message_blocking(sock), place.proof_key)
            rpc.send_message_blocking(sock, answer)
            assert isinstance(rpc.receive_message_blocking(sock), messages.Welcome)
        with knock(place, "tcp") as sock:
            rpc.send_message_blocking(sock, hello)
            rpc.receive_message_blocking(sock)
            rpc.send_message_blocking(sock, answer)
            assert isinstance(rpc.receive_message_blocking(sock), messages.Refused)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user to be refused as")
async def test_shm_is_for_the_user_that_the_ticket_names(served: Served, folder: Path) -> None:
    for path in (folder, folder.parent):
        path.chmod(0o711)
    async with donor_process(served, folder), client(served.port) as ann:
        place = await ann.open_region()
        nobody = 65534
        for uid, welcome in ((nobody, True), (nobody - 1, False), (None, True)):
            child = os.fork()
            if child == 0:
                try:
                    os.setuid(nobody)
                    present(with_ticket(place, uid=uid), "shm")
                    os._exit(0)
                except AccessError:
                    os._exit(1)
                finally:
                    os._exit(2)
            _, status = await trio.to_thread.run_sync(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == (0 if welcome else 1)
    folder.parent.chmod(0o700)


async def test_others_can_neither_list_a_donors_folder_nor_speak_as_its_agent(served: Served, folder: Path) -> None:
    async with donor_process(served, folder) as donor, client(served.port) as ann:
        place = await ann.open_region()
        assert donor.home.stat().st_mode & 0o777 == 0o711
        assert control_path(place.endpoint.unix_path).stat().st_mode & 0o777 == 0o600
        assert (donor.home / "lock").stat().st_mode & 0o777 == 0o600


async def test_many_clients_may_attach_and_too_many_are_sent_to_tcp(served: Served, folder: Path) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        place = await ann.open_region()
        socks: list[socket.socket] = []

        def attach_until_refused() -> None:
            for _ in range(5000):
                sock = knock(place, "shm")
                socks.append(sock)
                handshake.present_ticket(sock, place, "shm", time.monotonic() + LIMIT_S)

        with pytest.raises(FabricUnavailable, match="all its places are taken"):
            attach_until_refused()
        assert len(socks) > 64
        region = open_region(place, "tcp")
        region.write(0, b"x")
        for sock in socks:
            sock.close()
        with trio.fail_after(LIMIT_S):
            while True:  # as soon as they have left, there is room again
                try:
                    link = open_link(place, "shm")
                    break
                except FabricUnavailable:
                    await trio.sleep(0.05)
        assert link.fabric == "shm"


# --- strangers ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fabric", ["shm", "tcp"])
async def test_silent_strangers_neither_stay_nor_disturb(served: Served, folder: Path, fabric: Fabric) -> None:
    async with donor_process(served, folder), client(served.port) as ann:
        (place,) = (await ann.open_store()).places
        silent = [knock(place, fabric) for _ in range(1000)]
        store = open_shard(place, fabric)
        store.put(b"a", b"1")
        for sock in silent:
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass
            sock.close()
        assert open_shard(place, fabric).get(b"a") == b"1"


async def test_a_client_that_speaks_out_of_turn_stays_attached_until_it_leaves(served: Served, folder: Path) -> None:
    """It may still be using the memory, so nothing of it is cleaned up yet."""
    async with donor_process(served, folder), client(served.port) as ann:
        (place,) = (await ann.open_store()).places
        with knock(place, "shm") as sock:
            handshake.present_ticket(sock, place, "shm", time.monotonic() + LIMIT_S)
            sock.sendall(b"hello?")
            open_shard(place).put(b"a", b"1")
            await until_attached(ann, place, 1)


async def until_attached(ann: Client, place: Place, count: int) -> None:
    with trio.fail_after(LIMIT_S):
        while True:
            (lease,) = [one for one in (await ann.status()).leases if one.lease == place.lease]
            if lease.links.get("shm", 0) == count:
                return
            await trio.sleep(0.05)


# --- without an agent -----------------------------------------------------------------------------------


async def test_a_function_that_no_agent_adopts_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(function_module, "ORPHAN_LIFE_S", 0.2)
    data, control = memory.make("region", 1 << 20, "test")
    unix_path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(unix_path))
        unix.listen()
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        async with trio.open_nursery() as nursery:
            theirs_stream = FdStream(trio.socket.from_stdlib_socket(theirs))
            nursery.start_soon(lambda: Function(nursery).serve_agent(theirs_stream, adopts=False))
            agent_stream = FdStream(trio.socket.from_stdlib_socket(ours))
            channel = rpc.Channel(agent_stream, Deaf(), "function")
            nursery.start_soon(channel.run)
            spec = messages.LeaseSpec(lease=b"L" * 16, tenant="ann", kind="region", size=1 << 20, epoch=1)
            endpoint = messages.Endpoint(node="n", unix_path=str(unix_path), host="127.0.0.1", port=1)
            agent_stream.attach([os.dup(data), os.dup(control), os.dup(unix.fileno()), os.dup(tcp.fileno())])
            serve = messages.Serve(donor="d", spec=spec, endpoint=endpoint, ticket_key=b"k" * 32, fresh=True)
            await channel.request(serve, messages.Done, LIMIT_S)
            assert os.fstat(data).st_size > 0
            await channel.aclose()
        assert os.fstat(data).st_size == 0
    for descriptor in (data, control):
        os.close(descriptor)


class Deaf:
    async def on_request(self, message: messages.Message) -> messages.Message:
        raise AssertionError(message)

    def on_notice(self, message: messages.Message) -> None:
        pass
