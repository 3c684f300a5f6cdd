"""Whose memory a scan lends again: never that of a job that runs. Nothing here needs Slurm."""

from __future__ import annotations

import os
import secrets

import pytest
import trio

from memfaas import auth, rpc
from memfaas.addresses import Address
from memfaas.errors import TransportError
from memfaas.messages import DonorInfo, Memory, Message, Status, StatusReport
from memfaas.server.slurm import jobs, nodes, programs
from memfaas.units import GIB

SECRET = secrets.token_bytes(32)
_NODES = "NodeName=node1 State=MIXED RealMemory=8000 AllocMem=100\n"
_UNKNOWN = "squeue --jobs=17: slurm_load_jobs error: Invalid job id specified"


class FakeSlurm:
    """Answers as Slurm's programs do. `shown`: by job, what squeue prints of it if it is asked for all jobs."""

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}
        self.unlisted: set[str] = set()
        self.failure = ""
        self.private = "none"
        self.user = f"slurm({os.geteuid() + 1})"

    async def run(self, *command: str) -> str:
        match command:
            case ("scontrol", "show", "config"):
                return (
                    f"JobCredentialPrivateKey = x\nPrivateData             = {self.private}\nSlurmUser = {self.user}\n"
                )
            case ("scontrol", *_):
                return _NODES
            case ("squeue", *words):
                return self._squeue(words)
        raise AssertionError(command)

    def _squeue(self, words: list[str]) -> str:
        seen = self.shown if "--all" in words else {}
        (job,) = [word.partition("=")[2] for word in words if word.startswith("--jobs=")] or [""]
        if not job:
            return "".join(f"{one}\n" for one, shown in seen.items() if "RUNNING" in shown and one not in self.unlisted)
        if self.failure:
            raise TransportError(self.failure)
        if job not in seen:
            raise TransportError(_UNKNOWN)
        return seen[job]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(programs, "run", fake.run)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    return fake


@pytest.mark.parametrize(
    ("shown", "ended"),
    [
        ("17                  RUNNING             \n", False),
        ("17                  PENDING             \n", False),  # it may start again
        ("17                  COMPLETING          \n", False),
        ("17                  COMPLETED           \n", True),
        ("17                  OUT_OF_MEMORY       \n", True),
        ("18                  COMPLETED           \n17                  RUNNING             \n", False),
        ("18                  RUNNING             \n17                  FAILED              \n", True),
        ("18                  COMPLETED           \n", False),
        ("", False),
    ],
)
async def test_a_job_has_ended_when_slurm_says_so(slurm: FakeSlurm, shown: str, ended: bool) -> None:
    slurm.shown["17"] = shown
    assert await jobs.has_ended("17") == ended


async def test_a_job_that_slurm_does_not_know_has_ended(slurm: FakeSlurm) -> None:
    assert await jobs.has_ended("17")


async def test_a_job_that_slurm_may_hide_from_us_has_not_ended(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.private = "accounts,jobs"
    assert not await jobs.has_ended("17")
    assert "does not show other people's jobs" in caplog.text
    slurm.user = "slurm(1234)"
    assert await jobs.has_ended("17")


async def test_no_answer_is_not_taken_for_the_end_of_a_job(slurm: FakeSlurm) -> None:
    slurm.failure = "squeue: Unable to contact slurm controller (connect failure)"
    with pytest.raises(TransportError):
        await jobs.has_ended("17")


class FakeBroker:
    async def on_request(self, message: Message) -> Message:
        assert isinstance(message, Status)
        memory = Memory(offered=GIB, leased=0, populated=0, available=8 * GIB, headroom=0)
        donor = DonorInfo(
            donor="node1", node="", host="", connected=True, memory=memory, leases=1, fabrics=[],
            reclaimed={**{f"slurm job {job}": GIB for job in (17, 18, 19, 20)}, "operator": GIB},
        )  # fmt: skip
        return StatusReport(uptime=0, donors=[donor], leases=[], stores=[], sessions=[])

    def on_notice(self, message: Message) -> None:
        raise AssertionError

    async def serve(self, stream: trio.SocketStream) -> None:
        await rpc.admit(stream, SECRET)
        await rpc.Channel(stream, self, "the scan").run()


async def test_only_what_was_taken_back_for_jobs_that_have_ended_is_lent_again(
    nursery: trio.Nursery, slurm: FakeSlurm
) -> None:
    slurm.shown = {"17": "17 RUNNING\n", "18": "18 COMPLETED\n", "20": "20 RUNNING\n"}
    slurm.unlisted = {"20"}  # a list may not have all, whatever the reason
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, FakeBroker().serve, listeners)
    address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
    found = await nodes.scan(address, auth.Credentials.of_tenant(SECRET, auth.OPERATOR))
    assert found.ended == [("node1", "slurm job 18"), ("node1", "slurm job 19")]
