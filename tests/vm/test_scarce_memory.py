"""Programs that nobody announced get the memory that is lent, told by the kernel's own figures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import memfaas
from memfaas import CapacityError, LocalCluster, Session
from memfaas.client import local
from memfaas.server.governor import margin
from memfaas.server.pressure import HOLDER, Watch
from memfaas.units import MIB
from tests.vm.node import GROUPS, Program, figure, make_group, meminfo, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.slow]

HEADROOM = 128 * MIB
LENT = 384 * MIB
CALM_S, PAUSE_S = 5.0, 2.0
MORE = 64 * MIB
"""What programs want beyond what there is."""
SMALL_HEADROOM = 48 * MIB
GROUP_LIMIT = 448 * MIB
IN_GROUP = 192 * MIB
LONG_S = 1000.0
VMSTAT = Path("/proc/vmstat")
PATIENCE_S = 90.0
"""An emulated machine takes its time to start a program."""


@pytest.fixture(scope="module", autouse=True)
def other_times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Donors lend again after seconds, not minutes, and may take longer to start."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "sitecustomize.py").write_text(
        "from memfaas.server import governor\n"
        f"governor.Governor.__init__.__kwdefaults__['calm_s'] = {CALM_S}\n"
        f"governor.PAUSE_S = {PAUSE_S}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setattr(local, "START_S", PATIENCE_S)
        yield


def fill(session: Session, size: int) -> None:
    """Has the node lend so much, with one value in it."""

    def granted() -> bool:
        try:
            session.store("ours", size=size).put("key", b"value")
        except CapacityError:  # the donor has not started a function in time
            return False
        return True

    wait_until(granted, "the donor grants a lease")
    wait_until(lambda: meminfo("Shmem") > size, "the donor has populated what it lends")


def offered(session: Session) -> int:
    return session.status().donors[0].memory.offered


def reserved(session: Session) -> int:
    return session.status().donors[0].reclaimed.get(HOLDER, 0)


# --- the whole node ------------------------------------------------------------------------------------


def test_the_kernel_wakes_the_watch_when_a_program_waits_for_memory() -> None:
    group = make_group("thirsty", memory_high=16 * MIB)

    async def watch_it() -> None:
        with Watch(HEADROOM) as watch, Program(group) as program:
            assert "/proc/pressure/memory" in watch.watched
            assert not await watch.wait(0.5)
            program.begin_to_take(MORE)
            assert await watch.wait(PATIENCE_S)

    trio.run(watch_it)
    group.rmdir()


def test_a_program_gets_what_was_lent_and_it_is_lent_again_step_by_step_when_the_program_has_ended() -> None:
    killed = figure(VMSTAT, "oom_kill")
    with (
        LocalCluster(memory=LENT, headroom=HEADROOM, lease_ttl=LONG_S) as cluster,
        memfaas.connect(cluster.address, timeout=PATIENCE_S) as session,
    ):
        fill(session, LENT * 3 // 4)
        lent = meminfo("Shmem")
        with Program() as program:
            program.take(meminfo("MemAvailable") + MORE)
            assert lent - meminfo("Shmem") >= MORE
            wait_until(lambda: meminfo("MemAvailable") >= HEADROOM, "the headroom is there again")
            wait_until(lambda: offered(session) <= LENT - MORE, "the broker knows")
            time.sleep(PAUSE_S)
            less = offered(session)
            time.sleep(2 * CALM_S)
            assert offered(session) == less  # enough was taken at once, and nothing is lent while it is wanted
            assert meminfo("MemAvailable") >= HEADROOM
        ended = time.monotonic()
        seen = [less]
        while seen[-1] < LENT:
            assert time.monotonic() - ended < PATIENCE_S, (seen, (cluster.folder / "donor0.log").read_text())
            time.sleep(0.2)
            if offered(session) != seen[-1]:
                seen.append(offered(session))
        assert len(seen) > 2, seen
        assert seen == sorted(seen)
        assert session.store("ours").get("key") == b"value"
        with memfaas.connect(cluster.address, tenant="operator", timeout=PATIENCE_S) as operator:
            (account,) = operator.usage().donors
        assert account.reclaims > 0
        assert account.reclaimed >= MORE
    assert figure(VMSTAT, "oom_kill") == killed


# --- a control group of version 2 ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Iterator[Path]:
    group = make_group("job", memory_high=GROUP_LIMIT)
    yield group
    group.rmdir()


@contextmanager
def donor_in(group: Path, memory: str | int) -> Iterator[Session]:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        cluster = LocalCluster(memory=memory, headroom=SMALL_HEADROOM, lease_ttl=LONG_S)
    finally:
        (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
    with cluster, memfaas.connect(cluster.address, timeout=PATIENCE_S) as session:
        try:
            yield session
        finally:
            print((cluster.folder / "donor0.log").read_text())


@pytest.fixture(scope="module")
def session(group: Path) -> Iterator[Session]:
    """With a donor in the group, whose memory is lent."""
    with donor_in(group, IN_GROUP) as session:
        fill(session, IN_GROUP * 3 // 4)
        yield session


def test_a_donor_in_a_group_lends_no_more_than_the_group_can_spare(group: Path) -> None:
    with donor_in(group, "auto") as session:
        assert MORE < offered(session) <= GROUP_LIMIT - SMALL_HEADROOM - margin(SMALL_HEADROOM)
        assert meminfo("MemAvailable") > GROUP_LIMIT  # so it is the group that has no more


def test_a_neighbour_in_the_group_gets_what_was_lent_and_nobody_is_killed(group: Path, session: Session) -> None:
    lent = figure(group / "memory.stat", "shmem")
    with Program(group) as neighbour:
        used = int((group / "memory.current").read_text()) - figure(group / "memory.stat", "file") + lent
        neighbour.take(GROUP_LIMIT - used + MORE)
        assert lent - figure(group / "memory.stat", "shmem") >= MORE
        wait_until(lambda: reserved(session) > 0, "the broker knows")
        less = offered(session)
    assert figure(group / "memory.events", "oom") == 0
    assert figure(group / "memory.events", "oom_kill") == 0
    assert session.store("ours").get("key") == b"value"
    wait_until(lambda: offered(session) > less, "some of it is lent again")
