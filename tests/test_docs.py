"""The manual says what is true: its examples run, and its tables are those of the program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import memfaas
from memfaas import config, errors

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_TIME_LIMIT_S = 60

_BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def snippets() -> list[tuple[str, str]]:
    """The examples marked `python`, each with a name. Those marked `py` are pieces that cannot run alone."""
    return [
        (f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}", block[2])
        for page in PAGES
        for text in [page.read_text()]
        for block in _BLOCK.finditer(text)
        if block[1] == "python"
    ]


def table_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = (ROOT / page).read_text().split(f"\n{heading}\n", 1)[1]
    lines = section[section.index("\n|") + 1 :].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows[2:]


@pytest.fixture(scope="module")
def cluster() -> Iterator[memfaas.LocalCluster]:
    with memfaas.LocalCluster(donors=2, memory="512MiB") as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in snippets()])
def test_an_example_runs_as_it_is(code: str, cluster: memfaas.LocalCluster, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MEMFAAS_BROKER": cluster.address},
        capture_output=True,
        text=True,
        timeout=_TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "quickstart.md", "api.md"])
def test_a_page_for_users_has_examples_that_are_run(page: str) -> None:
    assert any(name.startswith(f"{page}:") for name, _ in snippets())


def test_no_example_is_marked_by_a_name_that_nobody_knows() -> None:
    for page in PAGES:
        for block in _BLOCK.finditer(page.read_text()):
            assert block[1] in ("", "python", "py", "toml", "json"), f"{page.name}: {block[1]}"


def test_the_table_of_options_is_complete_and_true() -> None:
    expected = [
        [option.flag, " or ".join(option.env), f"[{option.section}] {option.name}", option.default]
        for role in config.ROLES
        for option in config.options(role)
    ]
    assert [row[:4] for row in table_after("docs/operating.md", "## Options")] == expected


def test_the_table_of_errors_is_complete_and_true() -> None:
    def all_below(kind: type[errors.MemfaasError]) -> Iterator[type[errors.MemfaasError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from all_below(child)

    expected = {(kind.__name__, kind.code, str(kind.exit_status)) for kind in all_below(errors.MemfaasError)}
    rows = [(name, code, status) for name, code, status, *_ in table_after("docs/api.md", "## Errors")]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_other_pages_lead_somewhere(page: Path) -> None:
    for target, _ in _LINK.findall(page.read_text()):
        if target and "://" not in target:
            assert (page.parent / target).exists(), target
