"""Real jobs of a real Slurm on nodes that lend memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memfaas import auth
from memfaas.errors import LeaseLost
from memfaas.units import MIB
from tests.slurm.center import NODE_MIB, USER, wait_for
from tests.slurm.site import NODES, PLAIN_NODE, Reader, Site, fill, value

pytestmark = pytest.mark.slow

_LONG_S = 60.0
_DATA = 150 * MIB
"""Spread over the three donors; what one has of it fits on the two others."""


def test_a_job_finds_its_memory_free_and_no_value_is_lost(site: Site) -> None:
    with site.session() as opened:
        store = opened.store("data", size=180 * MIB)
        count = fill(store, _DATA)
        assert site.in_kernel(0) >= _DATA // 4
        with Reader(store, count) as reader:
            seen = site.seen_by_job(0, f"--mem={NODE_MIB}")
            done = reader.gets
            wait_for(lambda: reader.gets > done + count, "all was read again", _LONG_S)
        assert seen == 0, site.explain()
        assert reader.wrong == []
    assert {run.status for run in site.hooks().values()} == {0}
    assert "1 of its 1 nodes are donors" in site.said("PrologSlurmctld")
    assert "has set" in site.said("Prolog")


def test_a_small_job_leaves_the_rest_of_the_lent_memory(site: Site) -> None:
    site.seen_by_job(1, "--mem=100")
    assert {run.status for run in site.hooks().values()} == {0}
    assert "100 MiB freed" in site.said("PrologSlurmctld")


def test_jobs_on_the_same_node_add_up(site: Site) -> None:
    jobs = [
        _submit(
            site,
            "--nodelist=donor0",
            f"--mem={mib}",
            "--wrap",
            f"while [ ! -e {site.center.folder}/go-on ]; do sleep 0.1; done",
        )
        for mib in (100, 50)
    ]
    taken = {f"slurm job {jobs[0]}": 100 * MIB, f"slurm job {jobs[1]}": 50 * MIB}
    wait_for(lambda: site.donors()["donor0"].reclaimed == taken, "both have their memory", _LONG_S, site.explain)
    (site.center.folder / "go-on").touch()
    assert [site.center.wait_ended(job) for job in jobs] == ["COMPLETED"] * 2


def test_all_nodes_of_a_job_give_their_memory_back(site: Site) -> None:
    job = _submit(site, "-N3", f"--mem={NODE_MIB}", "--wrap", "sleep 2")
    wait_for(lambda: site.center.job(job)["JobState"] == "RUNNING", "the job runs", _LONG_S, site.explain)
    assert {name: one.memory.offered for name, one in site.donors().items()} == dict.fromkeys(NODES, 0)
    assert site.center.wait_ended(job) == "COMPLETED"


def _forged(*groups: str) -> str:
    """Lines as Slurm shows them of a job."""
    return "x" + "".join(f"\n     Nodes={group} GRES=" for group in groups)


_FORGED = {
    "lines": _forged("donor[0-2] CPU_IDs=0 Mem=1", "donor[0-999999999] CPU_IDs=0 Mem=8000"),
    "one line": "x Nodes=donor[0-2] CPU_IDs=0 Mem=8000",
    "line separator": "x\u2028     Nodes=donor0 CPU_IDs=0 Mem=1 GRES=",
}


@pytest.mark.parametrize("how", _FORGED)
def test_what_a_user_calls_a_job_does_not_tell_how_much_memory_it_takes(site: Site, how: str) -> None:
    """Not of the job's nodes, not of others."""
    go_on = site.center.folder / f"go-on after {how}"
    wait = f"while [ ! -e '{go_on}' ]; do sleep 0.1; done"
    options = ("--job-name", _FORGED[how], "--comment", _FORGED[how], "--wrap", wait)
    elsewhere = _submit(site, f"--nodelist={PLAIN_NODE}", "--mem=100", *options, user=USER)
    one = _submit(site, "--nodelist=donor2", "--ntasks=1", "--mem=70", *options, user=USER)
    # Two processors on one node, and one on the other.
    two = _submit(site, "--nodelist=donor[0-1]", "--ntasks=3", "--mem-per-cpu=50", *options, user=USER)
    jobs = [elsewhere, one, two]
    wait_for(lambda: _states(site, jobs) == ["RUNNING"] * 3, "all run", _LONG_S, site.explain)
    taken = {name: info.reclaimed for name, info in site.donors().items()}
    assert taken.pop("donor2") == {f"slurm job {one}": 70 * MIB}, site.explain()
    assert sorted(taken.values(), key=str) == [{f"slurm job {two}": size * MIB} for size in (100, 50)], site.explain()
    go_on.touch()
    assert [site.center.wait_ended(job) for job in jobs] == ["COMPLETED"] * 3


def _states(site: Site, jobs: list[str]) -> list[str]:
    return [site.center.job(job)["JobState"] for job in jobs]


@contextmanager
def broker_away(site: Site, how: str) -> Iterator[None]:
    if how == "killed":
        site.cluster.kill_broker()
        try:
            yield
        finally:
            site.cluster.restart_broker()
    else:
        os.kill(site.cluster.broker_pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(site.cluster.broker_pid, signal.SIGCONT)


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_without_a_broker_the_node_frees_the_memory_itself(site: Site, how: str) -> None:
    """Nobody can say where the values could go: the job wins, and they are lost by name."""
    with site.session() as opened:
        store = opened.store(f"without-{how}", size=180 * MIB)
        count = fill(store, _DATA)
        assert site.in_kernel(2) >= _DATA // 4
        with broker_away(site, how):
            assert site.seen_by_job(2, f"--mem={NODE_MIB}") == 0, site.explain()
            runs = site.hooks()
            site.center.wait_idle()
        assert {run.status for run in runs.values()} == {0}
        assert "had not heard of it from the broker" in site.said("Prolog")
        wait_for(lambda: any(one.lost_shards for one in opened.stores()), "the loss is known", _LONG_S)
        kept = lost = 0
        for one in range(count):
            try:
                assert store.get(str(one)) == value(one)
                kept += 1
            except LeaseLost:
                lost += 1
            if kept and lost:
                break
        assert kept > 0
        assert lost > 0


def test_a_donor_that_hangs_holds_up_no_job(site: Site) -> None:
    pid = site.cluster.donor_pid(1)
    os.kill(pid, signal.SIGSTOP)
    try:
        site.seen_by_job(1, f"--mem={NODE_MIB}")
        runs = site.hooks()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert {run.status for run in runs.values()} == {0}
    site.center.wait_idle()


# --- stores for jobs ------------------------------------------------------------------------------


def _submit(site: Site, *options: str, user: int | None = None) -> str:
    return site.center.run("sbatch", "--parsable", "--output=/dev/null", *options, user=user).strip()


def test_a_job_that_asks_for_a_store_finds_it_and_it_goes_with_the_job(site: Site) -> None:
    folder = site.center.folder / "for-jobs"
    folder.mkdir()
    folder.chmod(0o777)
    script = folder / "job.sh"
    script.write_text(
        "#!/bin/sh\n"
        "#BB_LUA pool=memfaas capacity=50MiB\n"
        f"echo $MEMFAAS_BROKER $MEMFAAS_STORE $(cat $MEMFAAS_SECRET_FILE) > {folder}/draft\n"
        f"mv {folder}/draft {folder}/found\n"
        f"while [ ! -e {folder}/go-on ]; do sleep 0.1; done\n"
    )
    job = _submit(site, "--mem=10", str(script), user=USER)
    found = folder / "found"
    wait_for(found.exists, "the job has begun", _LONG_S, site.explain)
    broker, name, key = found.read_text().split()
    (folder / "copy").write_text(key)
    (folder / "copy").chmod(0o600)
    address = f"memfaas://{broker}?secret={folder}/copy"
    command = [sys.executable, "-P", "-m", "memfaas.cli"]
    environment = {"PATH": os.environ["PATH"], "MEMFAAS_BROKER": address}
    subprocess.run([*command, "put", "--store", name, "a"], input=b"value", env=environment, check=True)
    with site.session(auth.OPERATOR) as operator:
        (info,) = operator.status().stores
        assert (info.spec.name, info.spec.tenant) == (f"slurm-{job}", "nobody")
        assert info.spec.size >= 50 * MIB
        (folder / "go-on").touch()
        assert site.center.wait_ended(job) == "COMPLETED"
        wait_for(lambda: not operator.status().stores, "the store is deleted", _LONG_S, site.explain)
    wait_for(lambda: not list((site.center.folder / "keys").iterdir()), "the key is removed", _LONG_S, site.explain)


def test_a_job_whose_store_cannot_be_made_does_not_start_and_is_told_why(site: Site) -> None:
    script = site.center.folder / "no-store.sh"
    script.write_text("#!/bin/sh\n#BB_LUA pool=memfaas capacity=50MiB\n")
    before = _submit(site, "--wrap", "true", user=USER)
    site.center.wait_ended(before)
    name = f"slurm-{int(before) + 1}"
    with site.session("nobody") as opened:
        opened.store(name, size=20 * MIB)
        job = _submit(site, "--mem=10", str(script), user=USER)
        assert name == f"slurm-{job}"
        shown = ["scontrol", "-o", "show", "job", job]
        wait_for(lambda: "a smaller store" in site.center.run(*shown), "the reason is told", _LONG_S, site.explain)
        assert site.center.job(job)["JobState"] == "PENDING"
        site.center.run("scancel", job)
        assert site.center.wait_ended(job) == "CANCELLED"


def test_a_store_that_could_not_be_deleted_is_deleted_when_the_broker_is_back(site: Site) -> None:
    stores = [sys.executable, "-P", "-m", "memfaas.server.slurm.stores", f"--broker={_place(site)}"]
    stores += [f"--secret-file={site.cluster.folder}/secret", f"--state={site.center.folder}/hooks/stores"]
    subprocess.run([*stores, "setup", "999999", str(USER), str(20 * MIB)], check=True)
    with broker_away(site, "killed"):
        failed = subprocess.run([*stores, "teardown", "999999"], stdout=subprocess.PIPE, text=True)
        assert failed.returncode == 1
        assert "no broker answers" in failed.stdout
    with site.session(auth.OPERATOR) as operator:
        wait_for(lambda: [one.spec.name for one in operator.status().stores] == ["slurm-999999"], "it is back", _LONG_S)
        subprocess.run([*stores, "pools", str(site.center.folder / "hooks/stores/pools.json")], check=True)
        assert operator.status().stores == []


def test_slurm_is_told_of_no_more_than_there_is(site: Site) -> None:
    """Whoever calls stores of their own as those of jobs are called."""
    stores = [sys.executable, "-P", "-m", "memfaas.server.slurm.stores", f"--broker={_place(site)}"]
    stores += [f"--secret-file={site.cluster.folder}/secret", f"--state={site.center.folder}/hooks/stores"]
    file = site.center.folder / "pools.json"
    subprocess.run([*stores, "setup", "999998", str(USER), str(32 * MIB)], check=True)
    try:
        with site.session("mallory") as opened:
            for name in ("slurm-999998", "slurm-x"):
                opened.store(name, size=60 * MIB)
            subprocess.run([*stores, "pools", str(file)], check=True)
            free = sum(one.memory.offered - one.memory.leased for one in site.donors().values())
    finally:
        subprocess.run([*stores, "teardown", "999998"], check=True)
    (pool,) = json.loads(file.read_text())["pools"]
    assert 0.8 * free < pool["quantity"] * pool["granularity"] - 32 * MIB <= free


def _place(site: Site) -> str:
    return site.cluster.address.removeprefix("memfaas://").partition("?")[0]


@pytest.mark.parametrize("asked", ["capacity=1GiB", "pool=fast capacity=1GiB"])
def test_a_request_that_names_no_pool_of_ours_is_refused_at_once(site: Site, asked: str) -> None:
    script = site.center.folder / "other.sh"
    script.write_text(f"#!/bin/sh\n#BB_LUA {asked}\n")
    with pytest.raises(AssertionError, match=r"sbatch: error: .*(pool=memfaas|Burst Buffer request invalid)"):
        _submit(site, str(script), user=USER)


# --- memfaas slurm scan ---------------------------------------------------------------------------


def _scan(site: Site, *options: str, **variables: str) -> str:
    environment = {**site.center.environment(), "MEMFAAS_BROKER": site.cluster.address, **variables}
    command = [sys.executable, "-P", "-m", "memfaas.cli", "slurm", "scan", *options]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_what_nodes_lend_is_shown_in_slurm(site: Site) -> None:
    nodes = json.loads(_scan(site, "--json", "--publish"))
    assert [(one["node"], one["lends"], one["could_lend"]) for one in nodes] == [
        *((name, 256 * MIB, False) for name in NODES),
        (PLAIN_NODE, None, True),
    ]
    shown = site.center.run("scontrol", "-o", "show", "node", "donor0")
    assert "Comment=memfaas lends 256 MiB, 0 B of it leased" in shown
    assert 'Extra={"memfaas":{"lent_mib":256,' in shown


def test_idle_nodes_without_a_donor_are_offered(site: Site) -> None:
    started = site.center.folder / "started"
    table = _scan(site, "--start", f"sh -c 'echo {{}} >> {started}'")
    assert [line.split()[0] for line in table.splitlines() if "could lend" in line] == [PLAIN_NODE]
    assert started.read_text() == f"{PLAIN_NODE}\n"


def test_memory_of_jobs_that_slurm_no_longer_knows_is_lent_again(site: Site) -> None:
    """Their epilogs may have found neither the broker nor the donor."""
    with site.session(auth.OPERATOR) as operator:
        operator.reclaim("donor0", "10MiB", holder="slurm job 999999")
    reclaimed = {"slurm job 999999": 10 * MIB}
    # The broker hears of it a moment later than we do.
    wait_for(lambda: site.donors()["donor0"].reclaimed == reclaimed, "it is set aside", _LONG_S, site.explain)
    _scan(site)
    assert site.donors()["donor0"].reclaimed == {}


def test_a_scan_leaves_its_memory_to_a_job_that_runs(site: Site) -> None:
    """Also when whoever scans has chosen to see no such job."""
    go_on = site.center.folder / "go-on after the scan"
    wait = f"while [ ! -e '{go_on}' ]; do sleep 0.1; done"
    job = _submit(site, "--nodelist=donor1", "--mem=50", "--wrap", wait, user=USER)
    wait_for(lambda: _states(site, [job]) == ["RUNNING"], "it runs", _LONG_S, site.explain)
    _scan(site, SQUEUE_USERS="root", SQUEUE_STATES="PENDING", SQUEUE_FORMAT="%j", SQUEUE_FORMAT2="name")
    assert site.donors()["donor1"].reclaimed == {f"slurm job {job}": 50 * MIB}
    go_on.touch()
    assert site.center.wait_ended(job) == "COMPLETED"
