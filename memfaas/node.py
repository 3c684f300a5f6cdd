"""What this node's kernel says of memory and gives to it: one answer for the donor, the doctor and the benchmarks."""

from __future__ import annotations

from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
SHMEM_ENABLED = HUGE_PAGES / "shmem_enabled"
"""Writing `advise` to it, as root, lets leases have 2 MiB pages."""
_GIVE = {"always", "within_size", "advise", "force"}
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "gpfs", "9p", "afs", "fuse.sshfs")
"""Where a spill donor keeps nothing: what is there takes memory, or goes over the network."""


def mem_available(proc: Path = Path("/proc")) -> int:
    """Bytes that the kernel could give to programs without swapping, as it reckons."""
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{proc}/meminfo has no MemAvailable")  # kernels before 3.14


def huge_page_choice(folder: Path = HUGE_PAGES) -> str | None:
    """The kernel's choice for shared memory in pages of 2 MiB, like `advise` or `never`; None if it has none."""
    chosen = _chosen(folder / "hugepages-2048kB/shmem_enabled")
    return _chosen(folder / "shmem_enabled") if chosen in (None, "inherit") else chosen


def gives_huge_pages(folder: Path = HUGE_PAGES) -> bool:
    """Whether the node gives 2 MiB pages to memory that asks for them.

    Without, giving memory back takes about fifty times as long: some 5 GiB/s instead of some 300.
    """
    return huge_page_choice(folder) in _GIVE


def file_system_of(descriptor: int) -> str | None:
    """The type of the file system that an open file is in, like `ext4`; None if that cannot be told."""
    try:
        facts = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines())
        mount = facts["mnt_id"].strip()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            if left.split()[0] == mount:
                return right.split()[0]
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return None


def _chosen(path: Path) -> str | None:
    """The word in brackets, of a file like `always [advise] never`."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return next((word[1:-1] for word in words if word.startswith("[")), None)
