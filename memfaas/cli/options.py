"""Command-line options from the settings of a role: one flag for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from memfaas import config
from memfaas.config import Settings

S = TypeVar("S", bound=Settings)
F = TypeVar("F", bound=Callable[..., Any])

SESSION = ("broker", "secret_file", "tenant", "fabric", "device", "timeout")
"""The settings of a session that uses no store of its own."""


def settings_options(role: type[S], only: tuple[str, ...] | None = None) -> Callable[[F], F]:
    """Adds a role's flags to a command, or `only` some. Their values come as text; `load` makes settings of them."""

    def add(command: F) -> F:
        for option in reversed(config.options(role)):
            if only is not None and option.name not in only:
                continue
            origin = f"default: {option.default}; environment: {' or '.join(option.env)}; file: [{option.section}]"
            command = click.option(
                option.flag,
                option.name,
                metavar={"bytes": "SIZE", "seconds": "DURATION"}.get(option.unit, "TEXT"),
                help=f"{option.help}  [{origin}]",
            )(command)
        return command

    return add


def load(role: type[S], given: dict[str, Any]) -> S:
    """The settings of a role from the file, the environment and these flags. Raises UsageError."""
    return config.load_settings(role, given, config=click.get_current_context().obj)
