"""The distributed dictionary of DragonHPC, in a runtime of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from memfaas.bench import processes
from memfaas.bench.peers.base import Site, System, missing, program, versions

_SCRIPT = Path(__file__).with_name("dragon_script.py")


class DragonDict(System):
    name = "DragonHPC DDict"
    kind = "peer"
    networked = True
    patience_s = 120.0

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None
        self._log = Path()

    def available(self) -> str | None:
        return missing(modules=["dragon"], programs=["dragon"])

    def detail(self) -> str:
        return (
            f"{versions('dragonhpc')}; one manager; stopped by a signal while others are measured, "
            "as its runtime keeps a core busy also when nobody asks"
        )

    def start(self, site: Site) -> None:
        self._log = site.scratch / "dragon.log"
        # The launcher knows scripts, not modules; client processes must be children of its runtime.
        argv = [program("dragon"), "--single-node-override", str(_SCRIPT)]
        argv += [self.name, str(site.door), str(site.pool), str(site.clients)]
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        # It leaves segments in /dev/shm when it is killed: it must end by itself, as it does when
        # the connections of its client processes end.
        self._launcher = processes.start(argv, self._log, dies_with_us=False, environment={"PATH": path})

    def connect(self, endpoint: str) -> Any:
        raise NotImplementedError("dragon_script makes the clients, in the processes of the runtime")

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def exited(self) -> str | None:
        if self._launcher is None or self._launcher.poll() is None:
            return None
        return f"its launcher ended with status {self._launcher.returncode}: {processes.tail(self._log)}"

    def stop(self) -> None:
        if self._launcher is None:
            return
        self.resume()
        if self._launcher.stdin is not None:
            self._launcher.stdin.close()
        try:
            self._launcher.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGTERM)
            try:
                self._launcher.wait(20)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._launcher.wait()
        self._launcher = None

    def _signal(self, number: int) -> None:
        """To all processes of the runtime: they are one process group."""
        if self._launcher is not None and self._launcher.poll() is None:
            os.killpg(os.getpgid(self._launcher.pid), number)
