"""What each tenant may lease, and whose leases have to move first when memory is taken back.

A quota refuses nothing: while there is room, idle memory is better lent than left idle. But what a
tenant leases beyond its quota is *borrowed*, and borrowed leases are the first to be moved away.

The tenants' file is TOML, a table for each tenant, and one for those who have none of their own:

    [default]
    quota = "16GiB"

    [tenants.alice]
    quota = "64GiB"
    priority = 5
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from memfaas import _accept as accept
from memfaas.errors import UsageError

_PRIORITIES = 1000


@dataclass(frozen=True)
class Share:
    """What one tenant is entitled to."""

    quota: int | None = None
    """Bytes of donors' memory; None is no limit."""
    priority: int = 0
    """Leases of lower priority are moved first."""


class Standing(NamedTuple):
    """Of one lease, for good; as in `LeaseSpec`."""

    priority: int
    borrowed: bool


_KEYS: dict[str, Callable[[Any], int]] = {
    "quota": accept.size(0),
    "priority": accept.integer(-_PRIORITIES, _PRIORITIES),
}


class Quotas:
    """The shares of all tenants. Without a file, nobody has a limit and all are alike."""

    def __init__(self, tenants: Mapping[str, Share] | None = None, default: Share = Share()) -> None:
        self._tenants = dict(tenants or {})
        self._default = default

    @classmethod
    def load(cls, path: Path | None) -> Quotas:
        """Raises UsageError, which names the file and what is wrong in it."""
        if path is None:
            return cls()
        try:
            content = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the tenants' file {path}: {error.strerror}") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"cannot read the tenants' file {path}: {error}") from error
        for section in content:
            if section not in ("default", "tenants"):
                raise UsageError(f"{path}: unknown section {section!r}; there are [default] and [tenants.NAME]")
        default = _share(f"{path}: [default]", content.get("default", {}), Share())
        tables = _table(f"{path}: [tenants]", content.get("tenants", {}))
        tenants = {}
        for name, table in tables.items():
            where = f"{path}: [tenants.{name}]"
            try:
                accept.tenant(name)
            except ValueError as error:
                raise UsageError(f"{where}: {error}") from error
            tenants[name] = _share(where, table, default)
        return cls(tenants, default)

    @property
    def tenants(self) -> list[str]:
        """Those with a table of their own."""
        return list(self._tenants)

    def share(self, tenant: str) -> Share:
        return self._tenants.get(tenant, self._default)

    def standing(self, tenant: str, leased: int, more: int) -> Standing:
        """Of a lease of `more` bytes, for a tenant who has leased so many bytes already."""
        share = self.share(tenant)
        return Standing(share.priority, share.quota is not None and leased + more > share.quota)


def _share(where: str, content: Any, default: Share) -> Share:
    """What a table does not say is as for everybody."""
    values = {"quota": default.quota, "priority": default.priority}
    for key, value in _table(where, content).items():
        if key not in _KEYS:
            (nearest,) = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)
            raise UsageError(f"{where}: unknown setting {key!r}; the nearest is {nearest!r} (of {', '.join(_KEYS)})")
        try:
            values[key] = _KEYS[key](value)
        except UsageError as error:
            raise UsageError(f"{where} {key}: {error}") from None
    return Share(quota=values["quota"], priority=values["priority"] or 0)


def _table(where: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UsageError(f"{where} must be a table")
    return content
