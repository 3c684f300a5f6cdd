"""The flags of each command are the settings that it reads: none is ignored, and none is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from memfaas import config
from memfaas.cli import main, options
from memfaas.client.local import LocalCluster
from memfaas.config import Settings

MODULES = ("check", "data", "files", "mount", "reclaim", "serve", "slurm", "status", "usage")
COMMANDS: dict[str, tuple[list[list[str]], set[str]]] = {
    "broker": ([[]], set()),
    "donor": ([[]], set()),
    "up": ([[]], {"broker"}),  # it is up's own
    "tenant": ([["ada", "ada.key"]], set()),
    "doctor": ([[]], {"backing"}),  # it examines the folder that the settings name
    "status": ([[]], set()),
    "usage": ([[]], set()),
    "put": ([["key", "file"]], set()),
    "get": ([["key"]], set()),
    "ls": ([[]], set()),
    "rm": ([["key"]], set()),
    # --node is the donor's name, the tenant is the operator, and nothing moves over a fabric.
    "reclaim": ([["--node", "d", "--bytes", "1"], ["--local", "--bytes", "1"]], {"name", "tenant", "fabric", "device"}),
    "lend": ([["--node", "d"], ["--local"]], {"name", "tenant", "fabric", "device"}),
    "slurm install": ([["--dir", "hooks", "--slurm-conf", "slurm.conf", "--stores"]], set()),
    "slurm scan": ([[]], set()),
    "mount": ([["store", ".", "--foreground"]], set()),
    "fs check": ([["store"]], set()),
}
"""How each is called, so that it comes by all that it reads; and what it reads without having a flag for it."""
OPTIONS = {option.name: option for role in config.ROLES for option in config.options(role)}
FIELDS: dict[str, dataclasses.Field[Any]] = {
    field.name: field
    for role in config.ROLES
    for field in dataclasses.fields(role)  # type: ignore[arg-type]  # subclasses are dataclasses
}


def command(name: str) -> click.Command:
    found: click.Command = main
    for word in name.split():
        assert isinstance(found, click.Group)
        one = found.get_command(click.Context(found), word)
        assert one is not None
        found = one
    return found


def flags(name: str) -> set[str]:
    """The settings that it has a flag for. Another flag of the same name says nothing of the environment."""
    return {
        parameter.name
        for parameter in command(name).params
        if isinstance(parameter, click.Option) and parameter.name and "environment: " in (parameter.help or "")
    }


def every_command(group: click.Group = main, prefix: str = "") -> Iterator[str]:
    for word in group.list_commands(click.Context(group)):
        one = group.get_command(click.Context(group), word)
        if isinstance(one, click.Group):
            yield from every_command(one, f"{prefix}{word} ")
        else:
            yield prefix + word


class Reads:
    """Which settings are read of all that commands load, and what they are."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.values: dict[str, list[Any]] = {}

    def load(self, role: type[Settings], given: dict[str, Any]) -> Settings:
        settings = options.load(role, given)
        names = {field.name for field in dataclasses.fields(role)}  # type: ignore[arg-type]
        for name in names:
            self.values.setdefault(name, []).append(getattr(settings, name))

        def noted(this: Settings, name: str) -> Any:
            self.names |= {name} & names
            return object.__getattribute__(this, name)

        watched: Settings = object.__new__(type("Watched", (role,), {"__getattribute__": noted}))
        watched.__dict__.update(settings.__dict__)
        return watched


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    for module in MODULES:
        monkeypatch.setattr(import_module(f"memfaas.cli.{module}"), "load", reads.load)

    def takes_all(settings: Settings) -> None:
        dataclasses.asdict(settings)  # type: ignore[call-overload]

    async def broker(settings: Settings, on_ready: Callable[..., None]) -> None:
        takes_all(settings)
        on_ready(address="127.0.0.1:1")

    async def donor(settings: Settings, _: Callable[..., None]) -> None:
        takes_all(settings)

    monkeypatch.setattr("memfaas.server.broker.main", takes_all)
    monkeypatch.setattr("memfaas.server.donor.main", takes_all)
    monkeypatch.setattr("memfaas.server.broker.run_broker", broker)
    monkeypatch.setattr("memfaas.server.donor.run_donor", donor)
    return reads


@pytest.fixture(scope="module")
def broker_alone() -> Iterator[LocalCluster]:
    with LocalCluster(donors=0) as cluster:
        yield cluster


@pytest.fixture
def values(broker_alone: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One for each setting, as people write it. Nothing is lent, and there is no store."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(broker_alone.folder / "secret", "secret")
    Path("file").touch()
    return {
        "backing": "scratch",
        "broker": broker_alone.address.partition("?")[0],
        "device": "mlx5_1:2:3",
        "fabric": "tcp",
        "headroom": "3GiB",
        "lease_ttl": "7s",
        "listen_host": "127.0.0.2",
        "listen_port": "7",
        "memory": "5GiB",
        "name": "node7",
        "runtime_dir": "run",
        "secret_file": "secret",
        "store": "results",
        "tenant": "ada",
        "tenants_file": "tenants.toml",
        "timeout": "3s",
        "usage_file": "usage.json",
        "warm": "9",
    }


def test_every_command_with_settings_is_tried_here() -> None:
    assert {name for name in every_command() if flags(name)} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_what_it_has_flags_for_and_nothing_else(
    name: str, reads: Reads, values: dict[str, str]
) -> None:
    calls, without_flag = COMMANDS[name]
    given = [word for flag in sorted(flags(name)) for word in (OPTIONS[flag].flag, values[flag])]
    for arguments in calls:
        result = CliRunner().invoke(main, [*name.split(), *arguments, *given])
        assert "unknown setting" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
    assert reads.names - without_flag == flags(name)
    for flag in flags(name):
        assert FIELDS[flag].metadata["parse"](values[flag]) in reads.values[flag], flag
