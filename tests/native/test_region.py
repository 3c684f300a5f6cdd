"""A region is a row of bytes, with words in it that change atomically, over both fabrics."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memfaas.errors import UsageError
from memfaas.testing import fsck
from memfaas.testing.lease import BareLease, BareRegion, Fabric

NOISE = random.Random(20).randbytes(1 << 20)
SIZE = 300_003  # neither words nor pages
TOP = 1 << 64

links = st.sampled_from(["shm", "tcp"])
offsets = st.one_of(
    st.integers(0, SIZE), st.integers(0, SIZE // 4096).map(lambda page: page * 4096), st.integers(SIZE - 20, SIZE)
)
lengths = st.one_of(st.integers(0, 100), st.integers(0, SIZE))
words = st.integers(0, SIZE // 8 - 1).map(lambda number: number * 8)
values = st.one_of(st.sampled_from([0, 1, TOP - 1, TOP >> 1]), st.integers(0, TOP - 1))


class RegionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lease = BareLease("region", SIZE)
        self.regions = {
            "shm": self.lease.region(self.lease.shm_link()),
            "tcp": self.lease.region(self.lease.tcp_link()),
        }
        self.model = bytearray(SIZE)

    def word(self, offset: int) -> int:
        return int.from_bytes(self.model[offset : offset + 8], "little")

    def set_word(self, offset: int, value: int) -> None:
        self.model[offset : offset + 8] = value.to_bytes(8, "little")

    @rule(link=links, offset=offsets, length=lengths, seed=st.integers(0, 1 << 19))
    def write(self, link: str, offset: int, length: int, seed: int) -> None:
        data = NOISE[seed : seed + length]
        if offset + length > SIZE:
            with pytest.raises(UsageError, match="not in this region"):
                self.regions[link].write(offset, data)
            return
        assert self.regions[link].write(offset, data) == length
        self.model[offset : offset + length] = data

    @rule(link=links, offset=offsets, length=lengths)
    def read(self, link: str, offset: int, length: int) -> None:
        if offset + length > SIZE:
            with pytest.raises(UsageError, match="not in this region"):
                self.regions[link].read(offset, length)
            return
        assert self.regions[link].read(offset, length) == self.model[offset : offset + length]

    @rule(link=links, offset=offsets, length=lengths)
    def read_into(self, link: str, offset: int, length: int) -> None:
        buffer = bytearray(min(length, SIZE - offset))
        assert self.regions[link].read_into(offset, buffer) == len(buffer)
        assert buffer == self.model[offset : offset + len(buffer)]

    @rule(link=links, offset=words, guess=st.booleans(), expected=values, new=values)
    def compare_swap(self, link: str, offset: int, guess: bool, expected: int, new: int) -> None:
        before = self.word(offset)
        expected = before if guess else expected
        assert self.regions[link].compare_swap(offset, expected, new) == before
        if expected == before:
            self.set_word(offset, new)

    @rule(link=links, offset=words, amount=st.integers(-TOP, TOP))
    def fetch_add(self, link: str, offset: int, amount: int) -> None:
        before = self.word(offset)
        assert self.regions[link].fetch_add(offset, amount) == before
        self.set_word(offset, (before + amount) % TOP)

    @rule(link=links, offset=words, by=st.integers(1, 7))
    def words_lie_on_their_boundary(self, link: str, offset: int, by: int) -> None:
        with pytest.raises(UsageError):
            self.regions[link].fetch_add(offset + by, 1)
        with pytest.raises(UsageError):
            self.regions[link].compare_swap(offset + by, 0, 1)

    @rule(link=links, offset=st.one_of(st.integers(-TOP, -1), st.integers(SIZE - 7, TOP)))
    def words_outside_are_refused(self, link: str, offset: int) -> None:
        with pytest.raises(UsageError):
            self.regions[link].fetch_add(offset, 1)
        with pytest.raises(UsageError):
            self.regions[link].compare_swap(offset, 0, 1)

    @invariant()
    def nothing_else_changed(self) -> None:
        assert self.regions["shm"].read(0, SIZE) == self.model

    def teardown(self) -> None:
        self.lease.hang_up()
        assert fsck.held(self.lease.control_fd, "region", SIZE) == {}
        self.lease.close()


TestRegion = pytest.mark.slow(RegionMachine.TestCase)
TestRegion.settings = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    stateful_step_count=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture
def lease() -> Iterator[BareLease]:
    with BareLease("region", SIZE) as lease:
        yield lease


def region_on(lease: BareLease, fabric: Fabric) -> BareRegion:
    return lease.region(lease.link(fabric))


@pytest.mark.parametrize("size", [1, 7, 8, 4095, 4096, (2 << 20) - 4096, (2 << 20) - 4095])
def test_the_last_byte_is_there(fabric: Fabric, size: int) -> None:
    with BareLease("region", size) as lease:
        region, other = region_on(lease, fabric), region_on(lease, "shm")
        for value in (b"a", b"b"):
            region.write(size - 1, value)
            assert region.read(0, size) == other.read(0, size) == bytes(size - 1) + value
        with pytest.raises(UsageError):
            region.read(size, 1)
        assert region.read(size, 0) == b""


def test_arguments_that_make_no_sense_are_refused(lease: BareLease, fabric: Fabric) -> None:
    region = region_on(lease, fabric)
    for offset, length in ((-1, 1), (0, -1), (SIZE, 1), (0, SIZE + 1), (TOP, 1), (1, TOP - 1)):
        with pytest.raises(UsageError):
            region.read(offset, length)
    with pytest.raises(UsageError):
        region.read_into(0, b"read-only")
    with pytest.raises(UsageError):
        region.write(0, "text")  # type: ignore[arg-type]
    assert region.read(0, SIZE) == bytes(SIZE)


def add_ones(region: BareRegion, count: int) -> None:
    for _ in range(count):
        region.fetch_add(64, 1)


def swap_up(region: BareRegion, count: int) -> None:
    for _ in range(count):
        seen = region.compare_swap(64, 0, 1)
        while (before := region.compare_swap(64, seen, seen + 1)) != seen:
            seen = before


@pytest.fixture
def together() -> tuple[Fabric, ...]:
    """Of those whose clients may change one word at the same time."""
    return ("shm", "tcp", "shm", "tcp")


@pytest.mark.parametrize("increase", [add_ones, swap_up])
def test_words_change_atomically_on_all_fabrics_at_once(
    lease: BareLease, together: tuple[Fabric, ...], increase: Callable[[BareRegion, int], None]
) -> None:
    count = 300
    regions = [region_on(lease, fabric) for fabric in together]
    regions[0].write(64, (1).to_bytes(8, "little"))
    threads = [threading.Thread(target=increase, args=(region, count)) for region in regions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert regions[0].fetch_add(64, 0) == 1 + len(regions) * count
