"""A virtual machine with Debian's kernel, on this machine's own files.

It is emulated, so that it runs wherever qemu does, also inside another virtual machine; it takes a few
seconds to boot. What its programs write is gone with it, but for what they put into /run/vm.
"""

from __future__ import annotations

import lzma
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARED = Path("/run/vm")
"""Inside the machine: the folder that is also the host's."""
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memfaas"
"""Where `.ci/vm-files` puts what is for the machine alone."""
KERNEL = _CACHE / "vm"
_PYVERBS = _CACHE / "pyverbs/usr/lib/python3/dist-packages"
_HERE = Path(__file__).parent
_SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_PROGRAMS = ("busybox", "cpio", "modprobe", "qemu-system-x86_64")
_APPLETS = ("cat", "insmod", "mkdir", "mount", "sh", "switch_root")
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""What it takes to get at the host's files."""
_XZ = b"\xfd7zXZ\x00"


@dataclass(frozen=True)
class Outcome:
    """How a run of the machine ended."""

    status: int | None
    """Of the command; None when it did not end: the kernel panicked, or the time was over."""
    console: str
    """All that the kernel and the command have written."""


def missing() -> str:
    """Why no machine can be started here; empty when one can."""
    if platform.machine() != "x86_64":
        return f"the virtual machine is for x86-64, not {platform.machine()}"
    absent = [program for program in _PROGRAMS if shutil.which(program, path=_SYSTEM_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if (KERNEL / "version").exists() else "no kernel for the virtual machine; `make test` fetches it"


def run(
    command: Sequence[str],
    folder: Path,
    shared: Path,
    *,
    environment: Mapping[str, str],
    cpus: int,
    memory: str,
    timeout_s: float,
) -> Outcome:
    """Boots the machine, runs the command in this folder, and switches the machine off.

    `shared` is a folder of the host, which the machine sees as /run/vm. `memory` is as qemu takes it.
    """
    variables = {"PYTHONPATH": str(_PYVERBS), **environment}
    settings = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines = [*settings, f"cd {shlex.quote(str(folder))} || exit", shlex.join(command)]
    (shared / "command").write_text("\n".join(lines) + "\n")
    (shared / "kernel").write_text(str(KERNEL))
    shutil.copy(_HERE / "main.sh", shared)
    with tempfile.TemporaryDirectory(prefix="mf-vm-", dir="/tmp") as name:
        disk = _memory_disk(Path(name))
        image = _kernel_image(Path(name))
        console = Path(name, "console")
        with console.open("wb") as output:
            _emulate(image, disk, shared, output.fileno(), cpus, memory, timeout_s)
        status = shared / "status"
        return Outcome(
            status=int(status.read_text()) if status.exists() else None,
            console=console.read_text(errors="replace"),
        )


def _emulate(image: Path, disk: Path, shared: Path, output: int, cpus: int, memory: str, timeout_s: float) -> None:
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", str(cpus), "-m", memory),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
            *("-fsdev", f"local,id=shared,path={shared},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=shared,mount_tag=shared"),
            *("-kernel", str(image), "-initrd", str(disk), "-append", "console=ttyS0 quiet panic=-1"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pass  # there is no status then
    finally:
        process.kill()
        process.wait()


def _kernel_image(folder: Path) -> Path:
    """The kernel itself: to boot what unpacks it first takes 6 s more when it is emulated."""
    version = (KERNEL / "version").read_text().strip()
    packed = KERNEL / "boot" / f"vmlinuz-{version}"
    data = packed.read_bytes()
    start = data.find(_XZ)
    if start < 0:
        return packed
    image = folder / "vmlinux"
    image.write_bytes(lzma.LZMADecompressor().decompress(data[start:]))
    return image


def _memory_disk(folder: Path) -> Path:
    """What the kernel starts with: a shell, `init.sh`, and the modules for the host's files."""
    root = folder / "disk"
    for name in ("bin", "dev", "lower", "modules", "proc", "root", "rw", "sys"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox", path=_SYSTEM_PATH)
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    for name in _APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    modules = _modules()
    for module in modules:
        shutil.copy(module, root / "modules")
    (root / "modules/order").write_text("".join(f"{module.name}\n" for module in modules))
    shutil.copy(_HERE / "init.sh", root / "init")
    (root / "init").chmod(0o755)
    disk = folder / "disk.cpio"
    names = "\n".join(str(path.relative_to(root)) for path in (root, *sorted(root.rglob("*"))))
    with disk.open("wb") as output:
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"], cwd=root, input=names.encode(), stdout=output, check=True
        )
    return disk


def _modules() -> list[Path]:
    """Files of the modules that are needed, each after those that it needs."""
    version = (KERNEL / "version").read_text().strip()
    found: dict[Path, None] = {}
    for name in _MODULES:
        lines = subprocess.run(
            ["modprobe", "--dirname", str(KERNEL), "--set-version", version, "--show-depends", name],
            env={**os.environ, "PATH": _SYSTEM_PATH},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        found.update((Path(line.split()[1]), None) for line in lines if line.startswith("insmod "))
    return list(found)
