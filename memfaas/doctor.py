"""What on this node is missing or makes memfaas slow, and the command that mends it.

Nothing here changes anything.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from memfaas import cgroups
from memfaas.errors import FabricUnavailable, MemfaasError
from memfaas.fabric import devices, loopback
from memfaas.node import (
    HUGE_PAGES,
    MEMORY_FILE_SYSTEMS,
    NETWORK_FILE_SYSTEMS,
    SHMEM_ENABLED,
    gives_huge_pages,
    huge_page_choice,
)
from memfaas.units import format_size

State = Literal["ok", "slow", "missing"]

_ENOUGH_FILES = 16_384
_ENOUGH_BACKLOG = 1024
_POPULATE_SINCE = (5, 14)
_CAP_IPC_LOCK = 14
_GETS_LIBIBVERBS = "sudo apt-get install ibverbs-providers   # with libibverbs1"
_GETS_PROVIDERS = "sudo apt-get install ibverbs-providers"
_LIBRARIES = ("numpy", "trio", "msgpack", "msgspec", "lz4", "click", "rich")


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    state: State
    found: str
    """What there is."""
    meaning: str
    """What follows from it."""
    remedy: str | None = None
    """A command that mends it, if there is one."""
    required: bool = False
    """memfaas does not work without it."""


@dataclass(frozen=True)
class Node:
    """Where the checks look; tests look elsewhere."""

    root: Path = Path("/")
    limit: Callable[[int], tuple[int, int]] = field(default=resource.getrlimit)
    kernel: str = field(default_factory=platform.release)
    which: Callable[[str], str | None] = field(default=shutil.which)
    backing: Path | None = None
    """Of its donor's settings."""
    device: str = ""
    """The RDMA device that is pinned, if one is."""
    has_module: Callable[[str], bool] = field(default=lambda name: importlib.util.find_spec(name) is not None)

    def read(self, path: str) -> str | None:
        """A file of the system, or None where there is none."""
        try:
            return (self.root / path.lstrip("/")).read_text().strip()
        except OSError:
            return None

    def meminfo(self, name: str) -> int:
        """Bytes, or 0 where the system does not say."""
        match = re.search(rf"^{name}:\s+(\d+) kB", self.read("/proc/meminfo") or "", re.MULTILINE)
        return int(match[1]) * 1024 if match else 0


def examine(node: Node | None = None) -> list[Check]:
    """All checks, the required ones first."""
    where = node or Node()
    checks = [check for function in _CHECKS for check in function(where)]
    return sorted(checks, key=lambda check: not check.required)


# --- required -------------------------------------------------------------------------------------


def _native(node: Node) -> Iterator[Check]:
    name = "native module"
    try:
        from memfaas import _native
    except ImportError as error:
        yield Check(name, "missing", str(error), "nothing works without it", "make build", required=True)
    else:
        yield Check(name, "ok", Path(_native.__file__).name, "the data path is compiled and loads", required=True)


def _kernel(node: Node) -> Iterator[Check]:
    version = tuple(map(int, re.findall(r"\d+", node.kernel)[:2]))
    good = version >= _POPULATE_SINCE
    yield Check(
        "kernel",
        "ok" if good else "missing",
        f"Linux {node.kernel}",
        "it can back memory in advance" if good else "a donor needs Linux 5.14 or newer, to back memory in advance",
        required=True,
    )


def _versions(node: Node) -> Iterator[Check]:
    parts = [f"memfaas {_version('memfaas')}", f"Python {platform.python_version()}"]
    parts += [f"{name} {_version(name)}" for name in _LIBRARIES]
    good = sys.version_info >= (3, 11)
    meaning = "for bug reports" if good else "Python 3.11 or newer is needed"
    yield Check("versions", "ok" if good else "missing", ", ".join(parts), meaning, required=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


# --- memory ---------------------------------------------------------------------------------------


def _huge_pages(node: Node) -> Iterator[Check]:
    name = "huge pages"
    folder = node.root / HUGE_PAGES.relative_to("/")
    choice = huge_page_choice(folder)
    slow = "lent memory lies in 4 KiB pages: it comes back about 50 times slower (some 5 GiB/s, not hundreds)"
    if choice is None:
        yield Check(name, "slow", "this kernel has no huge pages for shared memory", slow)
    elif gives_huge_pages(folder):
        yield Check(name, "ok", f"shmem_enabled is {choice}", "lent memory lies in 2 MiB pages and comes back at once")
    else:
        yield Check(name, "slow", f"shmem_enabled is {choice}", slow, f"echo advise | sudo tee {SHMEM_ENABLED}")


def _memlock(node: Node) -> Iterator[Check]:
    name = "locked memory"
    soft, hard = node.limit(resource.RLIMIT_MEMLOCK)
    total = node.meminfo("MemTotal")
    capable = re.search(r"^CapEff:\s+([0-9a-f]+)", node.read("/proc/self/status") or "", re.MULTILINE)
    if capable and int(capable[1], 16) >> _CAP_IPC_LOCK & 1:
        yield Check(name, "ok", "CAP_IPC_LOCK", "lent memory is never swapped out")
        return
    best = soft if hard == soft or hard == 0 else hard
    if best == resource.RLIM_INFINITY or (total and best >= total):
        yield Check(name, "ok", f"limit {_limit(best)}", "lent memory is never swapped out")
        return
    swap = node.meminfo("SwapTotal")
    yield Check(
        name,
        "slow",
        f"limit {_limit(best)} for each process, {format_size(swap)} of swap",
        "what is lent beyond the limit may be swapped out, and then takes milliseconds to read"
        if swap
        else "what is lent beyond the limit is not locked, which matters once there is swap",
        "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/memfaas.conf   # then log in again",
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else format_size(value)


def _memory_limit(node: Node) -> Iterator[Check]:
    name = "memory limit"
    total = node.meminfo("MemTotal")
    limit = min((group.limit() for group in _groups(node)), default=cgroups.NO_LIMIT)
    if limit >= cgroups.NO_LIMIT or (total and limit >= total):
        yield Check(name, "ok", f"{format_size(total)}, no limit by a cgroup", "a donor may lend what the node has")
    else:
        meaning = "`memfaas donor --memory auto` stays below it; lent memory counts as used in it"
        yield Check(name, "ok", f"{format_size(limit)} by the cgroup, of {format_size(total)}", meaning)


def _groups(node: Node) -> list[cgroups.Group]:
    try:
        return cgroups.groups(node.root / "proc", node.root)
    except OSError:
        return []


def _pressure(node: Node) -> Iterator[Check]:
    groups = _groups(node)
    signals = []
    if node.read("/proc/pressure/memory") is not None:
        signals.append("PSI")
    if any(group.version == 2 and (group.folder / "memory.pressure").exists() for group in groups):
        signals.append("PSI of its cgroup (version 2)")
    if any(group.version == 1 and (group.folder / "cgroup.event_control").exists() for group in groups):
        signals.append("thresholds of its cgroup (version 1)")
    meaning = (
        "the kernel wakes a donor when memory is scarce; it also looks at what is available"
        if signals
        else "the kernel does not wake a donor; it only looks at what is available, often near its headroom"
    )
    yield Check("memory pressure", "ok", ", ".join([*signals, "MemAvailable"]), meaning)


def _backing(node: Node) -> Iterator[Check]:
    if node.backing is None:
        return
    name = "spill folder"
    folder = node.backing
    where = node.root / str(folder).lstrip("/")
    kind = _file_system(node, folder)
    if not where.is_dir():
        meaning = "a spill donor does not start without it"
        yield Check(name, "missing", f"{folder} is no folder", meaning, f"sudo mkdir -p {shlex.quote(str(folder))}")
    elif not os.access(where, os.W_OK | os.X_OK):
        yield Check(name, "missing", f"{folder} cannot be written to", "run the spill donor as a user who may")
    elif kind in MEMORY_FILE_SYSTEMS:
        meaning = "what is there takes memory, which a spill donor is to save: choose a folder on a local disk"
        yield Check(name, "missing", f"{folder} is on {kind}", meaning)
    elif kind in NETWORK_FILE_SYSTEMS:
        meaning = "its bytes go over the network, and its space is shared: choose a folder on a local disk"
        yield Check(name, "missing", f"{folder} is on {kind}", meaning)
    else:
        space = os.statvfs(where)
        free = format_size(space.f_bavail * space.f_frsize)
        yield Check(
            name, "ok", f"{folder} on {kind or 'an unknown file system'}, {free} free", "a spill donor can use it"
        )


def _file_system(node: Node, folder: Path) -> str | None:
    """The type of the one that the folder is in."""
    best: tuple[int, str] | None = None
    for line in (node.read("/proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4])
        # Of two at the same place, the later one is seen.
        if folder.is_relative_to(mount) and (best is None or len(mount.parts) >= best[0]):
            best = len(mount.parts), right.split()[0]
    return best[1] if best else None


# --- connections ----------------------------------------------------------------------------------


def _files(node: Node) -> Iterator[Check]:
    _, hard = node.limit(resource.RLIMIT_NOFILE)
    found = f"limit {'unlimited' if hard == resource.RLIM_INFINITY else hard}"
    if hard == resource.RLIM_INFINITY or hard >= _ENOUGH_FILES:
        yield Check("open files", "ok", found, "enough for thousands of connections")
    else:
        yield Check(
            "open files",
            "slow",
            found,
            "each connection of a client takes one: later ones will be refused",
            f"echo '* - nofile {4 * _ENOUGH_FILES}' | sudo tee /etc/security/limits.d/memfaas-files.conf   "
            "# then log in again",
        )


def _backlog(node: Node) -> Iterator[Check]:
    text = node.read("/proc/sys/net/core/somaxconn")
    if text is None or not text.isdigit():
        return
    if int(text) >= _ENOUGH_BACKLOG:
        yield Check("backlog", "ok", f"somaxconn is {text}", "many clients may connect at once")
    else:
        meaning = "when many clients connect at once, some have to try again after a second"
        remedy = f"sudo sysctl -w net.core.somaxconn={4 * _ENOUGH_BACKLOG}"
        yield Check("backlog", "slow", f"somaxconn is {text}", meaning, remedy)


# --- what some features need ------------------------------------------------------------------------


def _fuse(node: Node) -> Iterator[Check]:
    name = "file system"
    needs = (
        ("/dev/fuse", (node.root / "dev/fuse").exists(), "sudo modprobe fuse"),
        ("fusermount3", node.which("fusermount3") is not None, "sudo apt-get install fuse3"),
        ("pyfuse3", node.has_module("pyfuse3"), "pip install pyfuse3   # it needs libfuse3-dev"),
    )
    lacking = [need for need in needs if not need[1]]
    if lacking:
        found = f"without {', '.join(need for need, _, _ in lacking)}"
        yield Check(name, "missing", found, "`memfaas mount` needs it; Python needs it not", lacking[0][2])
        return
    conf = (node.read("/etc/fuse.conf") or "").splitlines()
    allowed = "user_allow_other" in (line.strip() for line in conf)
    yield Check(
        name,
        "ok",
        ", ".join(need for need, _, _ in needs) + (", user_allow_other" if allowed else ""),
        "everybody can mount"
        + ("" if allowed else "; `--allow-other` takes root, or a line user_allow_other in /etc/fuse.conf"),
    )


def _rdma(node: Node) -> Iterator[Check]:
    known = devices.read_kernel(node.root / devices.FOLDER.relative_to("/"))
    if not known:
        yield Check("RDMA", "ok", "no RDMA device", "other nodes are reached over tcp")
        return
    yield _libibverbs()
    yield from _ports(known)
    yield from _abilities()
    yield _loopback(known, node.device)


def _libibverbs() -> Check:
    name = "RDMA library"
    try:
        found = f"libibverbs.so.1 of rdma-core {devices.libibverbs_version()}"
    except FabricUnavailable as error:
        return Check(name, "missing", str(error), "other nodes are reached over tcp", _GETS_LIBIBVERBS)
    return Check(name, "ok", found, "memfaas opens RDMA devices through it, of whatever release")


def _ports(known: list[devices.Device]) -> Iterator[Check]:
    for device in known:
        for port in device.ports:
            name = f"RDMA {device.name}:{port.number}"
            gids = ", ".join(f"{gid.index}: {gid.address} ({gid.kind})" for gid in port.gids)
            found = f"{port.link_layer}, {port.state}; GIDs {gids or 'none'}"
            if port.state != "active":
                remedy = f"rdma link show {device.name}/{port.number}   # then set its network interface up"
                yield Check(name, "missing", found, "this port is not used", remedy)
            elif port.best_gid() is None:
                remedy = "rdma link show   # then give its network interface an IP address"
                yield Check(name, "missing", found, "this port has no address of RoCE v2 or InfiniBand", remedy)
            else:
                yield Check(name, "ok", found, "this port can be used")


def _abilities() -> Iterator[Check]:
    """What the devices themselves say, which only pyverbs can ask from Python."""
    name = "pyverbs"
    try:
        found = devices.discover()
    except devices.PyverbsMissing as error:
        meaning = "what the devices can do is not known here; memfaas uses them all the same"
        yield Check(name, "missing", str(error), meaning, error.remedy)
        return
    except FabricUnavailable as error:
        yield Check(name, "missing", str(error), "no program can open the devices", _GETS_PROVIDERS)
        return
    yield Check(name, "ok", f"pyverbs {devices.pyverbs_version()}", f"programs can open {len(found)} devices")
    for one in found:
        can = one.ability
        yield Check(
            f"RDMA {one.device.name}",
            "ok" if can.atomics else "slow",
            f"firmware {can.firmware or 'unknown'}, {can.queue_pairs} queue pairs, {can.regions} memory regions of at "
            f"most {format_size(can.largest_region)}, {can.reads} reads at once",
            "its atomics are one-sided" if can.atomics else "it has no atomics: those of regions go over tcp",
        )


def _loopback(known: list[devices.Device], wanted: str) -> Check:
    """A page written and read through the device by the code that clients and functions use."""
    name = "RDMA loopback"
    over_tcp = "other nodes are reached over tcp"
    try:
        device = devices.choose(known, wanted)
    except FabricUnavailable as error:
        return Check(name, "missing", str(error), over_tcp)
    try:
        took = loopback.measure(device)
    except (MemfaasError, OSError) as error:
        memlock = "RDMA pins memory: with CAP_IPC_LOCK or a higher limit of locked memory it may work; "
        limited = isinstance(error, OSError) or "memory" in str(error)
        return Check(name, "missing", f"{device}: {error}", (memlock if limited else "") + over_tcp, _GETS_PROVIDERS)
    found = f"{device}: a page written in {took.write_us:.0f} us and read in {took.read_us:.0f} us"
    return Check(name, "ok", found, "both were right; this is the device that is used")


_CHECKS: tuple[Callable[[Node], Iterator[Check]], ...] = (
    _native,
    _kernel,
    _versions,
    _huge_pages,
    _memlock,
    _memory_limit,
    _pressure,
    _backing,
    _files,
    _backlog,
    _fuse,
    _rdma,
)
