"""Whatever arrives as the copy of a lease, the receiver takes it or refuses it, and stays whole itself."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memfaas._native import LinkDown, ShmLink
from memfaas.errors import KeyAbsent, StoreFull, ValueCorrupt
from memfaas.testing.lease import Arrival, BareLease, BareStore, Kind, tcp_pair

SIZE = {"shard": 4 << 20, "region": (1 << 20) + 77}
LIMIT_S = 30.0
FRAME = struct.Struct("<IIQQ")
DATA, SPANS, STRIPES, WRITERS, END = range(1, 6)
GEOMETRY = 120
"""Bytes of a memory's header; its seed, which comes along, is behind them."""
TOP = 1 << 64
VALUES = {b"key-%d" % i: random.Random(i).randbytes(1 << i) for i in range(19)}

Frame = tuple[int, int, int, bytes]
"""Kind, offset, the length that it tells, and what follows."""


@cache
def frames(kind: Kind) -> tuple[Frame, ...]:
    """A copy of a lease that is in use, as it is sent."""
    parts: list[bytes] = []
    near, far = tcp_pair()
    with BareLease(kind, SIZE[kind]) as lease, near:
        if kind == "shard":
            lease.store(lease.tcp_link()).put_many(VALUES)
        else:
            lease.region(lease.shm_link()).write(1, VALUES[b"key-18"])
        lease.hang_up()

        def listen() -> None:
            with far:
                while part := far.recv(1 << 20):
                    parts.append(part)

        thread = threading.Thread(target=listen)
        thread.start()
        lease.memory.copy_all()
        lease.memory.freeze()
        lease.memory.copy_rest(near.fileno(), LIMIT_S)
        near.close()
        thread.join()
    stream = b"".join(parts)
    found = []
    at = 0
    while at < len(stream):
        what, _, offset, length = FRAME.unpack_from(stream, at)
        at += FRAME.size
        found.append((what, offset, length, stream[at : at + length]))
        at += length
    assert {frame[0] for frame in found} == ({DATA, STRIPES, WRITERS, END} | ({SPANS} if kind == "shard" else set()))
    return tuple(found)


def stream_of(some: list[Frame]) -> bytes:
    return b"".join(FRAME.pack(what, 0, offset, length) + rest for what, offset, length, rest in some)


def try_everything(lease: BareLease) -> None:
    """Any result is right that a client may get."""
    participant = lease.memory.attach(os.getpid(), 1)
    link = ShmLink(lease.data_fd, lease.control_fd, participant, 0.05)
    if lease.memory.kind == "region":
        lease.region(link).read(0, SIZE["region"])
        return
    store: BareStore = lease.store(link)
    for key in (*VALUES, b"another key"):
        for operation in (store.get, store.delete, lambda key: store.put(key, bytes(1000))):
            try:
                operation(key)
            except (KeyAbsent, StoreFull, ValueCorrupt, LinkDown):
                pass
    lease.memory.reap(participant)
    lease.memory.put_right(0.05)


def receive(kind: Kind, stream: bytes) -> int:
    """0 or the errno. The memory is whole and usable in either case."""
    arrival = Arrival(kind, SIZE[kind], timeout_s=LIMIT_S)
    with arrival.lease as lease:
        geometry = os.pread(lease.data_fd, GEOMETRY, 0)
        length = os.fstat(lease.data_fd).st_size
        try:
            arrival.send(stream)
            arrival.wait()
            error = 0
        except OSError as trouble:
            error = trouble.errno or -1
        assert lease.memory.state == "frozen"
        assert os.pread(lease.data_fd, GEOMETRY, 0) == geometry
        assert os.pread(lease.data_fd, 4096 - GEOMETRY - 8, GEOMETRY + 8) == bytes(4096 - GEOMETRY - 8)
        assert os.fstat(lease.data_fd).st_size == length
        lease.memory.thaw()
        lease.memory.put_right(0.05)
        try_everything(lease)
        return error


@pytest.mark.parametrize("kind", ["shard", "region"])
def test_a_copy_arrives(kind: Kind) -> None:
    assert receive(kind, stream_of(list(frames(kind)))) == 0


def with_frame(what: int, change: Callable[[Frame], Frame], kind: Kind = "shard") -> bytes:
    """A copy, whose first frame of this kind is another."""
    all_ = list(frames(kind))
    i = next(i for i, frame in enumerate(all_) if frame[0] == what)
    all_[i] = change(all_[i])
    return stream_of(all_)


NONSENSE: dict[str, tuple[int, Callable[[Frame], Frame]]] = {
    "another index than it was": (END, lambda f: (f[0], f[1] ^ 1, *f[2:])),
    "a byte of the index is another": (DATA, lambda f: (*f[:3], f[3][:64] + b"\1" * 8 + f[3][72:])),
    "an unknown frame": (STRIPES, lambda f: (77, *f[1:])),
    "no frame": (STRIPES, lambda f: (0, *f[1:])),
    "data in the header": (DATA, lambda f: (f[0], 4095, *f[2:])),
    "data behind the end": (DATA, lambda f: (f[0], (4 << 20) + (1 << 20), 1 << 20, f[3])),
    "data at the end of all numbers": (DATA, lambda f: (f[0], TOP - 4096, 8192, f[3])),
    "data at the last number": (DATA, lambda f: (f[0], TOP - 1, 1, f[3])),
    "too much data at once": (DATA, lambda f: (f[0], 4096, (4 << 20) + 1, f[3])),
    "endless data": (DATA, lambda f: (f[0], 4096, TOP - 1, f[3])),
    "half a span": (SPANS, lambda f: (*f[:2], f[2] - 8, f[3])),
    "more spans than there are": (SPANS, lambda f: (f[0], 1, *f[2:])),
    "spans at the last number": (SPANS, lambda f: (f[0], TOP - 1, *f[2:])),
    "endless spans": (SPANS, lambda f: (*f[:2], TOP - 8, f[3])),
    "half of the stripes": (STRIPES, lambda f: (*f[:2], f[2] // 2, f[3])),
    "too many writers": (WRITERS, lambda f: (*f[:2], 16 * 4097, f[3])),
    "half a writer": (WRITERS, lambda f: (*f[:2], f[2] + 8, f[3])),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused(what: str) -> None:
    assert receive("shard", with_frame(*NONSENSE[what])) == errno.EPROTO


def test_a_region_has_no_spans() -> None:
    spans = next(frame for frame in frames("shard") if frame[0] == SPANS)
    assert receive("region", stream_of([spans, *frames("region")])) == errno.EPROTO


@pytest.mark.parametrize("count", [0, 1, 23, 24, 5000, -25, -24, -1])
def test_half_of_a_copy_is_none(count: int) -> None:
    assert receive("shard", stream_of(list(frames("shard")))[:count]) == errno.ECONNRESET


numbers = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, 1 << 18, 4 << 20, 5 << 20, TOP >> 1, TOP - 4096, TOP - 1]),
    st.integers(0, TOP - 1),
    st.integers(0, 6 << 20),
)
made_up = st.builds(
    lambda what, offset, length, rest: (what, offset, len(rest) if length is None else length, rest),
    st.one_of(st.integers(0, 6), st.integers(0, (1 << 32) - 1)),
    numbers,
    st.one_of(st.none(), numbers),
    st.binary(max_size=300),
)


@st.composite
def changed(draw: st.DrawFn, kind: Kind) -> bytes:
    """A copy with frames left out, repeated, changed and made up."""
    some = list(frames(kind))
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(some) - 1)) if some else 0
        what = draw(st.integers(0, 3))
        if what == 0 and some:
            del some[i]
        elif what == 1:
            some.insert(i, draw(made_up))
        elif what == 2 and some:
            some.insert(draw(st.integers(0, len(some))), some[i])
        elif some:
            kind_, offset, length, rest = some[i]
            which = draw(st.integers(0, 3))
            if which == 3 and rest:
                at = draw(st.integers(0, len(rest) - 1))
                rest = rest[:at] + draw(st.binary(min_size=1, max_size=16)) + rest[at:]
                rest = rest[: len(some[i][3])]
            some[i] = (
                draw(st.integers(0, 6)) if which == 0 else kind_,
                draw(numbers) if which == 1 else offset,
                draw(numbers) if which == 2 else length,
                rest,
            )
    return stream_of(some)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shard", "region"])
@settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_copy_is_taken_or_refused(kind: Kind, data: st.DataObject) -> None:
    receive(kind, data.draw(changed(kind)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shard", "region"])
def test_noise_is_taken_or_refused(kind: Kind) -> None:
    choose = random.Random(9)
    good = stream_of(list(frames(kind)))
    for _ in range(150):
        stream = bytearray(good)
        for _ in range(choose.choice((1, 3, 100))):
            near_a_frame = choose.random() < 0.5
            at = choose.randrange(200 if near_a_frame else len(stream))
            at = at if choose.random() < 0.5 else len(stream) - 1 - at
            stream[at] = choose.randrange(256)
        receive(kind, bytes(stream[: choose.choice((len(stream), len(stream), choose.randrange(len(stream))))]))
    for length in (10, 100, 100_000):
        assert receive(kind, random.Random(length).randbytes(length)) in (errno.EPROTO, errno.ECONNRESET)
