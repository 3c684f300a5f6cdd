"""Runs `memfaas bench verbs` in the virtual machine, where there is an RDMA device in software.

python -m tests.vm.bench [what the command takes, but for --output]; `make bench-verbs` calls it. The figures land
in results/ of this machine. Both sides of an operation share two emulated processors, so their ratios are of more
worth than the times.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from memfaas.bench.verbs import built
from memfaas.fabric.devices import local_device
from tests.vm import machine

_ROOT = Path(__file__).parent.parent.parent
_RESULTS = "results"
_LIMIT_S = 4 * 3600.0


def main(arguments: list[str]) -> int:
    """The command's exit status; 255 when the machine did not come to its end."""
    if device := local_device():
        print(f"this machine has an RDMA device of its own, {device}: no virtual machine is needed")
        return 0
    if reason := machine.missing():
        print(reason, file=sys.stderr)
        return 255
    print("memfaas bench verbs runs in a virtual machine, which takes some minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="mf-vm-", dir="/tmp") as name:
        built.build(Path(name))  # a compiler takes a minute inside
        command = [sys.executable, "-m", "memfaas.cli", "bench", "verbs", "--output", str(machine.SHARED / _RESULTS)]
        outcome = machine.run(
            [
                "bash",
                "-o",
                "pipefail",
                "-c",
                '"$@" 2>&1 | cat',
                "-",
                *command,
                *arguments,
            ],  # no progress on the console
            _ROOT,
            Path(name),
            environment={built.BUILT: str(machine.SHARED)},
            cpus=2,
            memory="2G",
            timeout_s=_LIMIT_S,
        )
        print(outcome.console)
        for figures in Path(name, _RESULTS).glob("*.json"):
            kept = _ROOT / _RESULTS / figures.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(figures, kept)
            print(f"kept: {kept.relative_to(_ROOT)}")
    return 255 if outcome.status is None else outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
