"""What Slurm runs as a job starts and ends: `python -m memfaas.server.slurm.hook WHICH ...`.

    prolog-slurmctld   once a job, on the controller: its nodes are known, and it has not begun
    prolog             on each of its nodes, before its first step
    epilog             on each of its nodes, when it has ended
    epilog-slurmctld   once, on the controller, when it has ended

Slurm takes a hook that fails, or that takes too long, as a reason not to start the job, and after a
Prolog that fails it starts no more jobs on the node. So the exit status is always 0, and what went wrong is
logged to the standard error and to syslog.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

import trio

from memfaas import auth
from memfaas.addresses import Address
from memfaas.errors import MemfaasError
from memfaas.local_agent import SOCKET
from memfaas.server.slurm import ask, hosts, keys, reclaim

_SYSLOG = Path("/dev/log")
_DAEMON = 3 << 3
_SEVERITY = {logging.INFO: 6, logging.WARNING: 4}
_ERROR = 3
"""Of syslog: whom a message comes from, and how bad it is."""

logger = logging.getLogger(__name__)


def main() -> None:
    options = _options()
    _log_to_syslog()
    try:
        trio.run(_within_limit, options)
    except Exception:  # a fault of ours; the job is not to suffer from it
        logger.exception("the hook %s failed", options.which)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="memfaas.server.slurm.hook")
    parser.add_argument("which", choices=["prolog-slurmctld", "prolog", "epilog", "epilog-slurmctld"])
    ask.add_options(parser)
    parser.add_argument("--deadline", type=float, required=True, help="seconds that a donor has to free memory")
    parser.add_argument("--limit", type=float, required=True, help="seconds that this hook may take")
    parser.add_argument("--runtime-dir", type=Path, required=True, help="runtime folder of the donors")
    parser.add_argument("--keys", type=Path, help="folder for the key files of jobs; without it there are none")
    return parser.parse_args()


class Syslog(logging.Handler):
    """Unlike Python's own, it never waits for a syslogd that hangs: what that does not take is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        text = f"<{_DAEMON | _SEVERITY.get(record.levelno, _ERROR)}>{self.format(record)}"
        with suppress(OSError):
            self._socket.sendto(text.encode(), str(self._path))

    def close(self) -> None:
        self._socket.close()
        super().close()


def _log_to_syslog() -> None:
    form = logging.Formatter("memfaas: %(message)s")
    for handler in (logging.StreamHandler(), Syslog(_SYSLOG)):
        handler.setFormatter(form)
        logging.getLogger().addHandler(handler)
    logging.getLogger("memfaas").setLevel(logging.INFO)


async def _within_limit(options: argparse.Namespace) -> None:
    with trio.move_on_after(options.limit) as scope:
        await _run(options)
    if scope.cancelled_caught:
        logger.warning("the hook %s gave up after its limit of %g s", options.which, options.limit)


async def _run(options: argparse.Namespace) -> None:
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        logger.warning("the hook %s runs for no job: SLURM_JOB_ID is %r", options.which, job)
        return
    try:
        match options.which:
            case "prolog-slurmctld":
                address, credentials = _broker(options)
                await reclaim.on_controller(address, credentials, job, _nodes(), options.deadline)
            case "epilog-slurmctld":
                address, credentials = _broker(options)
                await reclaim.lend_on_controller(address, credentials, job, _nodes())
            case "prolog":
                _write_key(options, job)
                await _on_node(options, job)
            case "epilog":
                _remove_key(options, job)
                await _on_node(options, job)
    except MemfaasError as error:
        logger.warning("job %s: %s: %s", job, options.which, error)


async def _on_node(options: argparse.Namespace, job: str) -> None:
    node = os.environ.get("SLURMD_NODENAME", "")
    socket = options.runtime_dir / node / SOCKET
    if not socket.exists():
        return  # this node lends nothing
    if options.which == "prolog":
        await reclaim.on_node(socket, node, job, _nodes(), options.deadline)
    else:
        await reclaim.lend_on_node(socket, node, job)


def _nodes() -> list[str]:
    """Of the job: in a Prolog, Slurm 22.05 calls them otherwise. Raises ProtocolError."""
    return hosts.expand(os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST", ""))


def _broker(options: argparse.Namespace) -> tuple[Address, auth.Credentials]:
    return options.broker, auth.Credentials.of_tenant(ask.read_secret(options), auth.OPERATOR)


def _write_key(options: argparse.Namespace, job: str) -> None:
    """Before anything that may take long; without it the job finds its store, but cannot open it."""
    if options.keys is None:
        return
    try:
        uid, gid = int(os.environ["SLURM_JOB_UID"]), int(os.environ["SLURM_JOB_GID"])
    except (KeyError, ValueError):
        logger.warning("job %s: no key file: Slurm did not say whose job it is", job)
        return
    try:
        keys.write(options.keys, job, uid, gid, ask.read_secret(options))
    except MemfaasError as error:
        logger.warning("job %s: no key file: %s", job, error)


def _remove_key(options: argparse.Namespace, job: str) -> None:
    if options.keys is None:
        return
    try:
        keys.remove(options.keys, job)
    except OSError as error:
        logger.warning("job %s: its key file stays: %s", job, error)


if __name__ == "__main__":
    main()
