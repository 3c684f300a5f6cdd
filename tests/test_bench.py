"""The benchmark measures what it says, on systems and clocks that the tests control."""

from __future__ import annotations

import io
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from memfaas.bench import bars, idle, procfs, report, result
from memfaas.bench.bars import BARS, NETWORKED_PEERS, PEERS, Bar
from memfaas.bench.cli import bench
from memfaas.bench.crew import CrewError, CrewLost, camp
from memfaas.bench.kv import measure_systems
from memfaas.bench.link import Failed, Link, Load, Prepare, Ran, Run, Stop
from memfaas.bench.measure import MAX_BLOCK, Action, Slice, calibrate, measure, one_argument
from memfaas.bench.peers import SYSTEMS
from memfaas.bench.peers.base import Kind, ServerSystem, Site, StartError
from memfaas.bench.plan import BATCH, Case, cases, key_count
from memfaas.bench.result import Cell, Machine, Result, Round, SystemInfo
from memfaas.bench.run import Interleaved, figures_of
from memfaas.bench.stats import fairness, paired_ratio, quantile
from memfaas.bench.values import Values, write_pool
from memfaas.bench.worker import StoreWorker, carry_out


class FakeTime:
    """A clock that moves only when something says that it took time."""

    def __init__(self) -> None:
        self.ns = 1_000

    def clock(self) -> int:
        return self.ns

    def now(self) -> float:
        return self.ns / 1e9


class SlowStore:
    """A store in a dict, whose operations take `op_ns` of a fake clock."""

    def __init__(self, time: FakeTime, op_ns: int) -> None:
        self.time = time
        self.op_ns = op_ns
        self.values: dict[str, bytes] = {}

    def key(self, name: str) -> str:
        return name

    def put(self, key: str, value: bytes) -> None:
        self.time.ns += self.op_ns
        self.values[key] = value

    def get(self, key: str) -> bytes | None:
        self.time.ns += self.op_ns
        return self.values.get(key)

    def close(self) -> None:
        self.values.clear()


class FakeCrew:
    """Clients of slow stores, one after the other on the same clock."""

    def __init__(
        self, name: str, time: FakeTime, op_ns: int, *, clients: int = 1, kind: Kind = "peer", noise: float = 0
    ) -> None:
        self.name = name
        self.kind: Kind = kind
        self.time = time
        self.noise = noise
        self.stores = [SlowStore(time, op_ns) for _ in range(clients)]
        values = Values(bytes(range(256)) * 20)
        self.workers = [StoreWorker(store, i, values, time.clock) for i, store in enumerate(self.stores)]
        self.fail: Callable[[Case], None] = lambda case: None
        self.log: list[Case] = []
        self.rests = 0

    def can(self, case: Case) -> bool:
        return case.op in ("put", "get") and case.clients <= len(self.workers)

    def load(self, size: int, clients: int) -> None:
        for worker in self.workers[:clients]:
            worker.load(size)

    def prepare(self, case: Case) -> float:
        self.fail(case)
        return max(worker.prepare(case) for worker in self.workers[: case.clients])

    def run(self, case: Case, window_s: float) -> list[Slice]:
        self.log.append(case)
        return [worker.run(self.time.clock() + int(window_s * 1e9)) for worker in self.workers[: case.clients]]

    def rest(self) -> None:
        self.rests += 1


SMALL = [Case("put", 100, 1), Case("get", 100, 1)]


def cell_of(found: Sequence[Cell], system: str, op: str = "get") -> Cell:
    return next(cell for cell in found if cell.system == system and cell.op == op)


# --- the measuring core ---------------------------------------------------------------------------


@pytest.mark.parametrize("op_ns", [150, 700, 9_000, 80_000, 40_000_000])
def test_measured_time_is_the_time_an_operation_takes(op_ns: int) -> None:
    time = FakeTime()
    store = SlowStore(time, op_ns)
    action = Action(one_argument(store.get), [str(i) for i in range(64)])
    block, estimate = calibrate(action, time.clock)
    outcome = measure(action, block, time.clock() + 20 * 1_000_000, time.clock)
    assert estimate == op_ns
    assert set(outcome.blocks) == set(outcome.singles) == {op_ns}
    assert outcome.elapsed_ns == outcome.ops * op_ns


def test_fast_operations_are_timed_in_blocks_and_slow_ones_alone() -> None:
    time = FakeTime()
    items = list(range(64))

    def block_of(op_ns: int) -> int:
        store = SlowStore(time, op_ns)
        return calibrate(Action(one_argument(lambda _: store.get("")), items), time.clock)[0]

    assert block_of(100) == MAX_BLOCK
    assert 16 <= block_of(1_000) <= 32
    assert block_of(30_000) == 1


def test_calibration_of_slow_operations_does_not_do_all_of_them() -> None:
    time = FakeTime()
    store = SlowStore(time, 30_000_000)
    calibrate(Action(one_argument(store.get), [str(i) for i in range(64)]), time.clock)
    assert time.ns < 64 * store.op_ns / 4


def test_an_operation_longer_than_the_slice_is_done_once() -> None:
    time = FakeTime()
    store = SlowStore(time, 5_000_000_000)
    outcome = measure(Action(one_argument(store.get), ["a"]), 1, time.clock() + 1_000, time.clock)
    assert (outcome.ops, outcome.elapsed_ns) == (1, 5_000_000_000)


def test_a_slow_outlier_shows_in_the_tail_and_not_in_the_median() -> None:
    time = FakeTime()
    calls = 0

    def get(key: object) -> None:
        nonlocal calls
        calls += 1
        time.ns += 1_000_000 if calls % 50 == 0 else 10_000

    outcome = measure(Action(one_argument(get), [0]), 1, time.clock() + 50_000_000, time.clock)
    assert figures_of([outcome]).median_us == 10
    assert quantile(outcome.singles, 0.99) == 1_000_000


# --- the statistics -------------------------------------------------------------------------------


def test_a_quantile_is_a_value_that_occurred() -> None:
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([7.0], 0.5) == 7.0


def test_a_paired_ratio_ignores_rounds_where_one_is_missing() -> None:
    assert paired_ratio([2.0, None, 9.0, 4.0], [1.0, 1.0, None, 2.0]) == 2.0
    assert paired_ratio([None], [1.0]) is None


def test_fairness_is_the_share_of_the_worst() -> None:
    assert fairness([5, 5, 5, 5]) == 1
    assert fairness([0, 10, 10, 20]) == 0
    assert fairness([1, 3]) == 0.5


# --- the interleaved run --------------------------------------------------------------------------


def test_the_run_finds_the_ratio_of_two_systems() -> None:
    time = FakeTime()
    crews = [FakeCrew("fast", time, 700), FakeCrew("slow", time, 2_100)]
    run = Interleaved(crews, SMALL, random.Random(1), now=time.now)
    run.run(2.0)
    found = run.cells()
    for op in ("put", "get"):
        fast, slow = cell_of(found, "fast", op), cell_of(found, "slow", op)
        assert fast.median_us == pytest.approx(0.7)
        assert fast.rate == pytest.approx(1e9 / 700)
        assert paired_ratio(slow.times(), fast.times()) == pytest.approx(3)


def test_a_machine_that_becomes_slower_does_not_change_the_ratio() -> None:
    time = FakeTime()
    crews = [FakeCrew("fast", time, 1_000), FakeCrew("slow", time, 4_000)]
    run = Interleaved(crews, SMALL, random.Random(1), now=time.now)
    started = []

    def slow_down(case: Case) -> None:
        started.append(case)
        if len(started) % (2 * len(SMALL)) == 0:  # at about every other round
            for crew in crews:
                crew.stores[0].op_ns *= 3

    crews[0].fail = slow_down
    run.run(1.0, least_rounds=6)
    found = run.cells()
    ratio = paired_ratio(cell_of(found, "slow").times(), cell_of(found, "fast").times())
    assert len(set(cell_of(found, "fast").times())) > 2
    assert ratio is not None
    assert 3.9 <= ratio <= 12.1  # a change in the middle of a round falls between the two
    assert cell_of(found, "fast").failed is None


def test_every_round_measures_every_system_in_another_order() -> None:
    time = FakeTime()
    crews = [FakeCrew(name, time, 1_000) for name in "abc"]
    order: list[str] = []
    for crew in crews:
        crew.fail = lambda case, name=crew.name: order.append(name)  # type: ignore[misc]
    run = Interleaved(crews, SMALL[:1], random.Random(3), now=time.now)
    run.run(0.1, least_rounds=8)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == run.rounds >= 8
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_the_budget_is_used_and_not_exceeded_by_more_than_a_round() -> None:
    time = FakeTime()
    run = Interleaved([FakeCrew("a", time, 1_000)], SMALL, random.Random(1), now=time.now)
    run.run(5.0)
    assert 3.5 < time.now() < 6.5
    assert run.rounds > 3


def test_systems_rest_after_each_slice() -> None:
    time = FakeTime()
    crew = FakeCrew("a", time, 1_000)
    run = Interleaved([crew], SMALL, random.Random(1), now=time.now)
    run.run(0.1)
    assert crew.rests == 1 + 1 + len(crew.log)  # at the start, after loading, after each slice


def test_an_operation_that_fails_is_named_and_the_others_go_on() -> None:
    time = FakeTime()
    good, bad = FakeCrew("good", time, 1_000), FakeCrew("bad", time, 1_000)

    def fail(case: Case) -> None:
        if case.op == "put":
            raise CrewError("too large")

    bad.fail = fail
    run = Interleaved([good, bad], SMALL, random.Random(1), now=time.now)
    run.run(0.5)
    found = run.cells()
    assert cell_of(found, "bad", "put").failed == "too large"
    assert cell_of(found, "bad", "put").median_us is None
    assert cell_of(found, "bad", "get").median_us == 1
    assert cell_of(found, "good", "put").median_us == 1
    assert not run.lost


def test_a_system_that_goes_away_fails_in_all_that_is_left() -> None:
    time = FakeTime()
    crew = FakeCrew("a", time, 1_000)

    def fail(case: Case) -> None:
        raise CrewLost("its server ended with status -9")

    crew.fail = fail
    run = Interleaved([crew], SMALL, random.Random(1), now=time.now)
    run.run(0.5)
    assert run.lost == {"a": "its server ended with status -9"}
    assert {cell.failed for cell in run.cells()} == {"its server ended with status -9"}


def test_shared_cases_report_the_total_and_the_fairness() -> None:
    time = FakeTime()
    crew = FakeCrew("a", time, 1_000, clients=4)
    crew.stores[3].op_ns = 4_000
    run = Interleaved([crew], [Case("get", 100, 4)], random.Random(1), now=time.now)
    run.run(0.5)
    (cell,) = run.cells()
    assert cell.rate == pytest.approx(3e6 + 0.25e6, rel=0.01)
    assert cell.fairness == pytest.approx(0.25e6 / (3.25e6 / 4), rel=0.01)


def test_wrong_bytes_are_a_failure() -> None:
    time = FakeTime()
    store = SlowStore(time, 1_000)
    worker = StoreWorker(store, 0, Values(bytes(range(256)) * 20), time.clock)
    worker.load(100)
    worker.prepare(Case("get", 100, 1))
    for key in store.values:
        store.values[key] = b"\0" * 100
    answer = carry_out(worker, Run(0, time.clock() + 1_000))
    assert isinstance(answer, Failed)
    assert "not the right ones" in answer.reason
    store.values.clear()
    worker.prepare(Case("get", 100, 1))
    answer = carry_out(worker, Run(0, time.clock() + 1_000))
    assert isinstance(answer, Failed)
    assert "nothing" in answer.reason


def test_the_working_set_has_distinct_values() -> None:
    values = Values(random.Random(0).randbytes(10_000))
    assert len({values.value(100, index) for index in range(key_count(100))}) == key_count(100)
    with pytest.raises(ValueError, match="no value"):
        values.value(10_000, 1)


def test_cases_cover_every_size_alone_and_with_four_clients() -> None:
    found = set(cases())
    assert {(c.size, c.clients) for c in found if c.op == "get"} == {(c.size, n) for c in found for n in (1, 4)}
    assert Case("put_many", 100, 1, BATCH) in found
    assert not any(case.batch > 1 for case in cases([4096]))


# --- client processes -----------------------------------------------------------------------------


class DictSystem(ServerSystem):
    """A peer whose client processes keep a dict each."""

    name = "dict"
    kind = "peer"
    networked = False
    script = """
import sys
from pathlib import Path
from memfaas.bench.worker import serve

class Client(dict):
    def key(self, name): return name
    put = dict.__setitem__
    get = dict.__getitem__
    def close(self): pass

door, pool, index = sys.argv[1:]
serve(Client(), Path(door), Path(pool), int(index))
"""

    def available(self) -> str | None:
        return None

    def detail(self) -> str:
        return "a dict"

    def start(self, site: Site) -> None:
        for index in range(site.clients):
            self.start_process(
                site, f"client {index}", [sys.executable, "-c", self.script, site.door, site.pool, str(index)]
            )

    def connect(self, endpoint: str) -> Any:
        raise NotImplementedError


class CrashingSystem(DictSystem):
    name = "crashing"
    script = "raise SystemExit('no licence found')"


class AbsentSystem(DictSystem):
    name = "absent"

    def available(self) -> str | None:
        return "the Python module absent is not installed"


@pytest.fixture
def our_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    for system in (DictSystem, CrashingSystem, AbsentSystem):
        monkeypatch.setitem(SYSTEMS, system.name, system)


def test_client_processes_take_turns_and_go_on_after_a_failure() -> None:
    with camp([100]) as place:
        crew = place.start(DictSystem(), 4)
        case = Case("get", 100, 4)
        assert crew.can(case)
        assert not crew.can(Case("get_many", 100, 1, BATCH))
        assert not crew.can(Case("get", 100, 5))
        crew.load(100, 4)
        assert crew.prepare(case) > 0
        slices = crew.run(case, 0.01)
        assert len(slices) == 4
        assert all(part.ops > 0 for part in slices)
        with pytest.raises(CrewError, match="KeyError"):
            crew.prepare(Case("get", 4096, 1))  # was never loaded
        crew.prepare(case)
        assert len(crew.run(case, 0.01)) == 4


def test_a_client_that_dies_is_lost() -> None:
    with camp([100]) as place:
        system = DictSystem()
        crew = place.start(system, 1)
        crew.load(100, 1)
        _, _, process = system._processes[0]
        process.kill()
        process.wait()
        with pytest.raises(CrewLost, match="client 0 ended with status -9"):
            crew.load(100, 1)


def test_a_system_that_does_not_start_says_why() -> None:
    with camp([100]) as place, pytest.raises(StartError, match="no licence found"):
        place.start(CrashingSystem(), 1)


@pytest.mark.usefixtures("our_systems")
def test_systems_that_cannot_take_part_are_named_with_the_reason() -> None:
    found = measure_systems(["dict", "crashing", "absent"], [100], 0.1, command="compare", least_rounds=1)
    reasons = {system.name: system.skipped for system in found.systems}
    assert reasons["dict"] is None
    assert reasons["absent"] == "the Python module absent is not installed"
    assert "no licence found" in (reasons["crashing"] or "")
    assert {cell.system for cell in found.cells} == {"dict"}
    text = shown(found)
    assert "skipped absent: the Python module absent is not installed" in text
    assert "skipped crashing" in text


def test_messages_survive_the_link() -> None:
    left, right = socket.socketpair()
    with left, right:
        one, other = Link(left), Link(right)
        ran = Ran(Slice(ops=9, elapsed_ns=1, blocks=[0.5] * 50_000, singles=[]))
        thread = threading.Thread(target=other.send, args=(ran,))
        thread.start()
        assert one.answer(5.0) == ran
        thread.join()
        for order in (Load(100), Prepare(Case("get", 100, 1)), Run(1, 2), Stop()):
            one.send(order)
            assert other.next_order() == order
        with pytest.raises(TimeoutError):
            one.answer(0.01)
        right.close()
        with pytest.raises(EOFError):
            one.answer(1.0)


def test_the_pool_file_gives_all_processes_the_same_values(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    write_pool(pool, [100, 4096])
    one, other = Values.open(pool), Values.open(pool)
    assert one.value(4096, 63) == other.value(4096, 63)
    assert len(one.value(4096, 63)) == 4096


# --- floors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["memory copy", "C round trip"])
def test_floors_are_measured(name: str) -> None:
    system = SYSTEMS[name]()
    if (why := system.available()) is not None:
        pytest.skip(why)
    found = measure_systems([name], [100, 65536], 0.1, command="kv", least_rounds=1)
    assert found.systems[0].skipped is None, found.systems[0].skipped
    assert not found.failures()
    assert {(c.op, c.size, c.clients) for c in found.cells if c.median_us} == {
        (op, size, 1) for op in ("put", "get") for size in (100, 65536)
    }


# --- results, bars, reports -----------------------------------------------------------------------


def make_cell(system: str, us: Sequence[float], *, op: str = "get", size: int = 100, **more: Any) -> Cell:
    cell = Cell(**{"system": system, "op": op, "size": size, "clients": 1, "batch": 1, **more})
    if us:
        cell.rounds = [Round(median_us=t, rate=1e6 / t * cell.clients, fairness=0.9) for t in us]
        cell.median_us = cell.p99_us = sorted(us)[len(us) // 2]
        cell.p99_samples = 100
        cell.rate = 1e6 / cell.median_us * cell.clients
        cell.bytes_per_s = cell.rate * size
        cell.fairness = 0.9 if cell.clients > 1 else None
    return cell


def make_result(*cells: Cell, skipped: dict[str, str] | None = None) -> Result:
    kinds: dict[str, Kind] = {"memfaas shm": "memfaas", "memfaas tcp": "memfaas", "C round trip": "floor"}
    names = dict.fromkeys([*(cell.system for cell in cells), *(skipped or {})])
    return Result(
        command="compare",
        started="2026-01-01 00:00:00",
        seconds=1.0,
        seed=1,
        rounds=max((len(cell.rounds) for cell in cells), default=0),
        machine=Machine(
            processor="P",
            cores=2,
            memory_bytes=1 << 30,
            kernel="6",
            python="3",
            shmem_huge_pages="never",
            load_before=0,
        ),
        systems=[
            SystemInfo(
                name=name,
                kind=kinds.get(name, "peer"),
                networked=name != "LMDB",
                detail="v1",
                skipped=(skipped or {}).get(name),
            )
            for name in names
        ],
        cells=list(cells),
    )


def shown(found: Result) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.show(found))
    return console.export_text()


def one_verdict(found: Result, bar: Bar) -> result.Verdict:
    (verdict,) = bars.judge(found, [bar])
    return verdict


SPEED = Bar("b", "speed", "memfaas shm", 2, "LMDB", ops=("get",), sizes=(100,))


def test_a_speed_bar_takes_the_median_of_the_ratios_of_the_rounds() -> None:
    found = make_result(make_cell("memfaas shm", [1, 2, 4]), make_cell("LMDB", [3, 4, 40]))
    verdict = one_verdict(found, SPEED)
    assert (verdict.figure, verdict.passed) == (3, True)
    found = make_result(make_cell("memfaas shm", [1, 2, 4]), make_cell("LMDB", [1.9, 3.8, 40]))
    assert one_verdict(found, SPEED).passed is False


def test_a_slowness_bar_passes_below_its_threshold() -> None:
    bar = Bar("b", "slowness", "memfaas tcp", 1.4, "C round trip", ops=("get",), sizes=(100,), at_least=False)
    cells = [make_cell("C round trip", [10])]
    assert one_verdict(make_result(make_cell("memfaas tcp", [14]), *cells), bar).passed is True
    assert one_verdict(make_result(make_cell("memfaas tcp", [15]), *cells), bar).passed is False


def test_a_bar_against_a_group_takes_the_best_of_it_in_each_round() -> None:
    bar = Bar("b", "speed", "memfaas tcp", 1.5, NETWORKED_PEERS, ops=("get",), sizes=(100,))
    found = make_result(
        make_cell("memfaas tcp", [10, 10]),
        make_cell("LMDB", [1, 1]),  # no networked peer
        make_cell("redis (tcp)", [20, 60]),
        make_cell("memcached (tcp)", [60, 20]),
    )
    assert one_verdict(found, bar).figure == 2
    everyone = Bar("b", "speed", "memfaas tcp", 1.5, PEERS, ops=("get",), sizes=(100,))
    assert one_verdict(found, everyone).figure == pytest.approx(0.1)


def test_a_rate_bar_compares_totals_of_all_clients() -> None:
    bar = Bar("b", "rate", "memfaas shm", 1, PEERS, ops=("get",), sizes=(100,), clients=4)
    found = make_result(make_cell("memfaas shm", [2], clients=4), make_cell("LMDB", [3], clients=4))
    assert one_verdict(found, bar).figure == pytest.approx(1.5)


def test_a_fairness_bar_reads_the_subject_alone() -> None:
    bar = Bar("b", "fairness", "memfaas shm", 0.5, ops=("get",), sizes=(100,), clients=4)
    assert one_verdict(make_result(make_cell("memfaas shm", [2], clients=4)), bar).figure == 0.9


def test_a_batch_bar_compares_keys_per_second() -> None:
    bar = Bar("b", "batch", "memfaas tcp", 5, ops=("get",), sizes=(100,))
    batch = make_cell("memfaas tcp", [2], op="get_many", batch=BATCH)
    found = make_result(make_cell("memfaas tcp", [16]), batch)
    assert one_verdict(found, bar).figure == pytest.approx(8)
    assert one_verdict(make_result(make_cell("memfaas tcp", [16])), bar).passed is None


def test_a_bar_that_cannot_be_measured_says_why_and_is_not_passed() -> None:
    skipped = make_result(make_cell("memfaas shm", [1]), skipped={"LMDB": "not installed"})
    verdict = one_verdict(skipped, SPEED)
    assert (verdict.figure, verdict.passed, verdict.note) == (None, None, "LMDB skipped: not installed")
    assert bars.missed([verdict]) == [verdict]
    failed = make_result(make_cell("memfaas shm", [1]), make_cell("LMDB", [], failed="full"))
    assert one_verdict(failed, SPEED).note == "LMDB failed: full"
    assert one_verdict(make_result(make_cell("memfaas shm", [1])), SPEED).note == "LMDB did not take part"


def test_a_group_with_a_missing_member_is_judged_and_the_member_named() -> None:
    bar = Bar("b", "speed", "memfaas tcp", 1.5, NETWORKED_PEERS, ops=("get",), sizes=(100,))
    found = make_result(
        make_cell("memfaas tcp", [1]), make_cell("redis (tcp)", [3]), skipped={"Mooncake Store (tcp)": "no libibverbs"}
    )
    verdict = one_verdict(found, bar)
    assert (verdict.passed, verdict.note) == (True, "Mooncake Store (tcp) skipped: no libibverbs")


def test_idle_and_lease_bars() -> None:
    found = make_result(make_cell("memfaas shm", [1]))
    by_text = {verdict.bar: verdict for verdict in bars.judge(found)}
    assert by_text["idle donor: 0.0 % CPU"].note == "not measured in this run"
    process = result.IdleProcess(
        pid=1, role="function", cpu_ns=2_000_000, ticks=0, pss_bytes=100 << 20, lent_pss_bytes=90 << 20
    )
    found.idle = result.IdleFigures(seconds=10, processes=[process])
    found.leases = [
        result.LeaseFigures(what="region", fabric="shm", grants=50, size=1 << 20, median_ms=12, p99_ms=30, worst_ms=200)
    ]
    verdicts = bars.judge(found)
    figures = {verdict.bar: verdict.figure for verdict in verdicts if verdict.size is None and verdict.op != "store"}
    assert figures == {
        "lease: first byte in 100 ms": 12,
        "idle donor: 0.0 % CPU": pytest.approx(0.02),
        "idle function: 15 MiB beyond the lent memory": 10,
    }


def test_every_bar_names_systems_that_exist() -> None:
    for bar in BARS:
        assert bar.subject in (*SYSTEMS, "memfaas")
        assert bar.against in ("", PEERS, NETWORKED_PEERS, *SYSTEMS)
    assert len({bar.text for bar in BARS}) == len(BARS)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = make_result(make_cell("memfaas shm", [1, 2]), make_cell("LMDB", [], failed="full"), skipped={"x": "why"})
    found.verdicts = bars.judge(found)
    path = tmp_path / "r.json"
    result.write(found, path)
    assert result.read(path) == found
    document = msgspec.json.decode(path.read_bytes())
    assert document["schema"] == "memfaas-bench-kv/1"
    document["schema"] = "memfaas-bench-kv/0"
    path.write_bytes(msgspec.json.encode(document))
    with pytest.raises(msgspec.ValidationError):
        result.read(path)


def test_the_report_shows_figures_failures_and_verdicts() -> None:
    found = make_result(
        make_cell("memfaas shm", [0.5, 0.5]),
        make_cell("LMDB", [2, 2]),
        make_cell("redis (unix)", [], failed="OSError: full"),
        make_cell("memfaas shm", [0.25, 0.25], op="get_many", batch=BATCH),
        skipped={"DragonHPC DDict": "the program dragon is not installed"},
    )
    found.verdicts = bars.judge(found)
    text = shown(found)
    assert "2.00 µs" in text
    assert "4.0x" in text
    assert "failed redis (unix), get of 100 B, 1 client: OSError: full" in text
    assert "skipped DragonHPC DDict: the program dragon is not installed" in text
    assert ["get", "4.00", "?", "?"] in [line.split() for line in text.splitlines()]  # 100 B, 4 KiB, verdict
    assert "tcp: 0.9 of the C stream: memfaas tcp did not take part" in text


@pytest.mark.slow
def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    from memfaas.bench.plot import plot  # takes a second to import

    cells = [
        make_cell(name, [us * (1 + size / 1e4)], op=op, size=size, clients=clients)
        for name, us in (("memfaas shm", 1), ("LMDB", 2), ("C round trip", 3))
        for op in ("put", "get")
        for size in (100, 1 << 20)
        for clients in (1, 4)
    ]
    path = tmp_path / "p.png"
    plot(make_result(*cells), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_writes_json_and_exits_by_the_bars_only_when_strict(tmp_path: Path) -> None:
    arguments = ["kv", "--quick", "--seconds", "100ms", "--size", "100", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memfaas.bench.kv.OURS", ("memory copy",))
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code == 0, done.output
        assert "idle donor: 0.0 % CPU: not measured in this run" in done.output
        (path,) = tmp_path.glob("bench-kv-*.json")
        assert [cell.system for cell in result.read(path).cells] == ["memory copy"] * 2
        assert CliRunner().invoke(bench, [*arguments, "--strict"]).exit_code == 1


@pytest.mark.parametrize(("option", "value"), [("--size", "5k"), ("--size", "much"), ("--seconds", "soon")])
def test_bad_options_are_named(option: str, value: str) -> None:
    done = CliRunner().invoke(bench, ["kv", option, value])
    assert done.exit_code == 2
    assert option in done.output


# --- idle processes -------------------------------------------------------------------------------

SMAPS = """\
55d0c8000000-55d0c8001000 r--p 00000000 fe:00 1234                       /usr/bin/python3.11
Size:                  4 kB
Pss:                   3 kB
Pss_Dirty:             1 kB
7f0000000000-7f0010000000 rw-s 00000000 00:01 77                         /memfd:memfaas:0a1b (deleted)
Pss:              262144 kB
7f0020000000-7f0020001000 rw-s 00000000 00:01 78                         /memfd:memfaas:0a1b:control (deleted)
Pss:                  64 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0
Pss:                  12 kB
"""


def test_lent_memory_is_told_from_the_rest_of_a_process() -> None:
    total, lent = procfs.sum_pss(SMAPS.splitlines(), idle.is_lent)
    assert total == (3 + 262144 + 64 + 12) * 1024
    assert lent == 262144 * 1024


def test_the_roles_of_a_cluster_are_told_apart() -> None:
    python = ["python", "-P", "-m", "memfaas.cli"]
    assert idle.role_of([*python, "broker", "--until-eof"], 0) == "broker"
    assert idle.role_of([*python, "donor", "--until-eof"], 0) == "donor"
    assert idle.role_of(["python", "-m", "memfaas.server.zygote"], 0) == "helper"
    assert idle.role_of(["python", "-m", "memfaas.server.zygote"], 4096) == "function"


def test_watching_counts_what_a_process_uses_meanwhile() -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        figures = idle.watch([process.pid], 0.1)
    finally:
        process.kill()
        process.wait()
    (watched,) = figures.processes
    assert watched.cpu_ns > 0
    assert watched.pss_bytes > watched.lent_pss_bytes == 0


def test_descendants_are_found_by_what_they_inherited() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"BENCH_TEST_MARK": "this one"},
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert procfs.descendants("BENCH_TEST_MARK", "this one") == [process.pid]
        assert procfs.descendants("BENCH_TEST_MARK", "this") == []
        assert procfs.command_line(process.pid)[0] == sys.executable
        assert procfs.cpu_ns(process.pid) > 0
        assert procfs.pss(process.pid, lambda name: False)[0] > 0
    finally:
        process.communicate(b"\n", timeout=10)
