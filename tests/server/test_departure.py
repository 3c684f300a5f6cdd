"""What a function does that sends its lease to another donor's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from memfaas import rpc
from memfaas.fabric import tcp
from memfaas.messages import Done, Endpoint, LeaseSpec, Message, Refused, Sent, Target
from memfaas.server import departure
from memfaas.server.departure import Departure
from memfaas.server.places import place
from memfaas.testing.lease import BareLease, tcp_pair
from memfaas.units import MIB

LIMIT_S = 20.0
HOUR_S = 3600.0
SIZE = 8 * MIB
TARGET = Target(
    place=place(
        LeaseSpec(lease=b"L" * 16, tenant="ann", kind="shard", size=SIZE, epoch=2),
        "there",
        Endpoint(node="there", unix_path="/there", host="127.0.0.1", port=7),
        bytes(32),
    ),
    spill=False,
)


@pytest.fixture
def lease() -> Iterator[BareLease]:
    with BareLease("shard", SIZE) as lease:
        lease.store(lease.shm_link()).put(b"key", b"value")
        yield lease


@contextmanager
def receiver(monkeypatch: pytest.MonkeyPatch, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody who is dialled, in a thread."""
    near, far = tcp_pair()
    monkeypatch.setattr(tcp, "dial", lambda *_: near.detach())
    thread = threading.Thread(target=serve, args=(far,))
    thread.start()
    try:
        yield
    finally:
        near.close()
        thread.join()
        far.close()


def takes_all(answer: Message | None) -> Callable[[socket.socket], None]:
    """Receives the copy, and answers, or hangs up."""

    def serve(sock: socket.socket) -> None:
        with BareLease("shard", SIZE, arriving=True) as there, suppress(OSError):
            there.memory.receive(sock.fileno(), there.data_fd, LIMIT_S)
            if answer is not None:
                rpc.send_message_blocking(sock, answer)
            sock.shutdown(socket.SHUT_RDWR)

    return serve


def send(memory: Any, timeout_s: float = LIMIT_S) -> Sent:
    return Departure(memory, TARGET, lambda: None, lambda: None).run(timeout_s)


class Faulty:
    """Memory of which one method has a fault."""

    def __init__(self, memory: object, method: str) -> None:
        self._memory = memory
        self._method = method

    def __getattr__(self, name: str) -> object:
        if name == self._method:
            raise OverflowError("a number that is too large")
        return getattr(self._memory, name)


@pytest.mark.parametrize(
    ("answer", "outcome", "state"),
    [
        (Done(), "moved", "frozen"),
        (Refused(code="transport", text="no"), "stayed", "serving"),
        (None, "in doubt", "frozen"),
    ],
)
def test_who_sent_all_serves_again_only_when_the_other_says_no(
    lease: BareLease, monkeypatch: pytest.MonkeyPatch, answer: Message | None, outcome: str, state: str
) -> None:
    with receiver(monkeypatch, takes_all(answer)):
        assert send(lease.memory).outcome == outcome
    assert lease.memory.state == state


@pytest.mark.parametrize("method", ["copy_written", "drain", "copy_rest"])
def test_a_fault_while_it_is_copied_leaves_it_served_here(
    lease: BareLease, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with receiver(monkeypatch, takes_all(None)):
        sent = send(Faulty(lease.memory, method))
    assert (sent.outcome, lease.memory.state) == ("stayed", "serving")
    assert "OverflowError" in sent.reason


def test_a_fault_when_all_was_sent_leaves_it_in_doubt(lease: BareLease, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(_: socket.socket) -> Message:
        raise OverflowError("a number that is too large")

    monkeypatch.setattr(rpc, "receive_message_blocking", fault)
    with receiver(monkeypatch, takes_all(Done())):
        sent = send(lease.memory)
    assert (sent.outcome, lease.memory.state) == ("in doubt", "frozen")


@pytest.mark.parametrize("takes", ["nothing", "all but answers nothing"])
def test_who_is_sent_to_and_stands_still_is_given_up_before_the_time_is_over(
    lease: BareLease, monkeypatch: pytest.MonkeyPatch, takes: str
) -> None:
    gone = threading.Event()

    def serve(sock: socket.socket) -> None:
        with BareLease("shard", SIZE, arriving=True) as there:
            if takes != "nothing":
                there.memory.receive(sock.fileno(), there.data_fd, LIMIT_S)
            gone.wait()

    store = lease.store(lease.shm_link())
    for i in range(7):
        store.put(b"%d" % i, bytes(900_000))
    with receiver(monkeypatch, serve):
        monkeypatch.setattr(departure, "_PATIENCE", 0.2 / HOUR_S)
        try:
            sent = send(lease.memory, HOUR_S)
        finally:
            gone.set()
    assert sent.outcome == ("stayed" if takes == "nothing" else "in doubt")
