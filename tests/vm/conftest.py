"""Runs the tests that are marked `vm` inside a virtual machine, and shows their results here by name.

All that ask for the same machine and are selected run in one boot of it, when the first of them is
due. Inside, pytest runs them as ordinary tests, with this file writing down what became of each.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from memfaas.bench.verbs import built
from memfaas.client import local
from memfaas.client.local import LocalCluster
from memfaas.testing import fsck
from memfaas.units import MIB
from tests.e2e import moves, scene
from tests.vm import machine

_INSIDE = "TESTS_ARE_IN_VM"
_REPORTS = "reports"
_FSCK = "fsck.so"
_BOOT_S = 300.0
_TEST_S = 200.0
"""For each test, on a machine that is busy with other things too."""
_OPERATION_S = 60.0
"""For operations of sessions that say nothing else: all is slower when it is emulated."""
_LAST_LINES = 60


@dataclass(frozen=True)
class _Machine:
    """What a test asks for, by `@pytest.mark.vm(...)`."""

    cpus: int = 1
    memory: str = "1G"


@dataclass
class _Result:
    """Of one test inside."""

    complete: bool = False
    skipped: str | None = None
    failures: list[str] = field(default_factory=list)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm(cpus=1, memory='1G'): runs in a virtual machine, with a kernel of its own")


# --- on the host -------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)  # other plugins take all tests for functions, and see to that these are good ones
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _INSIDE not in os.environ:
        runs: dict[_Machine, _Run] = {}
        items[:] = [
            _Inside.from_parent(item.parent, name=item.name, original=item, runs=runs)
            if item.parent is not None and item.get_closest_marker("vm")
            else item
            for item in items
        ]


class _FailedInside(Exception):
    pass


class _Inside(pytest.Item):
    """A test that runs in the machine. Its fixtures are there, not here."""

    def __init__(self, original: pytest.Item, runs: dict[_Machine, _Run], **of_all: Any) -> None:
        super().__init__(**of_all)
        self._original = original
        self._runs = runs
        self.own_markers.extend(original.own_markers)
        marker = self.get_closest_marker("vm")
        assert marker is not None
        self.machine = _Machine(**marker.kwargs)
        self.add_marker(pytest.mark.timeout(0))  # the machine has a limit, for all its tests

    def runtest(self) -> None:
        if reason := machine.missing():
            pytest.skip(reason)
        if self.machine not in self._runs:
            ours = [one for one in self.session.items if isinstance(one, _Inside) and one.machine == self.machine]
            tests = [one.nodeid for one in ours]
            faulthandler.cancel_dump_traceback_later()  # nor need pytest say where it waits meanwhile
            self._runs[self.machine] = _Run(self.config.rootpath, self.machine, tests)
        result = self._runs[self.machine].result(self.nodeid)
        if result.failures:
            raise _FailedInside("\n".join(result.failures))
        if result.skipped is not None:
            pytest.skip(result.skipped)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, _FailedInside):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self._original.reportinfo()


class _Run:
    """Boots the machine and runs these tests in it."""

    def __init__(self, root: Path, wanted: _Machine, tests: list[str]) -> None:
        self._results: dict[str, _Result] = {name: _Result() for name in tests}
        settings = ["-c", str(Path(__file__).with_name("inside.ini")), f"--rootdir={root}"]
        with tempfile.TemporaryDirectory(prefix="mf-vm-", dir="/tmp") as name:
            fsck.build(Path(name, _FSCK))  # a compiler takes a minute inside
            built.build(Path(name))
            self._outcome = machine.run(
                [sys.executable, "-m", "pytest", *settings, *tests],
                root,
                Path(name),
                environment={
                    _INSIDE: "1",
                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                    "MEMFAAS_TIMEOUT": f"{_OPERATION_S:g}",
                    fsck.BUILT: str(machine.SHARED / _FSCK),
                    built.BUILT: str(machine.SHARED),
                },
                cpus=wanted.cpus,
                memory=wanted.memory,
                timeout_s=_BOOT_S + _TEST_S * len(tests),
            )
            self._read(Path(name, _REPORTS))
        self._blame_all = self._outcome.status != 0 and not any(one.failures for one in self._results.values())

    def _read(self, reports: Path) -> None:
        for line in reports.read_text().splitlines() if reports.exists() else ():
            report = json.loads(line)
            result = self._results[report["test"]]
            result.complete = report["when"] == "teardown"
            if report["outcome"] == "failed":
                result.failures.append(report["text"])
            elif report["outcome"] == "skipped":
                result.skipped = report["text"]

    def result(self, test: str) -> _Result:
        """Who has no result in the end, or ended well in a run that did not, has the whole run as its failure."""
        result = self._results[test]
        if not result.failures and (self._blame_all or not result.complete):
            last = "\n".join(self._outcome.console.splitlines()[-_LAST_LINES:])
            status = self._outcome.status
            how = "the virtual machine did not come to its end" if status is None else f"pytest ended with {status}"
            result.failures.append(f"{how}; its console at last:\n{last}")
        return result


# --- inside ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """For tests that leave it with two donors, a broker and no store: to start one takes long here."""
    local.START_S = scene.LIMIT_S = 250.0  # it is emulated, with a disk that is far away
    with LocalCluster(donors=2, memory=160 * MIB) as cluster:
        deadline = time.monotonic() + local.START_S
        while scene.idle_functions_of(cluster) < 2 * moves.WARM:  # else the first grants may fail: they take too long
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield cluster


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _INSIDE in os.environ:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if report.failed:
            text = "\n".join([text, *(f"--- {name}\n{content}" for name, content in report.sections)])
        line = {"test": report.nodeid, "when": report.when, "outcome": report.outcome, "text": text}
        with (machine.SHARED / _REPORTS).open("a") as reports:
            reports.write(json.dumps(line) + "\n")
