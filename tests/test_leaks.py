"""The check for what tests leave behind finds what it is meant to find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def test_an_orphan_is_found_and_its_test_named(
    run_mark: str, processes_marked: Callable[[str], dict[int, str]]
) -> None:
    parent = subprocess.run(
        ["/bin/sh", "-c", "setsid sleep 60 > /dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, check=True, text=True
    )
    orphan = int(parent.stdout)
    try:
        assert "test_an_orphan_is_found_and_its_test_named" in processes_marked(run_mark)[orphan]
        assert processes_marked("0" * 16) == {}
    finally:
        os.kill(orphan, signal.SIGKILL)


def run_with_our_conftest(pytester: pytest.Pytester, test: str) -> pytest.RunResult:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(test)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider")


@pytest.mark.slow
def test_a_run_that_leaves_a_process_fails(pytester: pytest.Pytester) -> None:
    result = run_with_our_conftest(
        pytester,
        f"""
        import subprocess
        def test_leaves_a_process():
            child = subprocess.Popen([{sys.executable!r}, "-c", "import time; time.sleep(60)"])
            child.returncode = 0  # as if it had been waited for
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*process *time.sleep(60), started by *::test_leaves_a_process (call)*"])


def test_a_run_that_leaves_a_file_fails(pytester: pytest.Pytester) -> None:
    result = run_with_our_conftest(
        pytester,
        """
        import os, pathlib, tempfile
        def test_leaves_files():
            pathlib.Path(os.environ["XDG_RUNTIME_DIR"], "donor.sock").touch()
            tempfile.mkdtemp(prefix="memfaas-cluster-")
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["file */run/donor.sock", "file */tmp/memfaas-cluster-*"])


def test_the_callers_settings_do_not_reach_a_test(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFAAS_BROKER", "production:7411")
    result = run_with_our_conftest(
        pytester,
        """
        import os
        def test_world():
            assert "MEMFAAS_BROKER" not in os.environ
            assert os.environ["HOME"].startswith("/tmp/mf-")
        """,
    )
    result.assert_outcomes(passed=1)
