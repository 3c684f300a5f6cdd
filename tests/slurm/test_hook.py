"""The hooks with brokers and donors that answer, refuse, hang, or are not there. Nothing here needs Slurm."""

from __future__ import annotations

import logging
import os
import pwd
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from memfaas import auth, local_agent, rpc
from memfaas.addresses import Address
from memfaas.errors import BrokerUnavailable, MemfaasError, TransportError, UsageError
from memfaas.messages import Done, FreedBytes, Lend, Message, Reclaim, Reclaimed
from memfaas.server.slurm import ask, hook, jobs, keys, reclaim
from memfaas.units import MIB

SECRET = secrets.token_bytes(32)
OPERATOR = auth.Credentials.of_tenant(SECRET, auth.OPERATOR)
NODES = {"node1": 100 * MIB, "node2": 200 * MIB, "login": 300 * MIB}


class FakeSide:
    """A broker, or a donor's agent, that remembers what it was asked."""

    def __init__(self, held: int = 0) -> None:
        self.asked: list[Message] = []
        self.held = held
        self.in_time = True
        self.failure: MemfaasError | None = None

    async def on_request(self, message: Message) -> Message:
        self.asked.append(message)
        if self.failure is not None:
            raise self.failure
        assert isinstance(message, Reclaim | Lend)
        if message.donor == "login":
            raise UsageError("no donor login")
        if isinstance(message, Lend):
            return Done()
        return Reclaimed(
            donor=message.donor,
            asked=message.size,
            freed=message.size,
            seconds=0.1,
            in_time=self.in_time,
            steps=[FreedBytes(how="lost", size=1, seconds=0.1, what="shard 3 of store s")] if not self.in_time else [],
            held=self.held,
        )

    def on_notice(self, message: Message) -> None:
        raise AssertionError

    async def as_broker(self, stream: trio.SocketStream) -> None:
        hello = await rpc.admit(stream, SECRET)
        assert (hello.role, hello.name) == ("session", auth.OPERATOR)
        await self.as_agent(stream)

    async def as_agent(self, stream: trio.SocketStream) -> None:
        await rpc.Channel(stream, self, "the hook").run()


async def tcp(nursery: trio.Nursery, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> Address:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    return Address("127.0.0.1", listeners[0].socket.getsockname()[1])


async def unix(nursery: trio.Nursery, path: Path, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(8)
    nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])


@pytest.fixture(autouse=True)
def slurm_knows_the_job(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which jobs Slurm was asked for."""
    asked = []

    async def ask_slurm(job: str, nodes: list[str]) -> dict[str, int]:
        asked.append(job)
        return {node: NODES[node] for node in nodes}

    monkeypatch.setattr(jobs, "memory_of", ask_slurm)
    return asked


async def test_every_donor_of_a_job_is_asked_for_what_the_job_may_use(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    side = FakeSide()
    with caplog.at_level(logging.INFO):
        await reclaim.on_controller(await tcp(nursery, side.as_broker), OPERATOR, "17", list(NODES), 5)
    asked = {one.donor: one for one in side.asked if isinstance(one, Reclaim)}
    assert {name: one.size for name, one in asked.items()} == NODES
    assert {(one.holder, one.in_all) for one in asked.values()} == {("slurm job 17", True)}
    assert all(0 < one.deadline <= 5 for one in asked.values())
    assert "2 of its 3 nodes are donors; 300 MiB freed" in caplog.text


async def test_memory_that_is_late_or_lost_is_named(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    side = FakeSide()
    side.in_time = False
    await reclaim.on_controller(await tcp(nursery, side.as_broker), OPERATOR, "17", list(NODES), 5)
    assert "node1 freed only 100 MiB of 100 MiB in time" in caplog.text
    assert "node2 lost shard 3 of store s" in caplog.text


async def test_one_donor_that_fails_does_not_hide_the_others(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    side = FakeSide()
    side.failure = TransportError("it is not connected")
    await reclaim.on_controller(await tcp(nursery, side.as_broker), OPERATOR, "17", list(NODES), 5)
    assert caplog.text.count("it is not connected") == len(NODES)


async def test_an_absent_broker_is_an_error() -> None:
    with pytest.raises(BrokerUnavailable):
        await reclaim.on_controller(Address("127.0.0.1", 1), OPERATOR, "17", list(NODES), 5)


async def test_a_broker_that_lets_nobody_in_is_given_up(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "CONTACT_S", 0.05)

    async def silent(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    with pytest.raises(BrokerUnavailable, match="let nobody in"):
        await reclaim.on_controller(await tcp(nursery, silent), OPERATOR, "17", list(NODES), 5)


async def test_a_broker_that_does_not_answer_is_given_up_after_the_deadline(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reclaim, "_GRACE_S", 0.05)

    class Mute(FakeSide):
        async def on_request(self, message: Message) -> Message:
            await trio.sleep_forever()
            raise AssertionError

    await reclaim.on_controller(await tcp(nursery, Mute().as_broker), OPERATOR, "17", list(NODES), 0.05)
    assert caplog.text.count("did not answer Reclaim") == len(NODES)


async def test_a_broker_that_talks_nonsense_is_given_up(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def nonsense(stream: trio.SocketStream) -> None:
        await rpc.admit(stream, SECRET)
        await stream.send_all(rpc.frame(b"nonsense"))

    await reclaim.on_controller(await tcp(nursery, nonsense), OPERATOR, "17", list(NODES), 5)
    assert caplog.text.count("the connection to the broker") == len(NODES)


async def test_a_node_that_was_told_by_the_broker_asks_slurm_nothing(
    nursery: trio.Nursery, tmp_path: Path, slurm_knows_the_job: list[str]
) -> None:
    side = FakeSide(held=100 * MIB)
    await unix(nursery, tmp_path / "agent.sock", side.as_agent)
    await reclaim.on_node(tmp_path / "agent.sock", "node1", "17", list(NODES), 5)
    assert [one.size for one in side.asked if isinstance(one, Reclaim)] == [0]
    assert slurm_knows_the_job == []


async def test_a_node_that_the_broker_did_not_tell_frees_the_memory_itself(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = FakeSide()
    await unix(nursery, tmp_path / "agent.sock", side.as_agent)
    await reclaim.on_node(tmp_path / "agent.sock", "node1", "17", list(NODES), 5)
    assert [one.size for one in side.asked if isinstance(one, Reclaim)] == [0, NODES["node1"]]
    assert "had not heard of it from the broker" in caplog.text


async def test_both_epilogs_lend_again_what_the_job_had(nursery: trio.Nursery, tmp_path: Path) -> None:
    broker, agent = FakeSide(), FakeSide()
    await unix(nursery, tmp_path / "agent.sock", agent.as_agent)
    await reclaim.lend_on_controller(await tcp(nursery, broker.as_broker), OPERATOR, "17", NODES)
    await reclaim.lend_on_node(tmp_path / "agent.sock", "node1", "17")
    assert sorted(one.donor for one in broker.asked if isinstance(one, Lend)) == sorted(NODES)
    assert agent.asked == [Lend(donor="node1", holder="slurm job 17")]


async def test_a_dead_donors_socket_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="no donor answers"):
        await reclaim.on_node(tmp_path / "agent.sock", "node1", "17", list(NODES), 5)


# --- the program ----------------------------------------------------------------------------------


def run_hook(folder: Path, which: str, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    secret = folder / "secret"
    auth.create_secret(secret)
    options = [
        f"--secret-file={secret}",
        "--broker=127.0.0.1:1",
        "--deadline=1",
        "--limit=5",
        f"--runtime-dir={folder}",
    ]
    return subprocess.run(
        [sys.executable, "-P", "-m", "memfaas.server.slurm.hook", which, *options, *more],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        cwd=folder,
    )


ON_NODE1 = {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node1"}


@contextmanager
def donor_that_is_gone(home: Path) -> Iterator[None]:
    """It has left its socket, so a hook that comes to ask the donor says that none answers."""
    home.mkdir()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(home / local_agent.SOCKET))
        yield


@pytest.mark.parametrize("which", ["prolog-slurmctld", "prolog", "epilog", "epilog-slurmctld"])
def test_a_hook_succeeds_whatever_is_missing(tmp_path: Path, which: str) -> None:
    for variables in ({}, {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "a[", "SLURMD_NODENAME": "node1"}):
        assert run_hook(tmp_path, which, **variables).returncode == 0


def test_a_hook_says_why_it_could_do_nothing(tmp_path: Path) -> None:
    done = run_hook(tmp_path, "epilog-slurmctld", SLURM_JOB_ID="17", SLURM_JOB_NODELIST="node1")
    assert done.returncode == 0
    assert "job 17: epilog-slurmctld: no broker answers at 127.0.0.1:1" in done.stderr


def test_a_hook_keeps_its_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        broker = f"--broker=127.0.0.1:{silent.getsockname()[1]}"
        variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node1"}
        done = run_hook(tmp_path, "epilog-slurmctld", broker, "--limit=0.1", **variables)
    assert done.returncode == 0
    assert "gave up after its limit of 0.1 s" in done.stderr


def test_a_hook_keeps_its_limit_when_slurm_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\nexec sleep 1000\n")
    squeue.chmod(0o755)
    variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node1", "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    done = run_hook(tmp_path, "prolog-slurmctld", "--limit=0.1", **variables)
    assert done.returncode == 0
    assert "gave up after its limit of 0.1 s" in done.stderr


def test_a_syslogd_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    log = logging.Logger("hook")
    log.addHandler(handler := hook.Syslog(tmp_path / "log"))
    log.warning("nobody listens")
    with closing(handler), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
        syslogd.bind(str(tmp_path / "log"))
        syslogd.setblocking(False)

        def fill() -> None:
            for index in range(5000):
                log.warning("message %d", index)

        filling = threading.Thread(target=fill, daemon=True)
        filling.start()
        filling.join(60)
        assert not filling.is_alive()
        assert syslogd.recv(1000) == b"<28>message 0"
        received = 1
        with suppress(BlockingIOError):
            while syslogd.recv(1000):
                received += 1
        assert received < 5000  # it hung


def test_the_key_of_a_job_is_for_its_user_alone(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node1", "SLURM_JOB_UID": "0", "SLURM_JOB_GID": "0"}
    folder = tmp_path / "keys"
    for _ in range(2):  # Slurm may start a job again
        assert run_hook(tmp_path, "prolog", f"--keys={folder}", **variables).stderr == ""
    secret = auth.read_secret(tmp_path / "secret")
    assert auth.read_credentials(keys.path_of(folder, "17")) == auth.Credentials.of_tenant(secret, "root")
    run_hook(tmp_path, "epilog", f"--keys={folder}", **variables)
    assert list(folder.iterdir()) == []


def test_a_user_who_is_called_like_the_operator_is_not_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = pwd.struct_passwd((auth.OPERATOR, "x", os.getuid(), os.getgid(), "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    with pytest.raises(UsageError, match="'operator' is no tenant"):
        keys.write(tmp_path / "keys", "17", os.getuid(), os.getgid(), SECRET)
    assert list((tmp_path / "keys").iterdir()) == []


@pytest.mark.parametrize("user", [{}, {"SLURM_JOB_UID": "root", "SLURM_JOB_GID": "0"}, {"SLURM_JOB_UID": "0"}])
def test_a_job_whose_user_is_not_told_gets_its_memory_all_the_same(tmp_path: Path, user: dict[str, str]) -> None:
    with donor_that_is_gone(tmp_path / "node1"):
        done = run_hook(tmp_path, "prolog", f"--keys={tmp_path / 'keys'}", **ON_NODE1, **user)
    assert "job 17: no key file: Slurm did not say whose job it is" in done.stderr
    assert "no donor answers" in done.stderr


def test_a_key_file_that_cannot_be_removed_keeps_no_memory(tmp_path: Path) -> None:
    (tmp_path / "keys" / "job-17.key").mkdir(parents=True)
    with donor_that_is_gone(tmp_path / "node1"):
        done = run_hook(tmp_path, "epilog", f"--keys={tmp_path / 'keys'}", **ON_NODE1)
    assert "job 17: its key file stays" in done.stderr
    assert "no donor answers" in done.stderr
