"""The RDMA devices of this node, and which of them is used.

What the kernel says of them in sysfs decides the choice: it takes a millisecond wherever a link is opened, and
needs no library. pyverbs asks the devices themselves, through the system's libibverbs, and so knows what a
program can really use; to import it takes a tenth of a second and 4 MiB, so `memfaas doctor` does, and not
every client and function. Neither is what opens the device in the end: native/verbs_api.c does, by the name
that is chosen here, as pyverbs gives none of its objects away to native code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memfaas.errors import FabricUnavailable

FOLDER = Path("/sys/class/infiniband")
Kind = Literal["InfiniBand", "RoCE v1", "RoCE v2"]

_GETS_PYVERBS = "sudo apt-get install python3-pyverbs"
_DISTRIBUTION = Path("/usr/lib/python3/dist-packages")
"""Where Debian puts pyverbs, which a virtual environment does not see."""
_ACTIVE = 4
_STATES = {1: "down", 2: "initializing", 3: "armed", _ACTIVE: "active", 5: "active, deferred"}
_ETHERNET = 2
_ROCE_V2 = 2
_MOST_GIDS = 256


@dataclass(frozen=True)
class Gid:
    """One address of a port."""

    index: int
    address: str
    kind: Kind

    @property
    def is_ipv4(self) -> bool:
        return ipaddress.IPv6Address(self.address).ipv4_mapped is not None


@dataclass(frozen=True)
class Port:
    """One port, with those of its addresses that are set."""

    number: int
    state: str
    """`active`, or what it is instead."""
    link_layer: Literal["InfiniBand", "Ethernet"]
    gids: tuple[Gid, ...]

    def best_gid(self) -> Gid | None:
        """On Ethernet one of RoCE v2, which is routed, and rather by an IPv4 address."""
        if self.link_layer == "InfiniBand":
            return self.gids[0] if self.gids else None
        good = [gid for gid in self.gids if gid.kind == "RoCE v2"]
        return next((gid for gid in good if gid.is_ipv4), good[0] if good else None)


@dataclass(frozen=True)
class Device:
    """One RDMA device."""

    name: str
    ports: tuple[Port, ...]


# --- the choice -----------------------------------------------------------------------------------


def local_device(wanted: str = "") -> str:
    """What `chosen_device` gives, or empty where that would raise FabricUnavailable."""
    try:
        return chosen_device(wanted)
    except FabricUnavailable:
        return ""


def chosen_device(wanted: str = "") -> str:
    """The device, port and address to use, as NAME:PORT:GID. Raises FabricUnavailable, which says why there is none."""
    return choose(read_kernel(), wanted)


def choose(devices: Sequence[Device], wanted: str = "") -> str:
    """The first active port with RoCE v2 or InfiniBand, within what `wanted` leaves open: NAME[:PORT[:GID]].

    Raises FabricUnavailable with the reason why none can be used.
    """
    name, port, index = (*wanted.split(":"), "", "")[:3]
    named = [device for device in devices if name in ("", device.name)]
    if not named:
        there = ", ".join(device.name for device in devices)
        missing = f"this node has no RDMA device {name}" if name else "this node has no RDMA device"
        raise FabricUnavailable(f"verbs: {missing}{f'; it has {there}' if there else ''}")
    ports = [(device, one) for device in named for one in device.ports if port in ("", str(one.number))]
    if not ports:
        raise FabricUnavailable(f"verbs: RDMA device {named[0].name} has no port {port or 'at all'}")
    reasons = []
    for device, one in ports:
        label = f"port {one.number} of RDMA device {device.name}"
        gid = one.best_gid() if not index else next((gid for gid in one.gids if str(gid.index) == index), None)
        if one.state != "active":
            reasons.append(f"{label} is {one.state}")
        elif gid is None:
            reasons.append(f"{label} has no {f'GID {index}' if index else 'address of RoCE v2 or InfiniBand'}")
        else:
            return f"{device.name}:{one.number}:{gid.index}"
    raise FabricUnavailable(f"verbs: {', '.join(reasons)}")


# --- what there is, by the kernel -------------------------------------------------------------------


def read_kernel(folder: Path = FOLDER) -> list[Device]:
    """All devices as the kernel knows them."""
    return [
        Device(device.name, tuple(_kernel_port(port) for port in _numbered(device / "ports")))
        for device in sorted(folder.glob("*"))
    ]


def _kernel_port(port: Path) -> Port:
    number, _, state = _text(port / "state").partition(":")
    return Port(
        number=int(port.name),
        state=_STATES.get(int(number), state.strip().lower()) if number.isdigit() else "gone",
        link_layer="InfiniBand" if _text(port / "link_layer") == "InfiniBand" else "Ethernet",
        gids=tuple(_kernel_gids(port)),
    )


def _kernel_gids(port: Path) -> Iterator[Gid]:
    ethernet = _text(port / "link_layer") != "InfiniBand"
    for entry in _numbered(port / "gids"):
        address = _text(entry)
        if address.strip("0:"):
            kind = _text(port / "gid_attrs/types" / entry.name)
            yield Gid(
                int(entry.name),
                str(ipaddress.IPv6Address(address)),
                "RoCE v2" if kind == "RoCE v2" else "RoCE v1" if ethernet else "InfiniBand",
            )


def _numbered(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.glob("*") if entry.name.isdigit()), key=lambda entry: int(entry.name))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it is not set, or was unplugged just now
        return ""


# --- what there is, by pyverbs ----------------------------------------------------------------------


@dataclass(frozen=True)
class Ability:
    """What a device can do, by its own word."""

    firmware: str
    largest_region: int
    """Bytes that can be registered in one piece."""
    regions: int
    queue_pairs: int
    reads: int
    """READs and atomics under way at once, that it answers."""
    atomics: bool


@dataclass(frozen=True)
class Found:
    """A device that programs can open."""

    device: Device
    ability: Ability


class PyverbsMissing(ImportError):
    """pyverbs cannot be used. `remedy` is a command that mends it."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


def load_pyverbs() -> Any:
    """The module pyverbs.device. Raises PyverbsMissing, which says which version is where and what to install."""
    try:
        return importlib.import_module("pyverbs.device")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pyverbs":
            raise
        beside = _DISTRIBUTION / "pyverbs"
        text = f"pyverbs is not installed for this Python; libibverbs.so.1 is of rdma-core {libibverbs_version()}"
        remedy = _GETS_PYVERBS
        if beside.is_dir():
            text += f", and so is {beside}, which this Python does not see"
            remedy = f"ln -s {beside} $(python -c 'import site; print(site.getsitepackages()[0])')"
        raise PyverbsMissing(text, remedy) from error
    except ImportError as error:
        raise PyverbsMissing(
            f"pyverbs {pyverbs_version()} does not match the system's rdma-core {libibverbs_version()} "
            f"(libibverbs.so.1): {error}",
            f"pip uninstall pyverbs; {_GETS_PYVERBS}",
        ) from error


def discover() -> list[Found]:
    """All devices that programs can open, asked through pyverbs. Raises PyverbsMissing and FabricUnavailable."""
    library = load_pyverbs()
    try:
        names = sorted(_decoded(device.name) for device in library.get_device_list())
        return [_ask(library, name) for name in names]
    except Exception as error:  # pyverbs has exceptions of its own, and they changed their names
        if type(error).__module__.split(".")[0] != "pyverbs":
            raise
        raise FabricUnavailable(f"verbs: {error}") from error


def _ask(library: Any, name: str) -> Found:
    with contextlib.closing(library.Context(name=name)) as context:
        about = context.query_device()
        entries = context.query_gid_table(_MOST_GIDS * about.phys_port_cnt)
        ports = tuple(_asked_port(context, number, entries) for number in range(1, about.phys_port_cnt + 1))
        ability = Ability(
            firmware=_decoded(about.fw_version),
            largest_region=about.max_mr_size,
            regions=about.max_mr,
            queue_pairs=about.max_qp,
            reads=about.max_qp_rd_atom,
            atomics=about.atomic_caps != 0,
        )
        return Found(Device(name, ports), ability)


def _asked_port(context: Any, number: int, entries: Sequence[Any]) -> Port:
    about = context.query_port(number)
    ethernet = about.link_layer == _ETHERNET
    gids = [entry for entry in entries if entry.port_num == number]
    return Port(
        number=number,
        state=_STATES.get(about.state, "gone"),
        link_layer="Ethernet" if ethernet else "InfiniBand",
        gids=tuple(
            Gid(
                entry.gid_index,
                str(ipaddress.IPv6Address(entry.gid_str())),
                "RoCE v2" if entry.gid_type == _ROCE_V2 else "RoCE v1" if ethernet else "InfiniBand",
            )
            for entry in sorted(gids, key=lambda entry: entry.gid_index)
        ),
    )


def _decoded(text: bytes | str) -> str:
    return text.decode() if isinstance(text, bytes) else text


# --- versions ---------------------------------------------------------------------------------------


def libibverbs_version() -> str:
    """The release of rdma-core that the system's libibverbs.so.1 is of. Raises FabricUnavailable."""
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        raise FabricUnavailable(f"verbs: libibverbs.so.1 cannot be loaded: {error}") from error
    mapped = re.search(r"(/\S*/libibverbs[^/\s]*\.so\.1\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return release_of(Path(mapped[1]).name) if mapped else "unknown"


def release_of(library: str) -> str:
    """`libibverbs.so.1.14.44.0` is of release 44.0."""
    match = re.search(r"\.so\.1\.\d+\.(\d+\.\d+)$", library)
    return match[1] if match else "unknown"


def pyverbs_version() -> str:
    """Of the pyverbs that would be imported; distributions' own packages do not always say theirs."""
    try:
        return importlib.metadata.version("pyverbs")
    except importlib.metadata.PackageNotFoundError:
        return "(a package of the distribution)"
