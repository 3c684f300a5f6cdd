"""The accounts of byte-seconds: what it adds up, who sees it, and that a restart goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfaas.errors import UsageError
from memfaas.messages import DonorUsage, Usage
from memfaas.server import usage
from memfaas.server.usage import Accounts

LEASES = [bytes([number]) * 16 for number in range(3)]
TENANTS, DONORS = ("ann", "bob"), ("d0", "d1")


class Scene:
    """Accounts, with clocks that go on when they are told."""

    def __init__(self, wall: float = 1e9) -> None:
        self.now = 100.0
        self.wall_ahead = wall - self.now
        self.accounts = Accounts(lambda: self.now, lambda: self.now + self.wall_ahead)

    def tenants(self) -> dict[tuple[str, str], tuple[float, float]]:
        return {(one.tenant, one.donor): (one.leased, one.populated) for one in self.accounts.report().tenants}

    def donor(self, name: str) -> DonorUsage:
        return {one.donor: one for one in self.accounts.report().donors}[name]


def test_a_lease_is_counted_from_its_beginning_to_its_end() -> None:
    scene = Scene()
    scene.now += 7
    scene.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
    scene.now += 2
    scene.accounts.lease_is_populated(LEASES[0], 4)
    scene.now += 3
    assert scene.tenants() == {("ann", "d0"): (50, 12)}
    scene.accounts.lease_ended(LEASES[0])
    scene.now += 100
    assert scene.tenants() == {("ann", "d0"): (50, 12)}
    assert scene.donor("d0").leased == 50


def test_a_lease_that_moves_is_counted_where_it_is() -> None:
    scene = Scene()
    scene.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
    scene.accounts.lease_is_populated(LEASES[0], 10)
    scene.now += 1
    scene.accounts.lease_is_at(LEASES[0], "ann", "d1", 10)
    scene.now += 4
    assert scene.tenants() == {("ann", "d0"): (10, 10), ("ann", "d1"): (40, 0)}
    assert scene.accounts.leased("ann") == 10


def test_what_is_said_twice_counts_once() -> None:
    scene = Scene()
    for _ in range(2):
        scene.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
        scene.accounts.lease_is_populated(LEASES[0], 5)
        scene.accounts.donor_offers("d0", 100)
        scene.now += 1
    for _ in range(2):
        scene.accounts.lease_ended(LEASES[0])
        scene.accounts.donor_offers("d0", 0)
        scene.now += 1
    assert scene.tenants() == {("ann", "d0"): (20, 10)}
    assert scene.donor("d0").offered == 200
    assert scene.accounts.leased("ann") == 0


def test_a_lease_that_is_over_is_not_populated_again() -> None:
    """A donor's report may be older than the end of the lease."""
    scene = Scene()
    scene.accounts.lease_is_populated(LEASES[0], 5)
    scene.now += 1
    assert scene.tenants() == {}


def test_what_a_donor_gave_back_is_counted() -> None:
    scene = Scene()
    scene.accounts.donor_reclaimed("d0", 30, in_time=True)
    scene.accounts.donor_reclaimed("d0", 12, in_time=False)
    one = scene.donor("d0")
    assert (one.reclaims, one.reclaimed, one.in_time) == (2, 42, 1)


def test_a_tenant_sees_its_own_part_only() -> None:
    scene = Scene()
    scene.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
    scene.accounts.lease_is_at(LEASES[1], "bob", "d0", 20)
    scene.now += 1
    assert scene.accounts.report("bob").tenants == [Usage(tenant="bob", donor="d0", leased=20, populated=0)]
    assert scene.accounts.report("bob").donors == []
    assert len(scene.accounts.report().tenants) == 2


def test_a_clock_that_was_set_does_not_touch_what_was_counted() -> None:
    scene = Scene()
    scene.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
    scene.now += 1
    scene.wall_ahead -= 86_400
    assert scene.tenants() == {("ann", "d0"): (10, 0)}


def test_another_broker_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    first = Scene(wall=1e9)
    first.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
    first.accounts.donor_offers("d0", 100)
    first.accounts.donor_reclaimed("d0", 5, in_time=True)
    first.now += 1
    usage.save(tmp_path / "usage.json", first.accounts.report())

    second = Scene(wall=1e9 + 600)
    earlier = usage.load(tmp_path / "usage.json")
    assert earlier is not None
    second.accounts.go_on_from(earlier)
    second.accounts.lease_is_at(LEASES[0], "ann", "d0", 10)
    second.accounts.donor_reclaimed("d0", 5, in_time=False)
    second.now += 2
    assert second.tenants() == {("ann", "d0"): (30, 0)}
    one = second.donor("d0")
    assert (one.offered, one.leased, one.reclaims, one.reclaimed, one.in_time) == (100, 30, 2, 10, 1)
    report = second.accounts.report()
    assert (report.since, report.now) == (1e9, 1e9 + 602)
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]


def test_saving_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "usage.json"
    report = Scene().accounts.report()
    usage.save(file, report)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        usage.save(file, Scene(wall=2e9).accounts.report())
    assert usage.load(file) == report
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_saved_is_a_beginning(tmp_path: Path) -> None:
    assert usage.load(tmp_path / "usage.json") is None


@pytest.mark.parametrize("content", [b"", b"{}", b'{"since": "soon"}', b"\xff", b"[]"])
def test_a_file_that_is_something_else_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "usage.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="move it away"):
        usage.load(file)


event = st.one_of(
    st.tuples(
        st.just("at"),
        st.sampled_from(LEASES),
        st.sampled_from(TENANTS),
        st.sampled_from(DONORS),
        st.integers(1, 1 << 40),
    ),
    st.tuples(st.just("ended"), st.sampled_from(LEASES)),
    st.tuples(st.just("populated"), st.sampled_from(LEASES), st.integers(0, 1 << 40)),
)


@given(st.lists(st.tuples(event, st.integers(0, 1000))))
def test_the_sums_are_those_of_a_slow_count(events: list[tuple[tuple[object, ...], int]]) -> None:
    scene = Scene()
    calls: dict[object, Callable[..., None]] = {
        "at": scene.accounts.lease_is_at,
        "ended": scene.accounts.lease_ended,
        "populated": scene.accounts.lease_is_populated,
    }
    leases: dict[object, list[object]] = {}
    leased: dict[tuple[object, object], int] = {}
    populated: dict[tuple[object, object], int] = {}
    for (what, lease, *rest), seconds in events:
        calls[what](lease, *rest)
        if what == "at":
            if leases.get(lease, [])[:3] != rest:
                leases[lease] = [*rest, 0]
        elif what == "ended":
            leases.pop(lease, None)
        elif lease in leases:
            leases[lease][3] = rest[0]
        scene.now += seconds
        for tenant, donor, size, backed in leases.values():
            assert isinstance(size, int)
            assert isinstance(backed, int)
            leased[tenant, donor] = leased.get((tenant, donor), 0) + size * seconds
            populated[tenant, donor] = populated.get((tenant, donor), 0) + backed * seconds
    assert scene.tenants() == {key: (leased[key], populated[key]) for key in leased}
    for tenant in TENANTS:
        sizes = [size for whose, _, size, _ in leases.values() if whose == tenant and isinstance(size, int)]
        assert scene.accounts.leased(tenant) == sum(sizes)
