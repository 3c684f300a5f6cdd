"""What all tests share: a world of their own, and the check that nothing of it is left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_MARK = "MEMFAAS_TESTED_BY"
"""Environment variable by which a process is known to descend from this run, whoever its parent is now."""
_GRACE_S = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what is plainly broken shows at once."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def processes_marked(mark: str) -> dict[int, str]:
    """Other processes that inherited the mark: by id, what each is and which test started it."""
    found = {}
    needle = f"{_MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # ended meanwhile, or another user's
            continue
        if needle in variables:
            test = next((v for v in variables if v.startswith(b"PYTEST_CURRENT_TEST=")), b"=before the tests")
            found[int(folder.name)] = f"{command or folder.name}, started by {test.partition(b'=')[2].decode()}"
    return found


def shared_memory_files() -> set[Path]:
    return set(Path("/dev/shm").glob("*memfaas*"))


@pytest.fixture(name="processes_marked")
def processes_marked_fixture() -> Callable[[str], dict[int, str]]:
    return processes_marked


@pytest.fixture(scope="session", autouse=True)
def run_mark() -> str:
    return secrets.token_hex(8)


@pytest.fixture(scope="session", autouse=True)
def own_world(run_mark: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Home, temporary and runtime folders of this run alone, and none of the caller's settings.

    When the last test has ended, no process and no file of ours may be left.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folders stay where people look for them
    world = Path(tempfile.mkdtemp(prefix="mf-", dir="/tmp"))  # short: sockets go below it
    shm_before = shared_memory_files()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MEMFAAS_")]:
            patch.delenv(name)
        patch.setenv(_MARK, run_mark)
        for name, variable in (("home", "HOME"), ("tmp", "TMPDIR"), ("run", "XDG_RUNTIME_DIR")):
            (world / name).mkdir(mode=0o700)
            patch.setenv(variable, str(world / name))
        patch.setattr(tempfile, "tempdir", str(world / "tmp"))
        yield world

    deadline = time.monotonic() + _GRACE_S
    while (processes := processes_marked(run_mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    files = [*(world / "run").rglob("*"), *(world / "tmp").glob("*memfaas*"), *(shared_memory_files() - shm_before)]
    left = [f"process {pid}: {what}" for pid, what in processes.items()] + [f"file {path}" for path in sorted(files)]
    shutil.rmtree(world)
    if left:
        pytest.fail("the tests left behind:\n" + "\n".join(left), pytrace=False)
