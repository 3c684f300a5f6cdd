"""Reading what Slurm says of jobs and nodes."""

from __future__ import annotations

import msgspec
import pytest

from memfaas.errors import ProtocolError, TransportError
from memfaas.messages import DonorInfo, Memory, StatusReport, StoreInfo, StoreSpec
from memfaas.server.slurm import jobs, nodes, stores
from memfaas.units import GIB, MIB

_JOB = (
    "JobId=17 JobName=wrap UserId=root(0) JobState=CONFIGURING NodeList=node[1-3] BatchHost=node1 NumNodes=3 "
    "TRES=cpu=3,mem=3600M,node=3 JOB_GRES=(null) Nodes=node[1-2] CPU_IDs=0 Mem=1200 GRES= "
    "Nodes=node3 CPU_IDs=0-1 Mem=2G GRES= MinCPUsNode=1 MinMemoryNode=1200M Command=/bin/Nodes=x \n"
)
_NODES = (
    "NodeName=node1 Arch=x86_64 CPUAlloc=0 State=IDLE RealMemory=8000 AllocMem=0 FreeMem=22013 OS=Linux 6.1 #1 SMP @0 "
    'Comment=see ticket 5 a=b Extra={"rack": 1, "memfaas":{"lent_mib":1}} BootTime=2026-11-24T03:24:59\n'
    "NodeName=node2 State=MIXED+DRAIN RealMemory=8000 AllocMem=1200 Reason=Prolog error [root@2026]\n"
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,2],login", ["node08", "node09", "node10", "node2", "login"]),
        ("a,rack[1-2]n[01-02]x", ["a", "rack1n01x", "rack1n02x", "rack2n01x", "rack2n02x"]),
    ],
)
def test_a_list_of_hosts_is_expanded(text: str, names: list[str]) -> None:
    assert jobs.expand(text) == names


@pytest.mark.parametrize("text", ["node[", "node]1", "node[a-b]", "node[1-]", "node[]", "a[1]b]"])
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        jobs.expand(text)


def test_memory_of_a_job_is_read_for_each_node() -> None:
    assert jobs.parse_job("17", _JOB).memory == {"node1": 1200 * MIB, "node2": 1200 * MIB, "node3": 2 * GIB}


def test_the_first_task_of_an_array_is_told_from_the_others() -> None:
    others = _JOB.replace("JobId=17 ", "JobId=18 ArrayJobId=17 ").replace("node", "other")
    assert set(jobs.parse_job("17", others + _JOB).memory) == {"node1", "node2", "node3"}


def test_a_job_may_use_all_where_slurm_does_not_divide_memory() -> None:
    assert set(jobs.parse_job("17", _JOB.replace("Mem=1200", "Mem=0")).memory.values()) == {jobs.WHOLE_NODE, 2 * GIB}


@pytest.mark.parametrize("text", ["", "slurm_load_jobs error", "JobId=1 Nodes=a CPU_IDs=0 Mem=1", "JobId=17 Pending"])
def test_a_job_that_slurm_does_not_describe_is_an_error(text: str) -> None:
    with pytest.raises(ProtocolError):
        jobs.parse_job("17", text)


def test_a_holder_names_its_job() -> None:
    assert jobs.job_of(jobs.holder_of("17")) == "17"
    assert jobs.job_of("operator") is None


async def test_a_missing_program_of_slurm_is_named() -> None:
    with pytest.raises(TransportError, match="no-such-scontrol"):
        await jobs.run("no-such-scontrol")


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
    ours = '"memfaas":{"lent_mib":2048,"leased_mib":1024,"taken_back_mib":1024}'
    assert nodes.extra("", lends) == "{" + ours + "}"
    assert nodes.extra('{"rack": 1}', lends) == '{"rack":1,' + ours + "}"
    assert nodes.extra("free text", lends) == "free text"


def test_what_was_published_is_withdrawn_when_the_donor_is_gone() -> None:
    lends = donor({})
    assert nodes.comment(nodes.comment("", lends), None) == ""
    assert nodes.extra(nodes.extra("", lends), None) == ""
    assert nodes.extra(nodes.extra('{"rack": 1}', lends), None) == '{"rack":1}'


def test_the_pool_counts_what_is_free_and_what_jobs_have_of_it() -> None:
    def store(name: str) -> StoreInfo:
        spec = StoreSpec(
            store=b"", name=name, tenant="t", size=GIB, shards=1, shard_size=GIB, persistent=True,
            compression="none", on_reclaim="migrate",
        )  # fmt: skip
        return StoreInfo(spec=spec, sessions=0, lost_shards=[])

    away = msgspec.structs.replace(donor({}), connected=False)
    report = StatusReport(
        uptime=0, donors=[donor({}), away], leases=[], stores=[store("slurm-17"), store("data")], sessions=[]
    )
    # A little less: of what is free, a store's index takes some.
    assert 1.8 * GIB < stores.quantity(report) < 2 * GIB


def test_nothing_changes_in_slurm_when_nothing_changed() -> None:
    lends = donor({})
    comment, extra = nodes.comment("", lends), nodes.extra('{"rack": 1}', lends)
    assert (nodes.comment(comment, lends), nodes.extra(extra, lends)) == (comment, extra)
    assert nodes.extra('{"rack": 1}', None) == '{"rack": 1}'
