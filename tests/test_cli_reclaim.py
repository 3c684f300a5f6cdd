"""`memfaas reclaim` and `lend`: what they ask, of whom, and what they make of the answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click.testing
import msgspec
import pytest
import trio

from memfaas import auth, messages, rpc
from memfaas.cli import main
from memfaas.cli.listing import make_console
from memfaas.cli.reclaim import TOO_LATE, report
from memfaas.client.aio import open_session
from memfaas.client.session import connect
from memfaas.errors import UsageError
from memfaas.local_agent import SOCKET
from memfaas.units import GIB, MIB

STEPS = [
    messages.FreedBytes(how="unlent", size=GIB, seconds=0.01),
    messages.FreedBytes(how="punched", size=256 * MIB, seconds=0.02, lease=b"a" * 16, what="shard 3 of store 'x'"),
    messages.FreedBytes(
        how="migrated", size=512 * MIB, seconds=0.2, lease=b"b" * 16, what="shard 1 of store 'y'", pause=0.0031
    ),
    messages.FreedBytes(how="dropped", size=MIB, seconds=0.3, lease=b"c" * 16, what="shard 0 of store 'z'"),
]
LOST = messages.FreedBytes(how="lost", size=MIB, seconds=0.6, lease=b"d" * 16, what="region 64646464 of bob")


class Other:
    """A broker, and a donor's agent, that answer as they are told and note what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.secret_file = folder / "secret"
        auth.create_secret(self.secret_file)
        self.runtime_dir = folder / "run"
        self.asked: list[tuple[str, messages.Message]] = []
        self.answer: messages.Message | None = None
        self.lent = 2 * GIB
        self._by = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)

    async def on_request(self, message: messages.Message) -> messages.Message:
        if isinstance(message, messages.OpenSession):
            return messages.SessionOpened(session=message.session, ttl=30.0)
        if isinstance(message, messages.Renew):
            return messages.Renewed(ttl=30.0, gone=[])
        if isinstance(message, messages.CloseSession):
            return messages.Done()
        self.asked.append((self._by, message))
        if isinstance(message, messages.Lend):
            return messages.Lent(size=self.lent)
        if self.answer is None:
            raise UsageError("there is no donor of this name")
        return self.answer

    def on_notice(self, message: messages.Message) -> None:
        raise AssertionError(message)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        home = self.runtime_dir / "node7"
        home.mkdir(parents=True)
        unix = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await unix.bind(str(home / SOCKET))
        unix.listen()
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, self._broker, 0, host="127.0.0.1"))
            nursery.start_soon(trio.serve_listeners, self._agent, [trio.SocketListener(unix)])
            port = listener.socket.getsockname()[1]
            self.address = f"memfaas://127.0.0.1:{port}?secret={self.secret_file}"
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    async def _broker(self, stream: trio.SocketStream) -> None:
        hello = await rpc.admit(stream, auth.read_secret(self.secret_file))
        self._by = f"tenant {hello.name}"
        await rpc.Channel(stream, self, "the client").run()

    async def _agent(self, stream: trio.SocketStream) -> None:
        self._by = "node"
        await rpc.Channel(stream, self, "the program").run()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(30)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    other = Other(tmp_path)
    other.start()
    yield other
    other.stop()


def answer(*steps: messages.FreedBytes, in_time: bool = True, asked: int = 1792 * MIB) -> messages.Reclaimed:
    return messages.Reclaimed(
        donor="node7",
        asked=asked,
        freed=sum(step.size for step in steps if step.seconds <= 0.5),
        seconds=0.4 if in_time else 0.6,
        in_time=in_time,
        steps=list(steps),
        held=3 * GIB,
        wanted=2 * GIB,
        deadline=0.5,
    )


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, arguments, env={"MEMFAAS_TENANT": "bob"})


# --- reclaim ------------------------------------------------------------------------------------------


def test_the_operator_asks_the_broker_for_all_that_was_said(other: Other) -> None:
    other.answer = answer(*STEPS)
    result = run(
        *("reclaim", "--node", "node7", "--bytes", "2GiB", "--deadline", "300ms"),
        *("--holder", "job 17", "--broker", other.address),
    )
    assert result.exit_code == 0, result.output
    request = messages.Reclaim(donor="node7", size=2 * GIB, deadline=0.3, holder="job 17")
    assert other.asked == [("tenant operator", request)]
    head = "donor node7: 1.75 GiB of 1.75 GiB free after 400 ms, in time; 3 GiB taken back in all by this holder"
    for words in (head, "asked for 2 GiB; it had only 1.75 GiB left to lend", "nobody had leased it"):
        assert words in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if "moved to another donor" in line]
    for words in ("512 MiB", "200 ms", "3.1 ms", "shard 1 of store 'y'"):
        assert words in row
    assert "lost" not in result.stdout


def test_what_was_lost_is_named_and_a_missed_deadline_has_a_status_of_its_own(other: Other) -> None:
    other.answer = answer(*STEPS, LOST, in_time=False, asked=1794 * MIB)
    result = run("reclaim", "--node", "node7", "--bytes", "2GiB", "--broker", other.address)
    assert result.exit_code == TOO_LATE == 50
    assert "1.75 GiB of 1.75 GiB free by the deadline (500 ms), all after 600 ms, TOO LATE" in result.stdout
    assert "lost: region 64646464 of bob" in result.stdout
    assert result.stderr == ""


def printed(answer: messages.Reclaimed) -> str:
    console = make_console()
    with console.capture() as capture:
        console.print(report(answer))
    return capture.get()


def test_what_left_beyond_what_was_asked_is_not_counted() -> None:
    more = messages.FreedBytes(how="migrated", size=220 * MIB, seconds=0.2)
    assert "200 MiB of 200 MiB free after 400 ms, in time" in printed(answer(more, asked=200 * MIB))


def test_what_came_too_late_is_not_said_to_have_been_free() -> None:
    late = messages.FreedBytes(how="migrated", size=220 * MIB, seconds=0.6)
    head = "0 B of 200 MiB free by the deadline (500 ms), all after 600 ms, TOO LATE"
    assert head in printed(answer(late, in_time=False, asked=200 * MIB))
    head = "0 B of 300 MiB free by the deadline (500 ms), 220 MiB after 600 ms, TOO LATE"
    assert head in printed(answer(late, in_time=False, asked=300 * MIB))
    head = "0 B of 300 MiB free by the deadline (500 ms), TOO LATE"
    assert head in printed(answer(in_time=False, asked=300 * MIB))


def test_a_donor_with_nothing_left_to_lend_is_named(other: Other) -> None:
    other.answer = answer(asked=0)
    command = ("reclaim", "--node", "node7", "--bytes", "2GiB", "--broker", other.address)
    assert "donor node7: asked for 2 GiB; it had nothing left to lend; 3 GiB taken" in run(*command).stdout
    facts = json.loads(run(*command, "--json").stdout)
    assert (facts["wanted"], facts["asked"]) == (2 * GIB, 0)


def test_brackets_in_a_stores_name_are_no_markup() -> None:
    named = msgspec.structs.replace(LOST, what="shard 0 of store 'run[bold]7[/y]'")
    assert printed(answer(named, asked=MIB)).count("shard 0 of store 'run[bold]7[/y]'") == 2


@pytest.mark.parametrize("in_time", [True, False])
def test_it_can_be_read_by_programs(other: Other, in_time: bool) -> None:
    other.answer = answer(*STEPS, in_time=in_time)
    result = run("reclaim", "--node", "node7", "--bytes", "2GiB", "--broker", other.address, "--json")
    assert result.exit_code == (0 if in_time else TOO_LATE)
    facts = json.loads(result.stdout)
    assert (facts["donor"], facts["in_time"], facts["freed"]) == ("node7", in_time, answer(*STEPS).freed)
    assert facts["steps"][2]["lease"] == (b"b" * 16).hex()
    assert [step["how"] for step in facts["steps"]] == ["unlent", "punched", "migrated", "dropped"]


def test_an_unknown_donor_is_an_error_in_one_line(other: Other) -> None:
    result = run("reclaim", "--node", "nowhere", "--bytes", "1", "--broker", other.address)
    assert (result.exit_code, result.stderr) == (2, "memfaas: there is no donor of this name\n")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--node", "d", "--bytes", "lots"],
        ["--node", "d", "--bytes", "0"],
        ["--node", "d", "--deadline", "soon"],
    ],
)
def test_what_makes_no_sense_asks_nobody(other: Other, more: list[str]) -> None:
    size = [] if "--bytes" in more else ["--bytes", "1"]
    assert run("reclaim", "--broker", other.address, *size, *more).exit_code == 2
    assert other.asked == []


def test_a_tenants_key_is_not_the_operators(other: Other, tmp_path: Path) -> None:
    secret = auth.read_secret(other.secret_file)
    auth.write_tenant_key(tmp_path / "bob.key", auth.Credentials.of_tenant(secret, "bob"))
    address = other.address.partition("?")[0]
    result = run(
        "reclaim", "--node", "d", "--bytes", "1", "--broker", address, "--secret-file", str(tmp_path / "bob.key")
    )
    assert result.exit_code == 20
    assert "--secret-file" in result.stderr
    assert other.asked == []


# --- on the node itself -----------------------------------------------------------------------------


def test_the_donor_of_this_node_is_asked_without_a_broker(other: Other) -> None:
    other.answer = answer(*STEPS)
    place = ("--local", "--node", "node7", "--runtime-dir", str(other.runtime_dir))
    result = run("reclaim", *place, "--bytes", "2GiB", "--holder", "job 17", "--broker", "127.0.0.1:1")
    assert result.exit_code == 0, result.output
    lent = run("lend", *place, "--holder", "job 17", "--broker", "127.0.0.1:1")
    assert (lent.exit_code, lent.stdout) == (0, "node7 lends 2 GiB again\n")
    assert other.asked == [
        ("node", messages.Reclaim(donor="node7", size=2 * GIB, deadline=0.5, holder="job 17")),
        ("node", messages.Lend(donor="node7", holder="job 17")),
    ]


def test_the_donor_of_this_node_may_refuse(other: Other) -> None:
    result = run("reclaim", "--local", "--node", "node7", "--runtime-dir", str(other.runtime_dir), "--bytes", "1")
    assert (result.exit_code, result.stderr) == (2, "memfaas: there is no donor of this name\n")


def test_a_node_without_a_donor_is_told(tmp_path: Path) -> None:
    result = run("lend", "--local", "--node", "node8", "--runtime-dir", str(tmp_path))
    assert result.exit_code == 30
    for words in (f"no donor answers at {tmp_path}/node8/agent.sock", "--node", "--runtime-dir"):
        assert words in result.stderr
    assert result.stderr.count("\n") == 1


# --- lend, and the session's methods ------------------------------------------------------------------


def test_lending_again_is_asked_of_the_broker(other: Other) -> None:
    result = run("lend", "--node", "node7", "--broker", other.address)
    assert (result.exit_code, result.stdout) == (0, "node7 lends 2 GiB again\n")
    assert other.asked == [("tenant operator", messages.Lend(donor="node7", holder="operator"))]


def test_that_nothing_was_to_be_lent_again_is_told(other: Other) -> None:
    other.lent = 0
    result = run("lend", "--node", "node7", "--holder", "job 99", "--broker", other.address)
    assert (result.exit_code, result.stdout) == (0, "'job 99' had taken nothing from node7\n")


def test_a_session_reclaims_lends_and_asks_for_usage(other: Other) -> None:
    other.answer = answer(*STEPS)
    with connect(other.address, tenant="operator") as session:
        assert session.reclaim("node7", "1GiB") == other.answer
        assert session.lend("node7") == 2 * GIB
        usage = other.answer = messages.UsageReport(since=1.0, now=2.0, tenants=[], donors=[])
        assert session.usage() == usage
        with pytest.raises(UsageError):
            session.reclaim("node7", "1GiB", deadline="soon")
    assert [message for _, message in other.asked] == [
        messages.Reclaim(donor="node7", size=GIB, deadline=0.5, holder="operator"),
        messages.Lend(donor="node7", holder="operator"),
        messages.AskUsage(),
    ]


async def test_so_does_an_async_session(other: Other) -> None:
    other.answer = answer(*STEPS)
    async with open_session(other.address, tenant="operator") as session:
        assert await session.reclaim("node7", "1GiB", deadline=2, holder="job 17") == other.answer
        assert await session.lend("node7", holder="job 17") == 2 * GIB
        usage = other.answer = messages.UsageReport(since=1.0, now=2.0, tenants=[], donors=[])
        assert await session.usage() == usage
    assert [message for _, message in other.asked] == [
        messages.Reclaim(donor="node7", size=GIB, deadline=2.0, holder="job 17"),
        messages.Lend(donor="node7", holder="job 17"),
        messages.AskUsage(),
    ]
