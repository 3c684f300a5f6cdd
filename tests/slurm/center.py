"""A computing centre on this machine: munged, slurmctld and several slurmd of our own, on loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "squeue", "srun", "sbatch", "sinfo")
NODE_MIB = 8000
USER = 65534
"""Who submits jobs when it shall not be root: `nobody`."""
_START_S = 60.0
_JOB_S = 60.0
_STOP_S = 20.0

_CONFIGURATION = """
ClusterName=memfaas
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
KillWait=2
MessageTimeout=30
"""


class Center:
    """Starts all of Slurm when it is made; `stop`, or the end of `with`, ends it and removes its files.

    nodes: names.
    lines: more of slurm.conf, of which `{folder}` is the folder of this centre.
    prepare: is called with the folder before anything starts; what it returns is more of slurm.conf.
    """

    def __init__(self, nodes: list[str], prepare: Callable[[Path], str] = lambda _: "") -> None:
        self.nodes = nodes
        self._processes: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="mf-slurm-", dir="/tmp"))
        try:
            self.folder.chmod(0o755)  # those who submit jobs pass through
            (self.folder / "state").mkdir()
            self.configuration = self.folder / "slurm.conf"
            self.configuration.write_text(self._configure() + prepare(self.folder))
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> str:
        ports = _free_ports(len(self.nodes) + 1)
        host = socket.gethostname().split(".")[0]
        lines = [_CONFIGURATION.format(host=host, folder=self.folder, port=ports[0])]
        for node, port in zip(self.nodes, ports[1:], strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
                f"CPUs=2 RealMemory={NODE_MIB} State=UNKNOWN"
            )
        lines.append(f"PartitionName=batch Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n")
        return "\n".join(lines)

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {
            "socket": self.folder / "munge.socket",
            "key-file": key,
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munged.seed",
        }
        self._launch("munged", "--foreground", *(f"--{name}={path}" for name, path in files.items()))
        wait_for(files["socket"].exists, "munged listens", _START_S)
        self._launch("slurmctld", "-D", "-c", "-f", str(self.configuration))
        for node in self.nodes:
            self._launch("slurmd", "-D", "-f", str(self.configuration), "-N", node)
        wait_for(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle", _START_S, self.logs)

    def _launch(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment(),
                    cwd=self.folder,
                    start_new_session=True,
                )
            )

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MEMFAAS_BROKER"))}
        return {**kept, "SLURM_CONF": str(self.configuration)}

    def run(self, *command: str, user: int | None = None, timeout_s: float = _JOB_S) -> str:
        """Runs one of Slurm's commands, and returns what it prints."""
        done = subprocess.run(
            command,
            env=self.environment(),
            cwd=self.folder,
            user=user,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node to `idle`, `drained` and so on; nothing while the controller does not answer."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_ended(self, job: str) -> str:
        """The state in which the job ended, such as COMPLETED."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.job(job)["JobState"] in ended, f"job {job} ends", _JOB_S, self.logs)
        return self.job(job)["JobState"]

    def wait_idle(self) -> None:
        """Until no job runs, and all epilogs have ended."""
        wait_for(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle again", _JOB_S, self.logs)

    def logs(self) -> str:
        """The end of each log, for whoever has to find out why a test failed."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        )

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Center:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def missing() -> str:
    """Why Slurm cannot be started here; empty when it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def wait_for(met: Callable[[], object], what: str, timeout_s: float, explain: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain until {what}\n{explain()}"
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
