"""An operation may be killed at any instruction: see crash.c, which tries them all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from memfaas.testing import fsck
from memfaas.testing.compiling import compile_with_core

NOT_TRACED = 3
SCENARIOS = (
    "put-new", "put-replacing", "put-large-replacing-small", "put-small-replacing-large", "put-full",
    "put-harvesting", "delete-small", "delete-large", "delete-absent", "get-large", "function-put-new",
    "function-put-replacing", "function-put-large", "function-delete-small", "function-delete-large",
    "function-reaping",
)  # fmt: skip


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("crash") / "crash"
    source = Path(__file__).with_name("crash.c")
    # -O3 as in the extension: the same order of the stores.
    compile_with_core(source, program, ["-O3", f"-I{Path(fsck.__file__).parent}"], without=["shard.c"])
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_every_scenario_is_run(crash: Path) -> None:
    assert tuple(run(crash).stdout.split()) == SCENARIOS


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whenever_it_is_killed_the_shard_is_right(crash: Path, scenario: str) -> None:
    done = run(crash, scenario)
    if done.returncode == NOT_TRACED:
        pytest.skip("this system lets no process trace its child")
    assert done.returncode == 0, done.stdout
    states, _, _, steps, _ = done.stdout.split()
    assert int(states) > 2
    assert int(steps) > 500
