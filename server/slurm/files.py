"""Writes the hooks of Slurm into a folder, and says what slurm.conf must have to use them."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from memfaas.addresses import Address
from memfaas.errors import UsageError
from memfaas.local_agent import SOCKET
from memfaas.server.slurm.keys import path_of
from memfaas.server.slurm.stores import GRANULE, store_of

_HOOKS = {
    "PrologSlurmctld": (
        "prolog-slurmctld",
        "On the controller, before a job starts: its nodes' donors free its memory.",
    ),
    "Prolog": ("prolog", "On each node of a job, before its first step: the donor frees what it was not told to."),
    "Epilog": ("epilog", "On each node of a job, when it has ended: the donor lends again."),
    "EpilogSlurmctld": ("epilog-slurmctld", "On the controller, when a job has ended: its nodes' donors lend again."),
}
"""By the line of slurm.conf: what `hook` is called with, and what the file says of itself."""
_ON_NODES = ("Prolog", "Epilog")
_ANSWER_S = 3.0
"""What a hook needs beyond the deadline: to find the broker, and to hear what came of it."""
_KILL_S = 2.0
_MARGIN_S = 5.0
_SLURM_USER = re.compile(r"^\s*SlurmUser\s*=\s*([^\s#(]+)", re.MULTILINE | re.IGNORECASE)
_OWN_MARK = "Written by `memfaas slurm install`"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to install."""

    folder: Path
    """The same path on the controller and on all nodes."""
    broker: Address
    secret_file: Path
    runtime_dir: Path
    """Of the donors on the nodes."""
    deadline: float
    """Seconds that a donor has to free a job's memory."""
    slurm_conf: Path
    keys: Path | None
    """Where key files for jobs are to be; None: jobs get no stores."""

    @property
    def state(self) -> Path:
        """Of the stores of jobs, on the controller."""
        return self.folder / "stores"

    @property
    def pools(self) -> Path:
        return self.state / "pools.json"

    @property
    def limit(self) -> float:
        """Seconds that a hook takes at most."""
        return self.deadline + _ANSWER_S


def install(plan: Plan) -> list[str]:
    """Writes the files, over those of an earlier time. Returns the lines for slurm.conf.

    Raises UsageError for a file of the same name that we did not write, OSError.
    """
    plan.folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    lines = []
    for setting, (which, what) in _HOOKS.items():
        path = plan.folder / which
        guard = setting in _ON_NODES and plan.keys is None
        _write(path, 0o755, _hook(plan, which, what, _guard(plan) if guard else ""))
        lines.append(f"{setting}={path}")
    lines += [
        "PrologFlags=Alloc",
        f"PrologEpilogTimeout={round(plan.limit + _KILL_S + _MARGIN_S)}",
    ]
    if plan.keys is not None:
        _make_state(plan)
        # Slurm looks for it there, and nowhere else.
        _write(plan.slurm_conf.parent / "burst_buffer.lua", 0o644, _burst_buffer(plan, plan.keys))
        lines.append("BurstBufferType=burst_buffer/lua")
    return lines


def _make_state(plan: Plan) -> None:
    """For whom slurmctld runs as, who will write there."""
    plan.state.mkdir(exist_ok=True, mode=0o700)
    try:
        found = _SLURM_USER.findall(plan.slurm_conf.read_text(errors="replace"))
    except FileNotFoundError:
        found = []
    if not found or os.geteuid() != 0:
        return
    try:
        user = pwd.getpwuid(int(found[-1])) if found[-1].isdigit() else pwd.getpwnam(found[-1])
    except KeyError:
        raise UsageError(f"{plan.slurm_conf}: there is no user {found[-1]!r}") from None
    os.chown(plan.state, user.pw_uid, user.pw_gid)


def _guard(plan: Plan) -> str:
    """A line by which a node that lends nothing loses no time."""
    return f'[ -S {shlex.quote(str(plan.runtime_dir))}/"$SLURMD_NODENAME"/{SOCKET} ] || exit 0'


def _hook(plan: Plan, which: str, what: str, guard: str) -> str:
    call = [
        *_python("hook", plan),
        which,
        f"--deadline={plan.deadline:g}",
        f"--limit={plan.limit:g}",
        f"--runtime-dir={plan.runtime_dir}",
    ]
    if plan.keys is not None:
        call.append(f"--keys={plan.keys}")
    return _filled(
        "hook.sh",
        WHAT=what,
        SLURM_CONF=str(plan.slurm_conf),
        PATH=shlex.quote(_path()),
        KILL_AFTER=f"{plan.limit + _KILL_S:g}",
        GUARD=guard,
        CALL=shlex.join(call),
    )


def _burst_buffer(plan: Plan, keys: Path) -> str:
    call = [*_python("stores", plan), f"--state={plan.state}"]
    return _filled(
        "burst_buffer.lua",
        CALL=_lua(shlex.join(call)),
        BROKER=_lua(str(Address(plan.broker.host, plan.broker.port))),
        # The job's number is filled in by Lua.
        STORE=_lua(store_of("%s")),
        KEY=_lua(str(path_of(Path(str(keys).replace("%", "%%")), "%s"))),
        POOLS=_lua(str(plan.pools)),
        GRANULE=str(GRANULE),
    )


def _python(module: str, plan: Plan) -> list[str]:
    address = Address(plan.broker.host, plan.broker.port)
    return [
        sys.executable,
        "-P",  # whatever lies in Slurm's folder is not what we want to import
        "-m",
        f"memfaas.server.slurm.{module}",
        f"--broker={address}",
        f"--secret-file={plan.secret_file}",
    ]


def _path() -> str:
    """Where scontrol is, and what a shell needs: Slurm gives a hook hardly any environment."""
    scontrol = shutil.which("scontrol")
    folders = [str(Path(scontrol).parent)] if scontrol else []
    return os.pathsep.join(dict.fromkeys([*folders, "/usr/bin", "/bin"]))


def _lua(text: str) -> str:
    """As Lua writes a text."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _filled(template: str, **values: str) -> str:
    text = resources.files("memfaas.server.slurm").joinpath(template).read_text("utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _write(path: Path, mode: int, text: str) -> None:
    if path.exists() and _OWN_MARK not in path.read_text(errors="replace"):
        raise UsageError(f"{path} is there already, and is not ours; move it away, or call ours from it")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.chmod(mode)
    draft.replace(path)  # a job may start meanwhile
