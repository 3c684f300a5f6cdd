"""perftest, timed from outside: its own clock counts the cycles of a processor that may be emulated."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from memfaas.bench.verbs.bars import SkippedError
from memfaas.bench.verbs.ways import COUNTS
from memfaas.units import KIB

_LONGEST_S = 60.0


def perftest_us(program: str, device: str, size: int) -> float | None:
    """By two runs: what both take to start and connect falls out. None: to start took longer than all the rest."""
    few, many = COUNTS[size] * 2, COUNTS[size] * (50 if size < 64 * KIB else 10)
    us = (_seconds(program, device, size, many) - _seconds(program, device, size, few)) / (many - few) * 1e6
    return us if us > 0 else None


def _seconds(program: str, device: str, size: int, count: int) -> float:
    name, port, gid = device.split(":")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        control = str(probe.getsockname()[1])
    command = [program, "-d", name, "-i", port, "-x", gid, "-s", str(size), "-n", str(count), "-F", "-p", control]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    try:
        deadline = time.monotonic() + _LONGEST_S
        while not _listens(int(control)):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SkippedError(f"{program} does not start")
            time.sleep(0.01)
        start = time.perf_counter()
        done = subprocess.run([*command, "127.0.0.1"], timeout=_LONGEST_S, check=False, **quiet)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SkippedError(f"{program} ends with status {done.returncode}")
        return seconds
    except subprocess.TimeoutExpired as error:
        raise SkippedError(f"{program} takes longer than {_LONGEST_S:g} s") from error
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    """Without connecting, which would be taken for the client."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                return True
    return False
