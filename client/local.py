"""A cluster of real processes on this machine, for trying memfaas out and for tests."""

from __future__ import annotations

import atexit
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from memfaas import auth, config
from memfaas.addresses import Address, parse_address
from memfaas.errors import TransportError, UsageError

START_S = 30.0
STOP_S = 10.0
_TOKEN = "MEMFAAS_LOCAL_CLUSTER"
"""Environment variable by which a cluster's processes are known, whoever their parent is now."""
_LONGEST_BASE = 40
"""Bytes: a Unix socket's path is short."""
_POLL_S = 0.01
_DISK = Path("/var/tmp")
"""For files without a name. The usual folder for temporary files may be memory."""
SPILL: Literal["spill"] = "spill"
"""Name of the donor whose memory is on the disk."""


class LocalCluster:
    """One broker and some donors, started when it is made and stopped by `stop` or at the end of `with`.

    donors: how many.
    memory: what each lends: bytes, or like "512MiB".
    spill: what one more donor, named "spill", lends of the disk: in files, chosen last.
    headroom: what must stay available on this machine, whatever the donors lend.
    lease_ttl: how long leases live that are not renewed: seconds, or like "30s".

    The processes end when this process ends, however it does, and `stop` leaves no file behind.
    Raises UsageError, and TransportError when a process does not start.
    """

    def __init__(
        self,
        donors: int = 1,
        memory: str | int = "512MiB",
        headroom: str | int = "64MiB",
        lease_ttl: str | float = "30s",
        spill: str | int | None = None,
    ) -> None:
        if donors < 0:
            raise UsageError(f"{donors} donors: it must be 0 or more")
        # Checked here, so that what makes no sense is not found out by a process that does not start.
        checked = config.DonorSettings(memory=memory, headroom=headroom)  # type: ignore[arg-type]
        self._memory, self._headroom = checked.memory, checked.headroom
        self._spill = None if spill is None else config.DonorSettings(memory=spill).memory  # type: ignore[arg-type]
        self._lease_ttl = config.BrokerSettings(lease_ttl=lease_ttl).lease_ttl  # type: ignore[arg-type]
        self._owner = os.getpid()
        self._token = secrets.token_hex(16)
        base = tempfile.gettempdir()
        self._folder = Path(tempfile.mkdtemp(prefix="memfaas-", dir=base if len(base) <= _LONGEST_BASE else "/tmp"))
        self._processes: dict[str, _Process] = {}
        self._address = Address("127.0.0.1", 0, self._folder / "secret")
        _clusters.add(self)
        try:
            auth.create_secret(self._folder / "secret")
            self.restart_broker()
            names = [self.donor_name(index) for index in range(donors)]
            if self._spill is not None:
                names.append(SPILL)
            for name in names:
                self._launch_donor(name)
            for name in names:
                self._processes[name].wait_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def address(self) -> str:
        """For `memfaas.connect` and MEMFAAS_BROKER: it names the secret file, too."""
        return str(self._address)

    @property
    def folder(self) -> Path:
        """Where the secret, the logs and the sockets of the cluster are."""
        return self._folder

    @staticmethod
    def donor_name(index: int | Literal["spill"]) -> str:
        return SPILL if index == SPILL else f"donor{index}"

    def __repr__(self) -> str:
        donors = len(self._processes) - 1
        return f"<LocalCluster at {self._address.host}:{self._address.port}: {donors} donors>"

    # --- for tests: processes that die and come back ------------------------------------------------------

    @property
    def broker_pid(self) -> int:
        return self._processes["broker"].pid

    def donor_pid(self, index: int | Literal["spill"]) -> int:
        """Of the donor's agent."""
        return self._processes[self.donor_name(index)].pid

    def kill_broker(self) -> None:
        """As by `kill -9`."""
        self._processes["broker"].kill()

    def restart_broker(self) -> None:
        """Starts it at the address that it had; ends the running one first."""
        if "broker" in self._processes:
            self._processes["broker"].stop(STOP_S)
        broker = self._launch(
            "broker",
            listen_host=self._address.host,
            listen_port=self._address.port,
            secret_file=self._address.secret_file,
            lease_ttl=self._lease_ttl,
            folder=self._folder,
        )
        facts = broker.wait_ready()
        self._address = Address(self._address.host, parse_address(facts["address"]).port, self._address.secret_file)

    def kill_donor(self, index: int | Literal["spill"]) -> None:
        """Kills the agent, as by `kill -9`. Its memory functions go on serving."""
        self._processes[self.donor_name(index)].kill()

    def restart_donor(self, index: int | Literal["spill"]) -> None:
        """Starts the agent again; ends the running one first, and then its memory is lost."""
        name = self.donor_name(index)
        self._processes[name].stop(STOP_S)
        self._launch_donor(name)
        self._processes[name].wait_ready()

    def _launch_donor(self, name: str) -> None:
        kind: dict[str, Any] = {"memory": self._memory}
        if name == SPILL:
            kind = {"memory": self._spill, "backing": _DISK}
        self._launch(
            "donor",
            broker=self._address,
            name=name,
            **kind,
            headroom=self._headroom,
            listen_host="127.0.0.1",
            runtime_dir=self._folder / "run",
        )

    def _launch(self, command: str, **settings: Any) -> _Process:
        name = settings.get("name", command)
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        variables = {variable for role in config.ROLES for option in config.options(role) for variable in option.env}
        environment = {key: value for key, value in os.environ.items() if key not in variables}
        process = _Process(
            name,
            # -P: whatever lies in the current folder is not what we want to import.
            [sys.executable, "-P", "-m", "memfaas.cli", "--config", os.devnull, "-v", command, "--until-eof", *flags],
            {**environment, _TOKEN: self._token},
            self._folder / f"{name}.log",
        )
        self._processes[name] = process
        return process

    # --- the end ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stops all processes and removes all files. Stopping twice does nothing."""
        if self._owner != os.getpid():
            return  # we were forked from whoever owns it
        _clusters.discard(self)
        deadline = time.monotonic() + STOP_S
        for process in self._processes.values():
            process.tell_to_stop()
        for process in self._processes.values():
            process.stop(max(0.0, deadline - time.monotonic()))
        try:
            self._kill_orphans()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # the secret is in it

    def _kill_orphans(self) -> None:
        """Memory functions outlive an agent that was killed; here nobody will come back for them."""
        deadline = time.monotonic() + STOP_S
        while orphans := _processes_with(f"{_TOKEN}={self._token}"):
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TransportError(f"processes {orphans} of the local cluster do not end")
            time.sleep(_POLL_S)

    def let_go_after_fork(self) -> None:
        for process in self._processes.values():
            process.close_lifeline()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Process:
    """A broker or donor that ends when its standard input does, so that none outlives us."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._name = name
        self._log = log
        with log.open("ab") as errors:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us alone: we stop it
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self) -> dict[str, Any]:
        """The facts that it prints once it can be used."""
        line = _read_line(self._stream(self._child.stdout), START_S)
        try:
            facts: dict[str, Any] = json.loads(line)
            if not facts["ready"]:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            self.kill()
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise TransportError(f"the {self._name} did not start: {said[-1] if said else 'it said nothing'}") from None
        return facts

    @staticmethod
    def _stream(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None
        return stream

    def tell_to_stop(self) -> None:
        if self._child.poll() is None:
            self._child.terminate()

    def stop(self, timeout_s: float) -> None:
        self.tell_to_stop()
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self.close_lifeline()
        self._stream(self._child.stdout).close()

    def close_lifeline(self) -> None:
        self._stream(self._child.stdin).close()


def _read_line(stream: IO[bytes], timeout_s: float) -> bytes:
    """As far as it comes by then; nothing when the stream ends."""
    line = b""
    deadline = time.monotonic() + timeout_s
    waiting = select.poll()
    waiting.register(stream, select.POLLIN)
    while not line.endswith(b"\n"):
        readable = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
        piece = os.read(stream.fileno(), 4096) if readable else b""
        if not piece:
            break
        line += piece
    return line


def _processes_with(variable: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # ended meanwhile, or another user's
                continue
            if variable.encode() in variables:
                found.append(int(folder.name))
    return found


_clusters: set[LocalCluster] = set()


def _let_go() -> None:
    for cluster in list(_clusters):
        cluster.let_go_after_fork()


def _stop_all() -> None:
    for cluster in list(_clusters):
        cluster.stop()


os.register_at_fork(after_in_child=_let_go)
atexit.register(_stop_all)
