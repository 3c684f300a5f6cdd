"""How a donor gives way to programs that nobody announced, and comes back when they are gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from memfaas import cgroups
from memfaas.messages import Reclaimed
from memfaas.server import spare
from memfaas.server.governor import Governor, Reading, margin
from memfaas.server.pressure import HOLDER, Gauge, Lookout, Watch, pause_for, watch_node
from memfaas.server.reclaim import Reclaimer
from memfaas.units import GIB, MIB
from tests.server.holdings import Node

HEADROOM = GIB
MARGIN = margin(HEADROOM)


class Donor:
    """A donor that does what its governor says, all of whose offer is populated."""

    def __init__(self, offered: int) -> None:
        self.time = 0.0
        self.offered = offered
        self.reclaimed = 0
        self.changes: list[int] = []
        self.governor = Governor(HEADROOM, lambda: self.time)

    def look(self, lendable: int) -> int:
        """`lendable` is what the node could give beyond the headroom if the donor lent nothing."""
        available = lendable + HEADROOM - self.offered
        change = self.governor.decide(Reading(available, self.offered, self.offered, self.reclaimed))
        self.offered += change
        self.reclaimed -= change
        self.time += 1.0
        if change:
            self.changes.append(change)
        return change


def test_the_headroom_and_a_margin_are_restored_at_once() -> None:
    donor = Donor(8 * GIB)
    assert donor.look(8 * GIB) == 0
    assert donor.look(7 * GIB) == -(GIB + MARGIN)
    assert donor.look(7 * GIB) == 0


def test_memory_is_lent_again_slowly_and_only_after_it_was_calm() -> None:
    donor = Donor(8 * GIB)
    donor.look(4 * GIB)
    steps = [donor.look(20 * GIB) for _ in range(59)]
    assert steps == [0] * 59
    times = []
    for _ in range(400):
        if donor.look(20 * GIB):
            times.append(donor.time)
    assert donor.reclaimed == 0
    assert len(times) > 4
    assert min(later - earlier for earlier, later in pairwise(times)) >= 10


def test_who_takes_back_what_was_just_lent_waits_longer_the_next_time() -> None:
    donor = Donor(8 * GIB)
    waits = []
    for _ in range(4):
        donor.look(1 * GIB)
        begin = donor.time
        while donor.look(20 * GIB) == 0:
            pass
        waits.append(donor.time - begin)
    assert all(later > 1.8 * earlier for earlier, later in pairwise(waits))


@given(
    noise=st.lists(st.integers(-MARGIN // 2, MARGIN // 2), min_size=1, max_size=50),
    level=st.integers(1, 16),
)
def test_noise_within_the_margin_takes_memory_back_once_at_most(noise: list[int], level: int) -> None:
    donor = Donor(16 * GIB)
    for number in range(600):
        donor.look(level * GIB + noise[number % len(noise)])
    assert sum(change < 0 for change in donor.changes) <= 1


@given(lendable=st.lists(st.integers(0, 32 * GIB), min_size=1, max_size=40), stay=st.integers(1, 200))
def test_nothing_is_ever_lent_into_the_headroom_and_changes_are_few(lendable: list[int], stay: int) -> None:
    donor = Donor(16 * GIB)
    for now in lendable:
        for _ in range(stay):
            change = donor.look(now)
            assert donor.offered <= max(0, now)
            assert change <= 0 or donor.offered + MARGIN <= now
            assert donor.offered + donor.reclaimed == 16 * GIB
    assert sum(change > 0 for change in donor.changes) <= donor.time / 10 + 1


def test_the_node_is_looked_at_often_only_near_the_headroom() -> None:
    assert pause_for(0, GIB) == pause_for(GIB // 2, GIB) == 0.05
    assert 0.05 < pause_for(2 * GIB, GIB) < 0.2
    assert pause_for(100 * GIB, GIB) == 1.0


# --- the whole of it, on a node that is files --------------------------------------------------------


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("")
    (tmp_path / "self/mountinfo").write_text("")
    set_available(tmp_path, 9 * GIB)
    return tmp_path


def set_available(proc: Path, size: int) -> None:
    text = f"MemTotal: 16 kB\nMemAvailable: {size // 1024:12d} kB\n"
    with open(proc / "meminfo", "r+" if (proc / "meminfo").exists() else "w") as file:
        file.write(text)


async def test_a_node_that_gets_full_gets_its_memory_back_and_lends_it_again_later(
    proc: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = Node(100 * GIB)
    for _ in range(8):
        node.lend(GIB)
    reclaimer = Reclaimer("d1", node.holdings, nominal=8 * GIB)
    changes: list[int] = []
    told: list[Reclaimed] = []
    others = 0

    def populated() -> int:
        set_available(proc, 8 * GIB + HEADROOM + MARGIN - others - node.taken)
        return node.taken

    async def tell(reclaimed: Reclaimed) -> None:
        told.append(reclaimed)

    populated()
    await nursery.start(reclaimer.run)
    nursery.start_soon(
        lambda: watch_node(reclaimer, HEADROOM, populated, lambda: changes.append(reclaimer.offered), tell, proc=proc)
    )
    await trio.sleep(30)
    assert (reclaimer.offered, changes) == (8 * GIB, [])
    others = 2 * MARGIN
    await trio.sleep(30)
    assert reclaimer.reclaimed == {HOLDER: 2 * MARGIN}
    assert node.taken == 7 * GIB
    assert changes == [8 * GIB - 2 * MARGIN]
    (one,) = told
    assert (one.donor, one.asked, one.freed, one.in_time) == ("d1", 2 * MARGIN, GIB, True)
    others = 0
    await trio.sleep(300)
    assert reclaimer.reclaimed == {}
    assert changes[-1] == 8 * GIB


# --- the kernel ----------------------------------------------------------------------------------------


async def test_the_watch_says_by_what_it_watches_and_wakes_by_time_without_any_of_it(proc: Path) -> None:
    with Watch(HEADROOM, proc) as watch:
        assert watch.watched == ["MemAvailable"]
        assert not await watch.wait(0.01)


async def test_the_lookout_wakes_the_watch_when_less_is_available_than_its_mark(proc: Path) -> None:
    gauge = Gauge(proc)
    with Lookout(gauge, HEADROOM) as lookout, Watch(HEADROOM, proc, lookout.event) as watch:
        set_available(proc, HEADROOM)
        lookout.mark = HEADROOM
        assert not await watch.wait(0.3)
        set_available(proc, HEADROOM - 4096)
        assert await watch.wait(30.0)
        lookout.mark = 0
        await watch.wait(0.2)  # what it said before
        assert not await watch.wait(0.3)
    gauge.close()


@pytest.mark.skipif(not os.access("/proc/pressure/memory", os.W_OK), reason="the kernel has no memory pressure (PSI)")
async def test_the_kernel_is_asked_to_tell_of_pressure_where_it_can() -> None:
    with Watch(HEADROOM) as watch:
        assert "/proc/pressure/memory" in watch.watched


def test_the_gauge_never_says_more_than_there_is() -> None:
    gauge = Gauge()
    assert 0 < gauge.available() <= spare.available() + 256 * MIB  # the node does not stand still
    gauge.close()


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of version 1, with a limit."""
    above = next((level.folder for level in cgroups.groups() if "limit" in level.limits[0]), None)
    if above is None:
        pytest.skip("this machine has no memory control groups of version 1")
    made = above / f"memfaas-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(512 * MIB))
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    yield made
    made.rmdir()


@pytest.fixture
def inside(group: Path, tmp_path: Path) -> Path:
    """What a process in this group would see of /proc."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(Path("/proc/self/mountinfo").read_text())
    ours = next(one for one in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in one)
    (tmp_path / "self/cgroup").write_text(f"{ours.rstrip('/')}/{group.name}\n")
    return tmp_path


@pytest.fixture
def taker(group: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the group that takes 320 MiB when it is told to, and ends when it is told again."""
    script = "import sys; sys.stdin.readline(); taken = b'x' * (320 << 20); sys.stdin.readline()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, bufsize=0) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        yield process
        process.kill()


@pytest.mark.slow
async def test_a_program_in_a_group_with_a_limit_wakes_the_watch_before_it_gets_there(
    inside: Path, group: Path, taker: subprocess.Popen[bytes]
) -> None:
    with Watch(256 * MIB, inside) as watch:
        assert any(str(group) in one for one in watch.watched)
        assert not await watch.wait(0.05)
        assert taker.stdin is not None
        taker.stdin.write(b"\n")
        assert await watch.wait(30.0)
    assert taker.poll() is None  # the limit did not end it
