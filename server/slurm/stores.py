"""What burst_buffer.lua calls: `python -m memfaas.server.slurm.stores WHAT ...`, on the controller.

    pools FILE             say in FILE how much memory there is for jobs' stores
    setup JOB UID BYTES    make the store of a job
    teardown JOB           delete it

A job's store is `slurm-JOB`, and belongs to the tenant that its user is. Whose it is, and how many bytes
Slurm counts for it, stays in a file of the state folder from before the store is made until it is deleted:
Slurm names no user at the end, and the broker may be away then. Such a store is deleted the next time that
the pools are read.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path

import trio

from memfaas import auth
from memfaas.addresses import Address
from memfaas.errors import CapacityError, MemfaasError, UnknownStore
from memfaas.messages import (
    CloseSession,
    DeleteStore,
    Done,
    OpenSession,
    OpenStore,
    SessionOpened,
    Status,
    StatusReport,
    StoreOpened,
)
from memfaas.server.placement import lease_bytes
from memfaas.server.slurm import ask, keys
from memfaas.units import MIB

POOL = "memfaas"
GRANULE = 16 * MIB
"""Slurm rounds what jobs ask for up to a multiple of this."""
_ANSWER_S = 40.0
"""A new store may wait for donors that are on their way back."""
_OVER = ".over"


def store_of(job: str) -> str:
    return f"slurm-{job}"


class Stores:
    """The stores of jobs, as the broker at `address` has them. `state` is a folder of our own."""

    def __init__(self, address: Address, secret: bytes, state: Path) -> None:
        self._address = address
        self._secret = secret
        self._state = state

    async def write_pools(self, file: Path) -> None:
        """Says what the pool has, as Slurm wants it. Raises MemfaasError, OSError."""
        self._state.mkdir(exist_ok=True, mode=0o700)
        await self._delete_leftovers()
        async with ask.broker(self._address, auth.Credentials.of_tenant(self._secret, auth.OPERATOR)) as channel:
            report = await channel.request(Status(), StatusReport, _ANSWER_S)
        # The quantity is a number of granules.
        pool = {"id": POOL, "quantity": quantity(report, self._given()) // GRANULE, "granularity": GRANULE}
        draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
        draft.write_text(json.dumps({"pools": [pool]}))
        draft.replace(file)

    async def set_up(self, job: str, uid: int, size: int) -> None:
        """Makes the store of a job. Raises MemfaasError, OSError."""
        tenant = keys.tenant_of(uid)
        self._state.mkdir(exist_ok=True, mode=0o700)
        draft = self._state / f".{job}.{secrets.token_hex(4)}"
        draft.write_text(f"{tenant}\n{size}")
        draft.replace(self._state / job)
        request = OpenStore(name=store_of(job), size=size, persistent=True)
        async with ask.broker(self._address, auth.Credentials.of_tenant(self._secret, tenant)) as channel:
            await channel.request(OpenSession(session=secrets.token_bytes(16)), SessionOpened, _ANSWER_S)
            opened = await channel.request(request, StoreOpened, _ANSWER_S)
            await channel.request(CloseSession(), Done, _ANSWER_S)
        if opened.spec.size < size:
            # A job that starts anew may find the one that it had. It has its size; a stranger's may not.
            raise CapacityError(f"{tenant} has a smaller store {store_of(job)} already")

    async def tear_down(self, job: str) -> None:
        """Deletes the store of a job, if it has one. What cannot be deleted now is deleted later.

        Raises MemfaasError, OSError.
        """
        try:
            (self._state / job).rename(self._state / f"{job}{_OVER}")
        except FileNotFoundError:
            return
        await self._delete(job)

    def _given(self) -> dict[tuple[str, str], int]:
        """By tenant and name of each job's store: bytes that Slurm subtracts for it."""
        given = {}
        for path in self._state.iterdir():
            if path.name.isdigit():
                try:
                    tenant, size = path.read_text().split()
                except FileNotFoundError:  # its job has ended meanwhile
                    continue
                given[tenant, store_of(path.name)] = int(size)
        return given

    async def _delete_leftovers(self) -> None:
        for path in self._state.glob(f"*{_OVER}"):
            await self._delete(path.name.removesuffix(_OVER))

    async def _delete(self, job: str) -> None:
        record = self._state / f"{job}{_OVER}"
        credentials = auth.Credentials.of_tenant(self._secret, record.read_text().split()[0])
        async with ask.broker(self._address, credentials) as channel:
            await channel.request(OpenSession(session=secrets.token_bytes(16)), SessionOpened, _ANSWER_S)
            try:
                await channel.request(DeleteStore(name=store_of(job)), Done, _ANSWER_S)
            except UnknownStore:
                pass  # its user has deleted it, or it was never made
            await channel.request(CloseSession(), Done, _ANSWER_S)
        record.unlink(missing_ok=True)


def quantity(report: StatusReport, given: dict[tuple[str, str], int]) -> int:
    """Bytes for jobs' stores in all, those that are in use included: Slurm subtracts what it has given away.

    given: what it subtracts for each job's store, by tenant and name. Other stores may have such a name, too.
    """
    free = sum(max(0, one.memory.offered - one.memory.leased) for one in report.donors if one.connected)
    used = sum(given.get((one.spec.tenant, one.spec.name), 0) for one in report.stores)
    # A store takes more than it holds: its index is in the lent memory, too.
    return free * GRANULE // lease_bytes("shard", GRANULE) + used


async def _run(options: argparse.Namespace, stores: Stores) -> None:
    match options.what:
        case "pools":
            await stores.write_pools(options.file)
        case "setup":
            await stores.set_up(options.job, options.uid, options.size)
        case "teardown":
            await stores.tear_down(options.job)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="memfaas.server.slurm.stores")
    ask.add_options(parser)
    parser.add_argument("--state", type=Path, required=True, help="folder in which to keep whose stores there are")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("pools").add_argument("file", type=Path)
    setup = commands.add_parser("setup")
    setup.add_argument("job", type=_job)
    setup.add_argument("uid", type=int)
    setup.add_argument("size", type=int)
    commands.add_parser("teardown").add_argument("job", type=_job)
    return parser.parse_args()


def _job(text: str) -> str:
    if not text.isdigit():  # it becomes a file's name
        raise argparse.ArgumentTypeError(f"{text!r} is no job of Slurm")
    return text


def main() -> None:
    """Exit status 0, or 1 and the reason on the standard output, which Slurm shows to the job's user."""
    options = _options()
    try:
        trio.run(_run, options, Stores(options.broker, ask.read_secret(options), options.state))
    except (MemfaasError, OSError) as error:
        print(f"memfaas: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
