"""C programs and libraries of the tests, compiled together with the native core's own sources."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

CORE = Path(__file__).parent.parent / "native"


def compile_with_core(source: Path, into: Path, flags: Sequence[str], *, without: Sequence[str] = ()) -> None:
    """`without`: files of the core that `source` includes, or replaces. Needs a checkout and gcc ($CC)."""
    core = [path for path in sorted(CORE.glob("*.c")) if path.name not in without]
    if not core:
        raise FileNotFoundError(f"no sources of the native core in {CORE}: this needs a checkout of memfaas")
    command = [*shlex.split(os.environ.get("CC", "gcc")), "-std=gnu11", "-pthread", "-g", *flags]
    done = subprocess.run(
        [*command, f"-I{CORE}", str(source), *map(str, core), "-o", str(into)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stdout}")
