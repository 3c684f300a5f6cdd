"""The manual says what is true: its examples run, and its tables are those of the program."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from rich.console import Group
from rich.table import Table

import memfaas
from memfaas import config, doctor, errors, messages
from memfaas.bench import bars
from memfaas.bench.fs import bars as fs_bars
from memfaas.bench.plan import SIZES
from memfaas.bench.verbs import bars as verbs_bars
from memfaas.cli import main, status, usage
from memfaas.units import format_size

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = ("python", "sh", "py", "toml", "text", "")
"""Of blocks. `python` and `sh` run as they are, with a broker there; `py` cannot run alone; `text` is output.
What has no name are commands that stay in the foreground, or need root or several machines."""
_TIME_LIMIT_S = 60

_BLOCK = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


class Block(typing.NamedTuple):
    place: str
    kind: str
    text: str


def blocks(*kinds: str) -> list[Block]:
    """The fenced blocks of all pages, each with its page and line."""
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}", found[2], inspect.cleandoc(found[3]) + "\n")
        for page in PAGES
        for text in [page.read_text()]
        for found in _BLOCK.finditer(text)
        if found[2] in kinds
    ]


def each(*kinds: str) -> list[object]:
    return [pytest.param(block, id=block.place) for block in blocks(*kinds)]


def table_after(page: str, words: str) -> list[list[str]]:
    """The cells of the first table below these words, without its head."""
    section = (ROOT / page).read_text().split(f"\n{words}\n", 1)[1]
    rows = []
    for line in section[section.index("\n|") + 1 :].splitlines():
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows[2:]


# --- examples -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[memfaas.LocalCluster]:
    with memfaas.LocalCluster(donors=2, memory="512MiB") as cluster:
        yield cluster


@pytest.fixture
def settings(cluster: memfaas.LocalCluster, tmp_path: Path) -> dict[str, str]:
    """The environment of a reader who did what the quick start says."""
    home = tmp_path / "home"
    (home / ".config/memfaas").mkdir(parents=True)
    shutil.copy(cluster.folder / "secret", home / ".config/memfaas")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = cluster.address.removeprefix("memfaas://").partition("?")[0]
    return {**os.environ, "HOME": str(home), "PATH": path, "MEMFAAS_BROKER": place}


def run(command: list[str], settings: dict[str, str], folder: Path) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("block", each("python"))
def test_an_example_in_python_runs_as_it_is(block: Block, settings: dict[str, str], tmp_path: Path) -> None:
    run([sys.executable, "-W", "error", "-c", block.text], settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", each("sh"))
def test_an_example_for_the_shell_runs_as_it_is(block: Block, settings: dict[str, str], tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", block.text], settings, tmp_path)


@pytest.mark.parametrize("block", each("toml"))
def test_an_example_of_a_settings_file_is_accepted(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "memfaas.toml"
    file.write_text(block.text)
    for role in config.ROLES:
        config.load_settings(role, config=file, environ={})


@pytest.mark.parametrize("page", ["README.md", "quickstart.md", "api.md"])
def test_a_page_for_users_has_examples_that_are_run(page: str) -> None:
    assert any(block.place.startswith(f"{page}:") for block in blocks("python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    assert {found[2] for found in _BLOCK.finditer(page.read_text())} <= set(KINDS)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `memfaas ...` in blocks and in the text, as words, with its place."""
    pieces = [(block.place, line) for block in blocks("sh", "") for line in block.text.splitlines()]
    for page in PAGES:
        pieces += [(page.name, span) for span in _SPAN.findall(_BLOCK.sub("", page.read_text()))]
    for place, piece in pieces:
        for part in re.split(r"\||;|&&|\$ ", piece):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # output, not a command
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words[:1] == ["memfaas"] and len(words) > 1:
                yield place, words[1:]


def test_every_command_that_is_named_exists_with_its_options() -> None:
    seen = set()
    for place, words in commands():
        command: click.Command = main
        for word in words:
            if word.startswith("--"):
                known = {name for parameter in command.params for name in parameter.opts} | {"--help", "--version"}
                assert word.partition("=")[0] in known, f"{place}: memfaas {' '.join(words)}"
            elif word[0] in string.ascii_lowercase and isinstance(command, click.Group):
                found = command.get_command(click.Context(command), word)
                assert found is not None, f"{place}: memfaas {' '.join(words)}"
                command = found
                seen.add(word)
    assert seen >= {"up", "broker", "donor", "tenant", "status", "put", "get", "rm", "doctor", "kv", "compare"}


# --- tables and names -----------------------------------------------------------------------------


def test_the_table_of_options_is_complete_and_true() -> None:
    expected = [
        [option.flag, " or ".join(option.env), f"[{option.section}] {option.name}", option.default, option.help]
        for role in config.ROLES
        for option in config.options(role)
    ]
    assert table_after("docs/operating.md", "## Options") == expected


def test_the_table_of_modules_is_complete_and_true() -> None:
    rows = table_after("docs/architecture.md", "### The modules of `server/`")
    files = [path.name for path in (ROOT / "server").glob("*.py") if path.name != "__init__.py"]
    assert sorted(module for _, module, _ in rows) == sorted(files)


def test_the_table_of_errors_is_complete_and_true() -> None:
    def all_below(kind: type[errors.MemfaasError]) -> Iterator[type[errors.MemfaasError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from all_below(child)

    expected = {(kind.__name__, kind.code, str(kind.exit_status)) for kind in all_below(errors.MemfaasError)}
    rows = [(name, code, status) for name, code, status, *_ in table_after("docs/api.md", "## Errors")]
    assert sorted(rows) == sorted(expected)


def test_the_table_of_status_fields_is_complete_and_true() -> None:
    def fields(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
        for name, hint in typing.get_type_hints(kind).items():
            if name not in kind.__struct_fields__:
                continue
            inner = [one for one in (hint, *typing.get_args(hint)) if isinstance(one, type)]
            structs = [one for one in inner if issubclass(one, msgspec.Struct)]
            if structs:
                yield from fields(structs[0], f"{prefix}{name}{'' if structs[0] is hint else '[]'}.")
            else:
                yield prefix + name

    rows = table_after("docs/operating.md", "What stands in it:")
    assert [field for field, _ in rows] == list(fields(messages.StatusReport))


def test_tables_that_are_shown_have_the_columns_that_are_printed() -> None:
    report = messages.StatusReport(uptime=0, donors=[], leases=[], stores=[], sessions=[])
    donor = messages.DonorUsage(donor="d", offered=0, leased=0, reclaims=0, reclaimed=0, in_time=0)
    counts = usage.tables(messages.UsageReport(since=0, now=0, tenants=[], donors=[donor]))
    assert isinstance(counts, Group)
    shown = {
        "README.md": [status.donor_table(report), status.lease_table(report)],
        "docs/usage.md": [table for table in counts.renderables if isinstance(table, Table)],
    }
    for page, tables in shown.items():
        lines = (ROOT / page).read_text().splitlines()
        assert len(tables) == 2
        for table in tables:
            head = lines[lines.index(str(table.title)) + 1]
            assert head.split() == " ".join(str(column.header) for column in table.columns).split()


def test_the_table_of_bars_is_complete_and_true() -> None:
    expected = [
        [
            bar.text,
            "all" if bar.sizes == SIZES else ", ".join(map(format_size, bar.sizes)) or "-",
            f"at {'least' if bar.at_least else 'most'} {bar.threshold:g}",
        ]
        for bar in bars.BARS
    ]
    assert [[row[0], row[1], row[3]] for row in table_after("docs/benchmarks.md", "## The bars")] == expected


def test_the_table_of_the_verbs_fabrics_bars_is_complete_and_true() -> None:
    expected = [
        [
            bar.text,
            "all" if bar.sizes == verbs_bars.SIZES else ", ".join(map(format_size, bar.sizes)),
            f"at most {bar.most:.3g}",
        ]
        for bar in verbs_bars.BARS
    ]
    rows = table_after("docs/benchmarks.md", "## The verbs fabric")
    assert [[row[0], row[1], row[3]] for row in rows] == expected


def test_the_table_of_a_mounts_bars_is_complete_and_true() -> None:
    expected = [[bar.text, f"at least {bar.least:g}"] for bar in fs_bars.BARS]
    assert [[row[0], row[2]] for row in table_after("docs/benchmarks.md", "## A mount")] == expected


def test_the_fields_of_the_doctors_findings_are_named() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    for field in dataclasses.fields(doctor.Check):
        assert f"`{field.name}`" in text


@pytest.mark.parametrize("kind", [memfaas.Session, memfaas.Store, memfaas.Region, memfaas.LocalCluster])
def test_every_method_for_users_is_described(kind: type) -> None:
    text = (ROOT / "docs/api.md").read_text()
    internal = {
        memfaas.Session: {"open", "ensure_open", "locate", "close_store", "close_region", "holdings", "fabrics"}
        | {"on_gone", "on_dropped", "on_moved", "after_fork"},
        memfaas.Store: {"shut", "fabrics"},
        memfaas.Region: {"shut"},
        memfaas.LocalCluster: {"donor_name", "let_go_after_fork"},
    }
    for name, member in inspect.getmembers(kind, lambda member: callable(member) or isinstance(member, property)):
        if not name.startswith("_") and name not in internal[kind]:
            assert re.search(rf"\b{name}\b", text), f"{kind.__name__}.{name}: {member.__doc__}"


def test_every_public_name_is_described() -> None:
    text = (ROOT / "docs/api.md").read_text()
    for name in memfaas.__all__:
        if not name.startswith("__"):
            assert re.search(rf"\b{name}\b", text), name


# --- links ------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As the usual renderers make them from headings."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_other_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text()):
        if "://" in target:
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target + anchor
