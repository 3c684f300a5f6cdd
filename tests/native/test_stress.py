"""The native core under the sanitizers, and without, with everything at once: see stress.c."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from memfaas.testing import fsck
from memfaas.testing.compiling import compile_with_core

BUILDS = {
    "plain": ["-O3"],
    "thread": ["-O2", "-fsanitize=thread"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
}
NO_ROOM = "unexpected memory mapping"
"""What gcc's thread sanitizer says when the kernel spreads addresses more than it knows of."""
LIMIT_S = 110

Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("stress")

    @cache
    def build(name: str) -> Path:
        source = Path(__file__).with_name("stress.c")
        flags = [*BUILDS[name], f"-I{Path(fsck.__file__).parent}"]
        compile_with_core(source, folder / name, flags, without=["shard.c"])
        return folder / name

    return build


def run(program: Path, mode: str, seconds: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), mode, str(seconds)]
    for before in ([], ["setarch", "-R"]):  # the second time without random addresses
        done = subprocess.run(
            [*before, *command], capture_output=True, text=True, errors="replace", timeout=LIMIT_S, env=environment
        )
        if NO_ROOM not in done.stderr or not shutil.which("setarch"):
            break
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "seconds"),
    [
        ("plain", "contended", 3),
        ("plain", "threads", 3),
        ("plain", "processes", 8),
        ("plain", "move", 3),
        ("plain", "punch", 3),
        ("address", "threads", 4),
        ("address", "move", 4),
        ("address", "punch", 4),
        ("address", "garbled", 5),
        ("address", "processes", 5),
        ("address", "hostile", 8),
        ("thread", "contended", 3),
        ("thread", "threads", 8),
        ("thread", "move", 6),
        ("thread", "punch", 6),
    ],
)
def test_nothing_is_found(build: Build, name: str, mode: str, seconds: int) -> None:
    done = run(build(name), mode, seconds)
    if name == "thread" and NO_ROOM in done.stderr:
        pytest.skip("gcc's thread sanitizer does not know this kernel's addresses, and they cannot be fixed here")
    assert done.stderr == ""
    assert done.returncode == 0
    operations, _, deaths, _, resumed, _, copies, _, cuts, _ = done.stdout.split()
    assert int(operations) > (500 if mode != "processes" else -1)
    assert int(deaths) > 20 or mode in ("contended", "garbled")
    assert int(resumed) > 20 or mode in ("contended", "processes", "garbled")
    assert int(copies) > 2 or mode not in ("move", "punch", "garbled")
    assert int(cuts) > 20 or mode != "punch"
