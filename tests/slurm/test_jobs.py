"""Reading what Slurm says of jobs and nodes."""

from __future__ import annotations

import msgspec
import pytest

from memfaas.errors import ProtocolError, TransportError
from memfaas.messages import DonorInfo, Memory, StatusReport, StoreInfo, StoreSpec
from memfaas.server.slurm import jobs, nodes, programs, stores
from memfaas.units import GIB, MIB

_NODES = (
    "NodeName=node1 Arch=x86_64 CPUAlloc=0 State=IDLE RealMemory=8000 AllocMem=0 FreeMem=22013 OS=Linux 6.1 #1 SMP @0 "
    'Comment=see ticket 5 a=b Extra={"rack": 1, "memfaas":{"lent_mib":1}} BootTime=2026-11-24T03:24:59\n'
    "NodeName=node2 State=MIXED+DRAIN RealMemory=8000 AllocMem=1200 Reason=Prolog error [root@2026]\n"
)


_SHOWN = (
    "17                  cpu=3,mem=300M,node=2,billing=3   \n"
    "18                  cpu=1,mem=1T,node=1,gres/gpu=2   \n"
    "19                  cpu=1,node=1,billing=1   \n"
    "20                  \n"
    "21                  cpu=1,mem=187.50G,node=1   \n"
)
_RECORD = (
    "JobId=17 JobName={name}\n   UserId=root(0) MCS_label=N/A\n   TRES=cpu=3,mem=300M,node=2\n   JOB_GRES=(null)\n"
    "     Nodes=node1 CPU_IDs=0-1 Mem=200 GRES=\n     Nodes=node2 CPU_IDs=0 Mem=100 GRES=\n"
    "   MinCPUsNode=1 MinMemoryCPU=100M\n   Command=/bin/true\n   Comment={comment} \n   Power=\n   \n\n"
)


def divided(name: str = "wrap", comment: str = "(null)", before: str = "") -> dict[str, int]:
    text = before + _RECORD.format(name=name, comment=comment)
    return {node: size // MIB for node, size in jobs.divide("17", ["node1", "node2"], 300 * MIB, text).items()}


def forged(*groups: str) -> str:
    """As a job's name or comment, with line breaks."""
    return "x" + "".join(f"\n     Nodes={group} GRES=" for group in groups)


def test_what_a_job_was_given_is_read() -> None:
    totals = {job: jobs.parse_total(job, _SHOWN) for job in ("17", "18", "21")}
    assert totals == {"17": 300 * MIB, "18": 1024 * GIB, "21": 375 * GIB // 2}


def test_a_job_has_no_total_where_slurm_does_not_divide_memory() -> None:
    assert jobs.parse_total("19", _SHOWN) is None


@pytest.mark.parametrize("job", ["1", "20", "2"])
def test_a_job_that_slurm_does_not_describe_is_an_error(job: str) -> None:
    with pytest.raises(ProtocolError):
        jobs.parse_total(job, _SHOWN)


def test_memory_is_read_for_each_node() -> None:
    assert divided() == {"node1": 200, "node2": 100}


@pytest.mark.parametrize(
    "text",
    [
        "x Nodes=node[1-2] CPU_IDs=0 Mem=8000 GRES=",
        forged("node[1-2] CPU_IDs=0 Mem=8000"),
        forged("node[1-2] CPU_IDs=0 Mem=1"),
        forged("node1 CPU_IDs=0 Mem=1"),
        forged("node1 CPU_IDs=0 Mem=100", "node2 CPU_IDs=0 Mem=100", "other CPU_IDs=0 Mem=100"),
        forged("node[1-999999999] CPU_IDs=0 Mem=1", "node[1-9][1-999999][1-99999] CPU_IDs=0 Mem=1"),
        "x\u2028     Nodes=node1 CPU_IDs=0 Mem=1 GRES=",
    ],
)
def test_what_a_user_writes_is_not_taken_for_slurms_word(text: str) -> None:
    assert divided(name=text, comment=text) == {"node1": 200, "node2": 100}


def test_a_user_who_writes_the_right_total_gets_no_more_than_without() -> None:
    assert divided(comment=forged("node1 CPU_IDs=0 Mem=10", "node2 CPU_IDs=0 Mem=290")) == {"node1": 10, "node2": 100}


def test_other_tasks_of_an_array_are_not_taken_for_the_first() -> None:
    other = _RECORD.format(name="wrap", comment="").replace("JobId=17 ", "JobId=18 ArrayJobId=17 ")
    other = other.replace("Mem=200", "Mem=150").replace("Mem=100", "Mem=150")
    assert divided(before=other) == {"node1": 200, "node2": 100}


def test_nodes_have_equal_shares_when_slurm_does_not_say_how_memory_is_divided() -> None:
    assert jobs.divide("17", ["a", "b", "c"], 10, "") == {"a": 4, "b": 4, "c": 4}


async def test_a_job_without_nodes_is_an_error() -> None:
    with pytest.raises(ProtocolError):
        await jobs.memory_of("17", [])


def test_a_holder_names_its_job() -> None:
    assert jobs.job_of(jobs.holder_of("17")) == "17"
    assert jobs.job_of("operator") is None


# --- Slurm's programs -----------------------------------------------------------------------------


async def test_a_missing_program_of_slurm_is_named() -> None:
    with pytest.raises(TransportError, match="no-such-scontrol"):
        await programs.run("no-such-scontrol")


async def test_slurms_programs_see_nothing_of_what_others_chose_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SQUEUE_USERS", "SQUEUE_FORMAT2", "SCONTROL_ALL"):
        monkeypatch.setenv(name, "x")
    seen = await programs.run("env")
    assert [line for line in seen.split("\n") if line.startswith("S") and line.endswith("=x")] == ["SLURM_CONF=x"]


# --- nodes ----------------------------------------------------------------------------------------


def test_nodes_are_read() -> None:
    first, second = nodes.parse_nodes(_NODES)
    assert (first.name, first.idle, first.memory, first.allocated) == ("node1", True, 8000 * MIB, 0)
    assert (second.name, second.idle, second.allocated) == ("node2", False, 1200 * MIB)
    assert first.extra == '{"rack": 1, "memfaas":{"lent_mib":1}}'


def donor(reclaimed: dict[str, int]) -> DonorInfo:
    memory = Memory(offered=2 * GIB, leased=GIB, populated=0, available=8 * GIB, headroom=0)
    return DonorInfo(
        donor="node1", node="", host="", connected=True, memory=memory, leases=1, fabrics=[], reclaimed=reclaimed
    )


def test_what_is_lent_is_published_beside_what_others_wrote() -> None:
    lends = donor({"slurm job 1": GIB})
    assert nodes.comment("", lends) == "memfaas lends 2 GiB, 1 GiB of it leased"
    assert nodes.comment("see ticket 5", lends) == "see ticket 5"
    ours = '"memfaas":{"lent_mib":2048,"leased_mib":1024,"reclaimed_mib":1024}'
    assert nodes.extra("", lends) == "{" + ours + "}"
    assert nodes.extra('{"rack": 1}', lends) == '{"rack":1,' + ours + "}"
    assert nodes.extra("free text", lends) == "free text"


def test_what_was_published_is_withdrawn_when_the_donor_is_gone() -> None:
    lends = donor({})
    assert nodes.comment(nodes.comment("", lends), None) == ""
    assert nodes.extra(nodes.extra("", lends), None) == ""
    assert nodes.extra(nodes.extra('{"rack": 1}', lends), None) == '{"rack":1}'


def test_the_pool_counts_what_is_free_and_what_jobs_have_of_it() -> None:
    def store(name: str, tenant: str) -> StoreInfo:
        spec = StoreSpec(
            store=b"", name=name, tenant=tenant, size=GIB, shards=1, shard_size=GIB, persistent=True,
            compression="none", on_reclaim="migrate",
        )  # fmt: skip
        return StoreInfo(spec=spec, sessions=0, lost_shards=[])

    away = msgspec.structs.replace(donor({}), connected=False)
    named = [
        store(*of) for of in (("slurm-17", "alice"), ("slurm-17", "mallory"), ("slurm-x", "alice"), ("data", "bob"))
    ]
    report = StatusReport(uptime=0, donors=[donor({}), away], leases=[], stores=named, sessions=[])
    given = {("alice", "slurm-17"): GIB // 2, ("alice", "slurm-18"): GIB}
    # A little less: of what is free, a store's index takes some.
    assert 0.8 * GIB < stores.quantity(report, {}) < GIB
    assert stores.quantity(report, given) == stores.quantity(report, {}) + GIB // 2


def test_nothing_changes_in_slurm_when_nothing_changed() -> None:
    lends = donor({})
    comment, extra = nodes.comment("", lends), nodes.extra('{"rack": 1}', lends)
    assert (nodes.comment(comment, lends), nodes.extra(extra, lends)) == (comment, extra)
    assert nodes.extra('{"rack": 1}', None) == '{"rack": 1}'
