"""A computing centre whose nodes lend memory: real Slurm, a real broker, a real donor for each node."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfaas import LocalCluster
from tests.slurm.center import Center, missing
from tests.slurm.site import DEADLINE, LENT_MIB, NODES, PLAIN_NODE, Site


def _prepare(folder: Path, cluster: LocalCluster) -> str:
    """Runs `memfaas slurm install`, and has each hook say when it ran, as at a site that has hooks of its own."""
    options = {
        "dir": folder / "hooks",
        "slurm-conf": folder / "slurm.conf",
        "keys": folder / "keys",
        "deadline": DEADLINE,
        "broker": cluster.address,
        "runtime-dir": cluster.folder / "run",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-P", "-m", "memfaas.cli", "slurm", "install", "--stores", *flags]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    (folder / "runs").touch()
    return "\n".join(_timed(folder, line) for line in lines) + "\n"


def _timed(folder: Path, line: str) -> str:
    setting, _, hook = line.partition("=")
    if not hook.startswith("/"):
        return line
    wrapper = folder / f"timed-{setting}"
    wrapper.write_text(
        "#!/bin/sh\n"
        "begin=$(date +%s.%N)\n"
        f"{hook} >> {folder}/{setting}.log 2>&1\n"
        "status=$?\n"
        f"echo {setting} $SLURM_JOB_ID $status $begin $(date +%s.%N) >> {folder}/runs\n"
        "exit $status\n"
    )
    wrapper.chmod(0o755)
    return f"{setting}={wrapper}"


@pytest.fixture(scope="module")
def shared_site(own_world: Path) -> Iterator[Site]:
    if reason := missing():
        pytest.skip(reason)
    with (
        LocalCluster(donors=len(NODES), memory=f"{LENT_MIB}MiB") as cluster,
        Center([*NODES, PLAIN_NODE], lambda folder: _prepare(folder, cluster)) as center,
    ):
        yield Site(center, cluster)


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """After each test, no job runs, no node is drained, no store is left, and all memory is lent again."""
    yield shared_site
    shared_site.wait_calm()
