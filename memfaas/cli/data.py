"""`memfaas put`, `get`, `ls`, `rm`: a store from the shell."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from memfaas.cli.options import load, settings_options
from memfaas.client.session import Session
from memfaas.client.store import Store
from memfaas.config import ClientSettings
from memfaas.errors import KeyAbsent, UnknownStore, UsageError
from memfaas.units import format_size, parse_size

DEFAULT_SIZE = "64MiB"


@contextmanager
def _opened(given: dict[str, Any]) -> Iterator[tuple[Session, str]]:
    """A session, and the name of the store to use."""
    settings = load(ClientSettings, given)
    with Session.open(settings) as session:
        yield session, settings.store


@click.command()
@click.argument("key")
@click.argument("file", default="-")
@click.option(
    "--size",
    metavar="SIZE",
    help=f"Size of the store, if there is none of that name and it has to be created.  [default: {DEFAULT_SIZE}]",
)
@settings_options(ClientSettings)
def put(key: str, file: str, size: str | None, **given: Any) -> None:
    """Store FILE, or the standard input, under KEY.

    The store is created if there is none of that name; it lives on until it is deleted with
    `memfaas rm --store NAME --all`.

    \b
    Examples:
        memfaas put results/run7 run7.h5
        tar c data | memfaas put --store backups --size 4GiB data.tar
    """
    with _source(file) as source, _opened(given) as (session, store):
        _create_or_open(session, store, size).put_from(os.fsencode(key), source)


def _create_or_open(session: Session, name: str, size: str | None) -> Store:
    try:
        return session.store(name)
    except UnknownStore:
        wanted = parse_size(size or DEFAULT_SIZE)
    made = session.store(name, size=wanted, persistent=True)
    click.echo(f"memfaas: created store {name!r} of {format_size(made.spec.size)}", err=True)
    return made


@contextmanager
def _source(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        source = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    with source:
        yield source


@click.command()
@click.argument("key")
@click.argument("file", default="-")
@settings_options(ClientSettings)
def get(key: str, file: str, **given: Any) -> None:
    """Write the value of KEY to FILE, or to the standard output.

    FILE appears when the value is complete. The exit status is 4 when there is no such key.

    \b
    Examples:
        memfaas get results/run7 copy.h5
        memfaas get --store backups data.tar | tar t
    """
    with _opened(given) as (session, store), _target(file) as target:
        session.store(store).get_to(os.fsencode(key), target)


@contextmanager
def _target(file: str) -> Iterator[BinaryIO]:
    """A file that gets its name when all went well, except for pipes, devices and the like."""
    if file == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as target:
                yield target
            return
        handle, draft = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as target:
            yield target
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


@click.command()
@click.argument("prefix", default="")
@click.option("-0", "--null", is_flag=True, help="Separate keys by a zero byte, as `xargs -0` takes them.")
@settings_options(ClientSettings)
def ls(prefix: str, null: bool, **given: Any) -> None:
    """List the keys that begin with PREFIX, sorted, one per line.

    \b
    Examples:
        memfaas ls results/
        memfaas ls --store backups -0 | xargs -0 -n 1 memfaas rm --store backups
    """
    with _opened(given) as (session, store):
        keys = sorted(session.store(store).keys(os.fsencode(prefix)))
    end = b"\0" if null else b"\n"
    sys.stdout.buffer.write(b"".join(key + end for key in keys))
    sys.stdout.buffer.flush()


@click.command()
@click.argument("keys", metavar="KEY...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Delete the whole store, and free its memory.")
@settings_options(ClientSettings)
def rm(keys: tuple[str, ...], everything: bool, **given: Any) -> None:
    """Delete keys, or with --all the whole store.

    The exit status is 4 when one of the keys did not exist; the others are deleted all the same.

    \b
    Examples:
        memfaas rm results/run6 results/run7
        memfaas rm --store backups --all
    """
    if bool(keys) == everything:
        raise click.UsageError("give either keys or --all")
    with _opened(given) as (session, store):
        if everything:
            session.delete_store(store)
            return
        opened = session.store(store)
        absent = [key for key in keys if not opened.delete(os.fsencode(key))]
    if absent:
        raise KeyAbsent(f"store {store!r} has no key {', '.join(map(repr, absent))}")
