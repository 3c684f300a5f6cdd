"""The command line with a cluster: put, get, ls, rm, up, demo; each as a process of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

import memfaas
from memfaas.client.local import LocalCluster

pytestmark = pytest.mark.slow
MEMFAAS = [sys.executable, "-m", "memfaas.cli"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(donors=2, memory="256MiB") as cluster:
        yield cluster


@pytest.fixture
def run(cluster: LocalCluster) -> Iterator[Callable[..., subprocess.CompletedProcess[bytes]]]:
    environment = os.environ | {"MEMFAAS_BROKER": cluster.address}

    def run(*arguments: str, stdin: bytes = b"", **more: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*MEMFAAS, *arguments], input=stdin, capture_output=True, env=environment | more, timeout=60
        )

    yield run
    with memfaas.connect(cluster.address) as session:
        for store in session.stores():
            session.delete_store(store.spec.name)


Run = Callable[..., subprocess.CompletedProcess[bytes]]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background, which a test that fails does not wait for."""
    with subprocess.Popen([*MEMFAAS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            yield child
        except BaseException:
            child.terminate()
            raise


def good(done: subprocess.CompletedProcess[bytes]) -> bytes:
    assert done.returncode == 0, done.stderr
    return bytes(done.stdout)


def fails(done: subprocess.CompletedProcess[bytes], status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == b""
    assert done.stderr.startswith(b"memfaas: ")
    assert done.stderr.count(b"\n") == 1
    for word in words:
        assert word.encode() in done.stderr


def test_put_makes_the_default_store_and_get_reads_it(run: Run) -> None:
    first = run("put", "greeting", stdin=b"hello\n")
    good(first)
    assert first.stderr == b"memfaas: created store 'default' of 64 MiB\n"
    assert good(run("get", "greeting")) == b"hello\n"
    second = run("put", "greeting", "-", stdin=b"bye\n")
    assert (good(second), second.stderr) == (b"", b"")
    assert good(run("get", "greeting", "-")) == b"bye\n"


@pytest.mark.parametrize("size", [0, 1, 1000, 40 << 20])
def test_files_of_any_size_and_content_come_back(run: Run, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "in").write_bytes(content)
    good(run("put", "--store", "files", "--size", "128MiB", "k", str(tmp_path / "in")))
    good(run("get", "--store", "files", "k", str(tmp_path / "out")))
    assert (tmp_path / "out").read_bytes() == content
    good(run("put", "--store", "files", "piped", stdin=content))
    assert good(run("get", "--store", "files", "piped", "--fabric", "tcp")) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_get_that_fails_touches_no_file(run: Run, tmp_path: Path) -> None:
    good(run("put", "k", stdin=b"x"))
    (tmp_path / "kept").write_bytes(b"precious")
    fails(run("get", "absent", str(tmp_path / "kept")), 4, "absent")
    assert (tmp_path / "kept").read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    fails(run("get", "k", str(tmp_path / "no" / "such" / "folder")), 2, "folder")


def test_a_file_is_written_with_the_usual_mode(run: Run, tmp_path: Path) -> None:
    good(run("put", "k", stdin=b"x"))
    good(run("get", "k", str(tmp_path / "out")))
    (tmp_path / "usual").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    good(run("get", "k", "/dev/null"))


def test_a_reader_that_has_enough_is_no_error(run: Run, cluster: LocalCluster) -> None:
    good(run("put", "--store", "big", "--size", "64MiB", "k", stdin=bytes(30 << 20)))
    with running("get", "--store", "big", "k", "--broker", cluster.address) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(10) == bytes(10)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


def test_keys_are_listed_and_deleted(run: Run) -> None:
    for key in ("a/1", "a/2", "b"):
        good(run("put", key, stdin=b"x"))
    assert good(run("ls")) == b"a/1\na/2\nb\n"
    assert good(run("ls", "a/")) == b"a/1\na/2\n"
    assert good(run("ls", "-0", "a/")) == b"a/1\0a/2\0"
    good(run("rm", "a/1"))
    fails(run("rm", "b", "never"), 4, "never")
    assert good(run("ls")) == b"a/2\n"


def test_a_key_of_any_bytes(run: Run) -> None:
    key = os.fsdecode(b"\xff\xfe key")
    good(run("put", key, stdin=b"x"))
    assert good(run("get", key)) == b"x"
    assert good(run("ls", "-0")) == b"\xff\xfe key\0"
    good(run("rm", key))


def test_a_store_is_deleted_whole(run: Run) -> None:
    good(run("put", "--store", "s", "--size", "8MiB", "k", stdin=b"x"))
    good(run("rm", "--store", "s", "--all"))
    fails(run("get", "--store", "s", "k"), 5, "'s'")
    assert json.loads(good(run("status", "--json")))["stores"] == []


def test_a_put_goes_to_the_store_that_the_environment_names(run: Run) -> None:
    made = run("put", "--size", "8MiB", "k", stdin=b"x", MEMFAAS_STORE="there")
    assert made.stderr == b"memfaas: created store 'there' of 8 MiB\n"
    assert good(run("ls", "--store", "there")) == b"k\n"
    fails(run("ls"), 5, "'default'")


def test_a_value_for_which_there_is_no_room(run: Run) -> None:
    good(run("put", "--store", "s", "--size", "8MiB", "k", stdin=b"before"))
    fails(run("put", "--store", "s", "k", stdin=bytes(20 << 20)), 11, "room")
    assert good(run("get", "--store", "s", "k")) == b"before"


def test_status_shows_what_is_there(run: Run, cluster: LocalCluster) -> None:
    good(run("put", "--store", "shown", "--size", "16MiB", "k", stdin=b"x"))
    text = good(run("status")).decode()
    for word in ("donor0", "donor1", "shown", "persistent", "never", "256 MiB", "connected"):
        assert word in text
    report = json.loads(good(run("status", "--json")))
    assert {donor["donor"] for donor in report["donors"]} == {"donor0", "donor1"}
    assert report["stores"][0]["spec"]["name"] == "shown"
    with memfaas.connect(cluster.address, tenant="alice") as session:
        session.store("hers", size="8MiB")
        assert "hers" not in good(run("status")).decode()
        assert "hers" in good(run("status", "--tenant", "operator")).decode()


def test_watching_ends_with_ctrl_c(cluster: LocalCluster) -> None:
    with running("status", "--watch", "--json", "--broker", cluster.address) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for _ in range(2):
            assert json.loads(child.stdout.readline())["donors"]
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == b""
    assert child.returncode == 130


def test_watching_goes_on_with_old_figures_while_the_broker_is_away(cluster: LocalCluster) -> None:
    """What it writes to a terminal; log lines would be seen there, too."""
    command = [*MEMFAAS, "status", "--watch", "--broker", cluster.address]
    ours, its = pty.openpty()
    with (
        os.fdopen(ours, "rb", buffering=0) as screen,
        subprocess.Popen(command, stdin=its, stdout=its, stderr=its) as child,
    ):
        os.close(its)
        try:
            _until(screen, b"donor1")
            cluster.kill_broker()
            seen = _until(screen, b"broker away, figures of ") + _until(screen, b"donor1")
            cluster.restart_broker()
            for _ in range(2):
                seen += _until(screen, b"up ") + _until(screen, b"donor1")
        finally:
            child.send_signal(signal.SIGINT)
    assert child.returncode == 130
    assert b"memfaas: " not in seen


def _until(screen: FileIO, words: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 30
    while words not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([screen], [], [], 1)[0]:
            seen += screen.read(4096)
    return seen


# --- up and demo ------------------------------------------------------------------------------------


def end(child: subprocess.Popen[Any], with_signal: int) -> int:
    child.send_signal(with_signal)
    return child.wait(60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_up_says_how_to_connect_and_stops_clean(tmp_path: Path, how: int) -> None:
    secret = tmp_path / "secret"
    options = ["--listen-port", "0", "--secret-file", str(secret), "--memory", "128MiB", "--headroom", "32MiB"]
    with running("up", *options) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        said = [child.stdout.readline().decode() for _ in range(7)]
        assert said[0].startswith("memfaas is up at 127.0.0.1:")
        assert "lends 128 MiB" in said[0]
        (export,) = [line.strip() for line in said if "export" in line]
        script = f'{export}; memfaas() {{ {" ".join(MEMFAAS)} "$@"; }}; ' + "; ".join(
            line.strip() for line in said if line.startswith("    ") and line.strip() != export
        )
        done = subprocess.run(["/bin/sh", "-ec", script], capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr
        assert end(child, how) == 0
        assert b"free again" in child.stderr.read()


def test_up_where_nothing_can_be_lent(tmp_path: Path) -> None:
    options = ["--listen-port", "0", "--secret-file", str(tmp_path / "secret"), "--headroom", "100TiB"]
    done = subprocess.run([*MEMFAAS, "up", *options], capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"nothing to lend" in done.stderr


def test_a_donor_without_a_broker_waits_for_it(tmp_path: Path) -> None:
    secret, runtime = str(tmp_path / "secret"), os.environ["XDG_RUNTIME_DIR"]
    with LocalCluster(donors=0) as cluster:
        port = str(cluster._address.port)
        (tmp_path / "secret").write_bytes((cluster.folder / "secret").read_bytes())
        (tmp_path / "secret").chmod(0o600)
    options = ["--broker", f"127.0.0.1:{port}", "--secret-file", secret, "--memory", "32MiB", "--headroom", "32MiB"]
    with running("donor", *options, "--name", "early", "--runtime-dir", runtime) as donor:
        time.sleep(0.5)
        with running("broker", "--listen-port", port, "--secret-file", secret) as child:
            assert donor.stdout is not None
            facts = json.loads(donor.stdout.readline())
            assert (facts["ready"], facts["donor"]) == (True, "early")
            assert end(donor, signal.SIGTERM) == 0
            assert end(child, signal.SIGTERM) == 0
        assert donor.stderr is not None
        assert b"still trying" in donor.stderr.read()


def test_the_demo_verifies_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([*MEMFAAS, "demo"], capture_output=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    for word in ("shm", "tcp", "GB/s", "donor2", "store demo-shm", "byte for byte"):
        assert word in text
    assert done.stderr == b""
    assert list(tmp_path.iterdir()) == []
