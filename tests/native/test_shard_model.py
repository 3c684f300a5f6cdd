"""A shard behaves as a dictionary does, over mapped memory and over tcp at once, and its heap adds up."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memfaas._native import FLAG_ARRAY, FLAG_MANIFEST, MAX_KEY, MAX_META, MIN_SHARD, PART, USER
from memfaas.errors import KeyAbsent, StoreFull, UsageError, ValueTooLarge
from memfaas.testing import fsck
from memfaas.testing.lease import BareLease, BareStore, Fabric, fill_and_empty

KIB = 1024
SPAN = 256 * KIB
SEGMENT = 64 * KIB
INLINE = 64 * KIB
HEADER = 64
NOISE = random.Random(20).randbytes(2 * 1024 * KIB)

KEY_LENGTHS = (0, 1, 2, 7, 8, 9, 63, 64, 65, 128, 240, 241, 1000, 4096, INLINE - HEADER - 1, INLINE - HEADER, MAX_KEY)
KEYS = [random.Random(length).randbytes(length) for length in KEY_LENGTHS] + [b"key-%d" % i for i in range(20)]


def bytes_of(length: int, seed: int) -> bytes:
    return NOISE[seed : seed + length]


@dataclass(frozen=True)
class Stored:
    value: bytes
    meta: bytes = b""
    flags: int = 0

    def is_inline(self, key: bytes) -> bool:
        return not self.value or HEADER + len(key) + len(self.meta) + len(self.value) <= INLINE

    def manifest(self, key: bytes) -> bytes | None:
        """What a put or delete tells about it when it takes its place."""
        listed = self.flags & FLAG_MANIFEST and self.is_inline(key) and 0 < len(self.value) <= 64
        return self.value if listed else None

    def heap_bytes(self, key: bytes) -> int:
        """Of all its blocks, while the heap has spans to spare."""
        head = HEADER + len(key) + len(self.meta)
        if self.is_inline(key):
            return fsck.block_size(head + len(self.value))
        spans, left = divmod(len(self.value), SPAN)
        segments, rest = divmod(left, SEGMENT)
        chunks = [SPAN] * spans + [SEGMENT] * segments + ([rest] if rest else [])
        table = 8 * -(-len(self.value) // SEGMENT) + 16 * len(chunks)
        return sum(map(fsck.block_size, chunks)) + fsck.block_size((head + 7) // 8 * 8 + table)

    def most_spans(self) -> int:
        """That a put can need: whole ones, one for the segments behind them, the rest, the head."""
        return len(self.value) // SPAN + 3


@contextlib.contextmanager
def expect_full(lease: BareLease, wanted: Stored) -> Iterator[None]:
    """StoreFull is right only when there is not one span for each kind of block that is needed."""
    try:
        yield
    except StoreFull:
        assert lease.memory.stats()["free_spans"] < wanted.most_spans()
        raise


links = st.sampled_from(["shm", "tcp"])
keys = st.integers(0, len(KEYS) - 1).map(lambda number: KEYS[number])  # never shown in full
spaces = st.sampled_from([USER, PART])
seeds = st.integers(0, 1024 * KIB)
metas = st.one_of(st.just(0), st.integers(0, MAX_META), st.just(MAX_META)).map(lambda length: NOISE[:length])
flags_ = st.sampled_from([0, 0, FLAG_ARRAY, FLAG_MANIFEST])
small = st.integers(0, 300)


class ShardMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lease = BareLease("shard", 2 * MIN_SHARD)
        self.stores = {
            "shm": self.lease.store(self.lease.shm_link()),
            "tcp": self.lease.store(self.lease.tcp_link()),
        }
        self.model: dict[tuple[int, bytes], Stored] = {}
        self.was_tight = False

    def lengths_near(self, edge: str, factor: int, delta: int, key: bytes, meta: bytes) -> int:
        base = {
            "inline": INLINE - HEADER - len(key) - len(meta),
            "segment": factor * SEGMENT,
            "span": factor * SPAN,
            "part": self.lease.memory.part_size,
        }[edge]
        return min(max(base + delta, 0), self.lease.memory.part_size)

    def save(self, link: str, space: int, key: bytes, wanted: Stored) -> None:
        before = self.model.get((space, key))
        try:
            with expect_full(self.lease, wanted):
                replaced = self.stores[link]._save(key, space, wanted.value, wanted.meta, wanted.flags)
        except StoreFull:
            return
        assert replaced == (before.manifest(key) if before else None)
        self.model[space, key] = wanted

    @rule(link=links, space=spaces, key=keys, length=small, seed=seeds, meta=metas, flags=flags_)
    def save_small(self, link: str, space: int, key: bytes, length: int, seed: int, meta: bytes, flags: int) -> None:
        self.save(link, space, key, Stored(bytes_of(length, seed), meta, flags))

    @rule(
        link=links, space=spaces, key=keys, edge=st.sampled_from(["inline", "segment", "span", "part"]),
        factor=st.integers(1, 4), delta=st.integers(-1, 1), seed=seeds, meta=metas, flags=flags_,
    )  # fmt: skip
    def save_near_an_edge(
        self, link: str, space: int, key: bytes, edge: str, factor: int, delta: int, seed: int, meta: bytes, flags: int
    ) -> None:
        length = self.lengths_near(edge, factor, delta, key, meta)
        self.save(link, space, key, Stored(bytes_of(length, seed), meta, flags))

    @rule(link=links, key=keys, delta=st.integers(1, 1000))
    def save_too_much(self, link: str, key: bytes, delta: int) -> None:
        with pytest.raises(ValueTooLarge):
            self.stores[link]._save(key, USER, bytes(self.lease.memory.part_size + delta), b"", 0)

    @rule(link=links, space=spaces, seed=seeds)
    def fill(self, link: str, space: int, seed: int) -> None:
        """Until there is no room for one more of that size, which then stays out."""
        full = False
        for i in range(20):
            key, wanted = b"fill-%d" % i, Stored(bytes_of(self.lease.memory.part_size, seed + i))
            self.save(link, space, key, wanted)
            full = self.model.get((space, key)) != wanted
            if full:
                break
        assert full

    @rule(link=links, space=spaces, key=keys)
    def load(self, link: str, space: int, key: bytes) -> None:
        found = self.stores[link]._load(key, space)
        expected = self.model.get((space, key))
        assert found == (expected and (expected.value, expected.meta, expected.flags))

    @rule(link=links, space=spaces, key=keys, room=st.sampled_from([-1, 0, 1, 1000]))
    def load_into(self, link: str, space: int, key: bytes, room: int) -> None:
        expected = self.model.get((space, key))
        buffer = bytearray(b"\xaa") * max(len(expected.value) + room if expected else room, 0)
        if expected and len(buffer) < len(expected.value):
            with pytest.raises(UsageError, match="the buffer only"):
                self.stores[link]._load_into(key, space, buffer)
            assert buffer == b"\xaa" * len(buffer)
            return
        found = self.stores[link]._load_into(key, space, buffer)
        if expected is None:
            assert found is None
        else:
            assert found == (len(expected.value), expected.meta, expected.flags)
            assert buffer == expected.value + b"\xaa" * (len(buffer) - len(expected.value))

    @rule(link=links, space=spaces, key=keys)
    def remove(self, link: str, space: int, key: bytes) -> None:
        before = self.model.pop((space, key), None)
        expected = (before is not None, before.manifest(key) if before else None)
        assert self.stores[link]._remove(key, space) == expected

    @rule(link=links, key=keys, length=small, seed=seeds)
    def use_the_public_face(self, link: str, key: bytes, length: int, seed: int) -> None:
        store, stored = self.stores[link], Stored(bytes_of(length, seed))
        before = self.model.get((USER, key))
        assert (key in store) == (before is not None)
        try:
            with expect_full(self.lease, stored):
                store.put(key, stored.value)
        except StoreFull:
            return
        assert store.forgotten == ([before.manifest(key)] if before and before.manifest(key) else [])
        store.forgotten.clear()
        assert store.get(key) == stored.value
        assert store.get_into(key, bytearray(length)) == length
        self.model[USER, key] = stored

    @rule(link=links, key=keys)
    def delete(self, link: str, key: bytes) -> None:
        store, before = self.stores[link], self.model.pop((USER, key), None)
        assert store.delete(key) == (before is not None)
        assert store.forgotten == ([before.manifest(key)] if before and before.manifest(key) else [])
        store.forgotten.clear()
        assert key not in store
        with pytest.raises(KeyAbsent):
            store.get(key)

    @rule(link=links, some=st.lists(keys, max_size=80))
    def get_many(self, link: str, some: list[bytes]) -> None:
        expected = [self.model.get((USER, key)) for key in some]
        assert self.stores[link].get_many(some) == [stored and stored.value for stored in expected]

    @rule(link=links, some=st.lists(st.tuples(keys, small, seeds), max_size=80))
    def put_many(self, link: str, some: list[tuple[bytes, int, int]]) -> None:
        store = self.stores[link]
        items = [(key, bytes_of(length, seed)) for key, length, seed in some]
        try:
            store.put_many(items)
        except StoreFull:  # some are stored, and no key has a value that nobody gave it
            for key in {key for key, _ in items}:
                found, before = store._load(key, USER), self.model.get((USER, key))
                possible = [before and (before.value, before.meta, before.flags)]
                assert found in possible + [(value, b"", 0) for k, value in items if k == key]
                if found is not None:
                    self.model[USER, key] = Stored(*found)
        else:
            self.model.update({(USER, key): Stored(value) for key, value in items})
        store.forgotten.clear()

    @invariant()
    def a_scan_finds_what_is_there(self) -> None:
        for space, link in ((USER, "shm"), (PART, "tcp")):
            assert self.stores[link].scan(space) == {
                key: (stored.flags, len(stored.value)) for (s, key), stored in self.model.items() if s == space
            }

    @invariant()
    def the_heap_adds_up(self) -> None:
        stats = self.lease.memory.stats()
        assert stats["keys"] == sum(space == USER for space, _ in self.model)
        assert stats["parts"] == sum(space == PART for space, _ in self.model)
        predicted = sum(stored.heap_bytes(key) for (_, key), stored in self.model.items())
        # Once it had few spans left, some values may have got blocks larger than they need, or smaller chunks.
        self.was_tight = self.was_tight or stats["free_spans"] <= 6
        assert stats["used"] == predicted or (self.was_tight and predicted * 0.9 < stats["used"] <= stats["size"])

    def teardown(self) -> None:
        with self.lease:
            for number, (space, key) in enumerate(list(self.model)):
                assert self.stores["shm" if number % 2 else "tcp"]._remove(key, space)[0]
            assert_nothing_leaked(self.lease, self.stores["tcp"])


def assert_nothing_leaked(lease: BareLease, store: BareStore) -> None:
    assert lease.memory.stats()["used"] == 0
    fill_and_empty(store)
    assert lease.memory.stats()["used"] == 0
    lease.hang_up()
    assert fsck.faults(lease.data_fd, lease.control_fd) == {}


class HeapMachine(RuleBasedStateMachine):
    """Many values of few sizes, so that spans change their class over and over."""

    SIZES = (0, 30, 100, 300, 900, 2500, 7000, 15000, 40000, 65000, 70000, 130000, 200000, 262144, 300000)

    def __init__(self) -> None:
        super().__init__()
        self.lease = BareLease("shard", MIN_SHARD)
        self.store = self.lease.store(self.lease.shm_link())
        self.model: dict[bytes, Stored] = {}
        self.next = 0

    @initialize()
    def start_empty(self) -> None:
        assert self.lease.memory.stats()["free_spans"] == MIN_SHARD // SPAN

    def put_one(self, size: int) -> bool:
        key, stored = b"%d" % self.next, Stored(bytes_of(size, self.next % 1000))
        self.next += 1
        try:
            with expect_full(self.lease, stored):
                self.store.put(key, stored.value)
        except StoreFull:
            assert key not in self.store
            return False
        self.model[key] = stored
        return True

    @rule(size=st.sampled_from(SIZES), count=st.integers(1, 300))
    def put_some(self, size: int, count: int) -> None:
        while count and self.put_one(size):
            count -= 1

    @rule(seed=st.integers(0, 1000), sizes=st.lists(st.sampled_from(SIZES[3:]), min_size=1, max_size=4))
    def fill(self, seed: int, sizes: list[int]) -> None:
        choose = random.Random(seed)
        while self.put_one(choose.choice(sizes)):
            pass

    @rule(seed=st.integers(0, 1000), keep=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    def delete_at_random(self, seed: int, keep: float) -> None:
        choose = random.Random(seed)
        for key in [key for key in self.model if choose.random() >= keep]:
            assert self.store.delete(key)
            del self.model[key]

    @rule(seed=st.integers(0, 1000), size=st.sampled_from(SIZES))
    def replace_at_random(self, seed: int, size: int) -> None:
        choose = random.Random(seed)
        for key in [key for key in self.model if choose.random() < 0.2]:
            stored = Stored(bytes_of(size, seed))
            try:
                with expect_full(self.lease, stored):
                    self.store.put(key, stored.value)
            except StoreFull:
                continue
            self.model[key] = stored

    @invariant()
    def all_is_there_and_nothing_else(self) -> None:
        some = list(self.model)[:: max(len(self.model) // 50, 1)]
        assert self.store.get_many(some) == [self.model[key].value for key in some]
        stats = self.lease.memory.stats()
        assert stats["keys"] == len(self.model)
        assert fsck.faults(self.lease.data_fd, self.lease.control_fd) == {}

    def teardown(self) -> None:
        with self.lease:
            for key in self.model:
                assert self.store.delete(key)
            assert_nothing_leaked(self.lease, self.store)


quick = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to shrink takes minutes; for that, add Phase.shrink and a timeout
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
TestShard = pytest.mark.slow(ShardMachine.TestCase)
TestShard.settings = settings(quick, max_examples=200, stateful_step_count=40)
TestHeap = pytest.mark.slow(HeapMachine.TestCase)
TestHeap.settings = settings(quick, max_examples=200, stateful_step_count=20)


@pytest.fixture(name="lease", scope="module")
def shard_lease() -> Iterator[BareLease]:
    with BareLease("shard", MIN_SHARD) as lease:
        yield lease


@pytest.fixture(params=KEY_LENGTHS)
def key_length(request: pytest.FixtureRequest) -> int:
    length: int = request.param
    return length


def test_values_of_every_edge_length_come_back(lease: BareLease, fabric: Fabric, key_length: int) -> None:
    writer = lease.store(lease.link(fabric))
    reader = lease.store(lease.tcp_link() if fabric == "shm" else lease.shm_link())
    key = NOISE[:key_length]
    edges = (0, INLINE - HEADER - key_length, SEGMENT, SPAN, 2 * SPAN)
    lengths = sorted({max(edge + delta, 0) for edge in edges for delta in (-9, -8, -1, 0, 1)})
    for length in [n for n in lengths if n <= lease.memory.part_size]:
        for meta in (b"", b"m", NOISE[:MAX_META]):
            wanted = (bytes_of(length, 5), meta, FLAG_ARRAY)
            writer._save(key, USER, *wanted)
            assert writer._load(key, USER) == wanted
            assert reader._load(key, USER) == wanted
    assert writer.delete(key)
    assert lease.memory.stats()["used"] == 0


def test_a_key_that_is_too_long_is_refused(lease: BareLease, fabric: Fabric) -> None:
    store = lease.store(lease.link(fabric))
    for use in (store.get, store.delete, store.__contains__, lambda key: store.put(key, b"")):
        with pytest.raises(ValueTooLarge):
            use(b"k" * (MAX_KEY + 1))
    with pytest.raises(ValueTooLarge):
        store._save(b"k", USER, b"", b"m" * (MAX_META + 1), 0)


@pytest.mark.parametrize("length", [MIN_SHARD // 8 + 1, 17 << 20, 40 << 20])
def test_a_value_that_is_too_large_is_refused(lease: BareLease, fabric: Fabric, length: int) -> None:
    store = lease.store(lease.link(fabric))
    store.put(b"k", b"before")
    with pytest.raises(ValueTooLarge):
        store._save(b"k", USER, bytes(length), b"", 0)
    assert store.get(b"k") == b"before"
    store.delete(b"k")


def test_the_index_takes_as_many_small_values_as_the_heap(lease: BareLease) -> None:
    """Values of 100 bytes: it is the heap that is full in the end, not the index."""
    store = lease.store(lease.shm_link())
    count = 0
    try:
        while True:
            store.put(b"%08d" % count, bytes(100))
            count += 1
    except StoreFull:
        pass
    assert lease.memory.stats()["free_spans"] == 0
    assert count > 0.95 * MIN_SHARD / fsck.block_size(HEADER + 8 + 100)
    for i in range(count):
        assert store.delete(b"%08d" % i)
    assert lease.memory.stats()["used"] == 0
