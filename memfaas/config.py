"""Every setting of the broker, the donor and the client: its default, its unit, what it means.

A setting comes from, in rising precedence: its default, the settings file, the environment, and
what the program was given (a flag, or an argument of the Python API). The file is TOML with one
section for each role:

    [client]
    broker = "node1:7411"

    [donor]
    memory = "16GiB"
    headroom = "4GiB"

The environment has `MEMFAAS_TENANT` for a setting of the client, `MEMFAAS_BROKER_LEASE_TTL` and
`MEMFAAS_DONOR_HEADROOM` for the others. `MEMFAAS_BROKER` is the broker's address and
`MEMFAAS_SECRET_FILE` the secret file, for whoever needs them.

A settings object is checked when it is made, so whoever holds one need not check again.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from memfaas import _accept as accept
from memfaas.addresses import DEFAULT_PORT, Address
from memfaas.auth import DEFAULT_SECRET_FILE
from memfaas.errors import UsageError
from memfaas.units import GIB, MIB

DEFAULT_FILE = Path("~/.config/memfaas/memfaas.toml")
_LONGEST_HOME = 80
"""Bytes of a donor's folder: a Unix socket's path has at most 107, and its name needs the rest."""

Fabric = Literal["auto", "shm", "tcp", "verbs"]
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Option:
    """One setting, described for a command line or a manual."""

    name: str
    section: str
    env: tuple[str, ...]
    """Environment variables that set it; the first that is set wins."""
    unit: str
    """`bytes`, `seconds`, or empty."""
    default: str
    """As people write it."""
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _setting(
    parse: Callable[[Any], Any],
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    factory: Any = dataclasses.MISSING,
    shown: str | None = None,
    shared_env: str | None = None,
) -> Any:
    """A field whose `parse` takes what a person wrote, and also its own result."""
    metadata = {
        "parse": parse,
        "help": help,
        "unit": unit,
        "default": shown if shown is not None else str(default),
        "shared_env": shared_env,
    }
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _default_runtime_dir() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base, "memfaas") if base else Path(f"/tmp/memfaas-{os.getuid()}")


def _broker_setting() -> Any:
    return _setting(
        accept.address,
        Address("127.0.0.1", DEFAULT_PORT),
        help="Address of the broker: HOST:PORT, or memfaas://HOST:PORT?secret=/path/to/secret.",
        shared_env="MEMFAAS_BROKER",
    )


def _secret_setting() -> Any:
    return _setting(
        accept.path,
        DEFAULT_SECRET_FILE,
        help="File with the cluster's secret, mode 0600; the same on every node.",
        shared_env="MEMFAAS_SECRET_FILE",
    )


def _device_setting() -> Any:
    return _setting(
        accept.device,
        "",
        shown="auto, the first active port with RoCE v2 or InfiniBand",
        help="RDMA device of this node to use: NAME[:PORT[:GID]], as memfaas doctor lists them.",
        shared_env="MEMFAAS_DEVICE",
    )


# --- the settings of each role --------------------------------------------------------------------


class Settings:
    """What the three have in common: values are read and checked when an object is made."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = _checked(field.name, field.metadata["parse"], getattr(self, field.name))
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True, kw_only=True)
class BrokerSettings(Settings):
    """Settings of `memfaas broker`."""

    section: ClassVar[str] = "broker"

    listen_host: str = _setting(
        accept.host,
        "127.0.0.1",
        help="Address of this node to listen on; 0.0.0.0 is every IPv4 address it has.",
    )
    listen_port: int = _setting(
        accept.integer(0, 65535), DEFAULT_PORT, help="TCP port to listen on; 0 lets the system choose."
    )
    secret_file: Path = _secret_setting()
    lease_ttl: float = _setting(
        accept.duration(0.1, 86_400),
        30.0,
        shown="30s",
        unit="seconds",
        help="How long a lease lives that its session does not renew.",
    )
    tenants_file: Path | None = _setting(
        accept.path_or_none,
        None,
        shown="none, all tenants are alike",
        help="TOML file with the quotas and priorities of tenants.",
    )
    usage_file: Path | None = _setting(
        accept.path_or_none,
        None,
        shown="none, usage is counted from the start",
        help="File in which usage is kept over a restart.",
    )


@dataclass(frozen=True, kw_only=True)
class DonorSettings(Settings):
    """Settings of `memfaas donor`."""

    section: ClassVar[str] = "donor"

    broker: Address = _broker_setting()
    name: str = _setting(
        accept.donor_name,
        factory=socket.gethostname,
        shown="this host's name",
        help="Name of this donor, unique in the cluster.",
    )
    memory: int | Literal["auto"] = _setting(
        accept.size_or_auto(2 * MIB),
        "auto",
        unit="bytes",
        help="How much memory to lend; auto lends what is available beyond the headroom.",
    )
    headroom: int = _setting(
        accept.size(0),
        GIB,
        shown="1GiB",
        unit="bytes",
        help="Memory of this node that must stay available to everyone else; with backing, space on its disk.",
    )
    backing: Path | None = _setting(
        accept.path_or_none,
        None,
        shown="none, memory is lent",
        help="Folder in local scratch: lend files in it instead of memory, to what no other donor has room for.",
    )
    listen_host: str | None = _setting(
        accept.host_or_auto,
        None,
        shown="auto, its address on the way to the broker",
        help="Address of this node that clients reach it by.",
    )
    device: str = _device_setting()
    runtime_dir: Path = _setting(
        accept.path,
        factory=_default_runtime_dir,
        shown="$XDG_RUNTIME_DIR/memfaas, or /tmp/memfaas-UID",
        help="Folder in which this donor keeps its sockets, in a folder of its own name.",
    )
    secret_file: Path = _secret_setting()
    warm: int = _setting(
        accept.integer(0, 64),
        2,
        help="How many idle memory functions to keep ready, so that a lease is granted at once.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(os.fsencode(self.home)) > _LONGEST_HOME:
            raise UsageError(
                f"runtime_dir: {self.home} is too long for sockets in it; at most {_LONGEST_HOME} bytes, "
                "the donor's name included"
            )

    @property
    def home(self) -> Path:
        """This donor's own folder in `runtime_dir`."""
        return self.runtime_dir / self.name

    @property
    def secret_path(self) -> Path:
        """The secret file to use: the one that the broker's address names, or else the setting."""
        return self.broker.secret_file or self.secret_file


@dataclass(frozen=True, kw_only=True)
class ClientSettings(Settings):
    """Settings of sessions: of `memfaas.connect` and of the command line's put, get, status and so on."""

    section: ClassVar[str] = "client"

    broker: Address = _broker_setting()
    secret_file: Path = _secret_setting()
    tenant: str | None = _setting(
        accept.tenant,
        None,
        shown="the login name, or whom the key file is for",
        help="Whose stores and leases to use.",
    )
    fabric: Fabric = _setting(
        accept.choice("auto", "shm", "tcp", "verbs"),
        "auto",
        help="How bytes move: shm (same node), verbs or tcp, which then must work; auto takes the best that does.",
    )
    device: str = _device_setting()
    timeout: float = _setting(
        accept.duration(0.001, 3600),
        10.0,
        shown="10s",
        unit="seconds",
        help="How long one operation may take.",
    )
    store: str = _setting(
        accept.store_name,
        "default",
        help="Name of the store that memfaas put, get, ls and rm use.",
    )

    @property
    def secret_path(self) -> Path:
        """The secret file to use: the one that the broker's address names, or else the setting."""
        return self.broker.secret_file or self.secret_file


ROLES: tuple[type[Settings], ...] = (BrokerSettings, DonorSettings, ClientSettings)


def options(role: type[Settings]) -> tuple[Option, ...]:
    """The settings of a role, described, in the order of its fields."""
    return tuple(
        Option(
            name=field.name,
            section=role.section,
            env=_env_names(role, field),
            unit=field.metadata["unit"],
            default=field.metadata["default"],
            help=field.metadata["help"],
        )
        for field in dataclasses.fields(role)  # type: ignore[arg-type]  # subclasses are dataclasses
    )


def _env_names(role: type[Settings], field: dataclasses.Field[Any]) -> tuple[str, ...]:
    prefix = "MEMFAAS_" if role is ClientSettings else f"MEMFAAS_{role.section.upper()}_"
    names = (prefix + field.name.upper(), field.metadata["shared_env"])
    return tuple(dict.fromkeys(name for name in names if name))


# --- loading ------------------------------------------------------------------------------------


def load_settings(
    role: type[S],
    given: Mapping[str, Any] | None = None,
    *,
    config: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> S:
    """The settings of one role from the file, the environment and what was `given`.

    In `given`, None means "not given". `config` is the settings file; without it MEMFAAS_CONFIG
    names it, and else it is `~/.config/memfaas/memfaas.toml`, which need not exist.

    Raises UsageError, which names the setting and where it came from.
    """
    environ = os.environ if environ is None else environ
    path, table = _read_file(config, environ)
    section = table.get(role.section, {})
    values: dict[str, Any] = {}
    for field in dataclasses.fields(role):  # type: ignore[arg-type]  # subclasses are dataclasses
        parse = field.metadata["parse"]
        if field.name in section:
            value = section[field.name]
            if parse in (accept.path, accept.path_or_none) and isinstance(value, str):
                value = _beside(path, value)
            values[field.name] = _checked(f"{path}: [{role.section}] {field.name}", parse, value)
        for variable in _env_names(role, field):
            if environ.get(variable):
                values[field.name] = _checked(variable, parse, environ[variable])
                break
    values.update((name, value) for name, value in (given or {}).items() if value is not None)
    known = [option.name for option in options(role)]
    for name in values.keys() - set(known):
        raise UsageError(f"unknown setting {name!r}; {_nearest(name, known)}")
    return role(**values)


def _read_file(config: str | Path | None, environ: Mapping[str, str]) -> tuple[Path, dict[str, dict[str, Any]]]:
    named = config or environ.get("MEMFAAS_CONFIG")
    path = (
        _checked("config" if config else "MEMFAAS_CONFIG", accept.path, named) if named else DEFAULT_FILE.expanduser()
    )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if named:
            raise UsageError(f"there is no settings file {path}") from None
        table = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings file {path}: {error}") from error
    _check_keys(path, table)
    return path, table


def _check_keys(path: Path, table: dict[str, Any]) -> None:
    """Also of the roles that are not asked for: a misspelt setting must not wait to be noticed."""
    roles = {role.section: role for role in ROLES}
    for section, content in table.items():
        if section not in roles:
            what = "section" if isinstance(content, dict) else "key outside of the sections"
            raise UsageError(
                f"{path}: unknown {what} {section!r}; {_nearest(section, [f'[{name}]' for name in roles])}"
            )
        if not isinstance(content, dict):
            raise UsageError(f"{path}: {section!r} must be a section: [{section}]")
        known = [option.name for option in options(roles[section])]
        for key in content:
            if key not in known:
                raise UsageError(f"{path}: unknown setting {key!r} in [{section}]; {_nearest(key, known)}")


def _nearest(name: str, known: list[str]) -> str:
    (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"the nearest is {nearest!r} (of {', '.join(known)})"


def _beside(file: Path, value: str) -> str:
    """A relative path in the settings file starts at the file's folder."""
    return value if value.startswith("~") or not value.strip() else str(file.parent / value)


def _checked(label: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except UsageError as error:
        raise UsageError(f"{label}: {error}") from None
