"""The command line: help, errors in one line, settings from everywhere. The data commands are in test_cli_data.py."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import msgspec
import pytest
from rich.console import Console

from memfaas import _native, auth, messages
from memfaas.cli import _COMMANDS, main, status
from memfaas.client.local import LocalCluster
from memfaas.units import GIB, MIB

COMMANDS = sorted(_COMMANDS)


def run(*arguments: str, env: dict[str, str] | None = None, stdin: bytes = b"") -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, arguments, env=env, input=stdin)


@pytest.fixture(scope="module")
def broker_alone() -> Iterator[LocalCluster]:
    with LocalCluster(donors=0) as cluster:
        yield cluster


@pytest.fixture
def nobody(tmp_path: Path) -> str:
    """An address at which nobody listens, with a good secret file."""
    auth.create_secret(tmp_path / "secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"memfaas://127.0.0.1:{port}?secret={tmp_path / 'secret'}"


# --- help -------------------------------------------------------------------------------------------


def test_the_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.output


def test_the_doctors_table_in_a_pipe_is_as_wide_as_the_others() -> None:
    result = run("doctor")
    (native,) = [line for line in result.stdout.splitlines() if line.startswith("native module")]
    assert Path(_native.__file__).name in native
    assert "the data path is compiled and loads" in native


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in ("demo", "doctor", "bench", "fs", "slurm", "umount")]
)
def test_the_help_of_a_command_has_an_example_and_where_its_options_come_from(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"memfaas {name}" in " ".join(result.output.split())
    assert "environment: MEMFAAS_" in " ".join(result.output.split())


def test_the_version_is_told() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip()[0].isdigit()


# --- errors -----------------------------------------------------------------------------------------


def fails(result: click.testing.Result, status: int, *words: str) -> None:
    """One line on the standard error that has these words."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("memfaas: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_no_broker(nobody: str) -> None:
    result = run("status", "--broker", nobody)
    fails(result, 31, "127.0.0.1", "(Connection refused)")
    assert "Errno" not in result.stderr


def test_no_secret_file(tmp_path: Path) -> None:
    fails(run("ls", "--secret-file", str(tmp_path / "none")), 20, "none", "--secret-file")


def test_a_secret_file_that_others_can_read(tmp_path: Path) -> None:
    auth.create_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o644)
    fails(run("ls", "--secret-file", str(tmp_path / "secret")), 20, "chmod 600")


def test_a_wrong_secret(broker_alone: LocalCluster, tmp_path: Path) -> None:
    auth.create_secret(tmp_path / "other")
    address = broker_alone.address.partition("?")[0]
    fails(run("ls", "--broker", address, "--secret-file", str(tmp_path / "other")), 20, "secret")


def test_what_is_no_broker(nobody: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        address = nobody.replace(nobody.split(":")[2].split("?")[0], str(port))
        child = subprocess.Popen(
            [sys.executable, "-m", "memfaas.cli", "ls", "--broker", address], stderr=subprocess.PIPE, text=True
        )
        with child:
            peer, _ = listener.accept()
            peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            peer.close()
            assert child.stderr is not None
            said = child.stderr.read()
    assert child.returncode in (31, 34)
    assert said.startswith("memfaas: ")
    assert said.count("\n") == 1


def test_an_unknown_store(broker_alone: LocalCluster) -> None:
    fails(run("get", "k", "--store", "none", "--broker", broker_alone.address), 5, "'none'")
    fails(run("rm", "--all", "--store", "none", "--broker", broker_alone.address), 5, "'none'")


def test_no_room(broker_alone: LocalCluster) -> None:
    fails(run("put", "k", "--size", "1GiB", "--broker", broker_alone.address, stdin=b"x"), 10, "room")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "--timeout", "soon"], ["timeout", "'soon'"]),
        (["ls", "--broker", "a b"], ["broker", "address"]),
        (["ls", "--fabric", "smoke"], ["fabric", "smoke"]),
        (["ls", "--store", "two\nlines"], ["store", "lines"]),
        (["put", "k", "/does/not/exist"], ["/does/not/exist"]),
        (["--config", "/does/not/exist", "ls"], ["/does/not/exist"]),
        (["donor", "--memory", "lots"], ["memory", "lots"]),
        (["broker", "--listen-port", "70000"], ["listen_port", "70000"]),
        (["donor", "--memory", "-5GiB"], ["-5GiB", "must not be negative"]),
        (["ls", "--timeout", "-1s"], ["-1s", "must not be negative"]),
        (["slurm", "scan", "--start", " "], ["--start", "no command"]),
        (["slurm", "scan", "--start", "sh -c 'x"], ["--start", "quotation"]),
    ],
)
def test_settings_that_make_no_sense(arguments: list[str], words: list[str]) -> None:
    fails(run(*arguments), 2, *words)


@pytest.mark.parametrize("arguments", [["rm"], ["rm", "--all", "key"], ["put"], ["fly"], ["ls", "--nonsense"]])
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_an_interrupted_command_says_nothing(nobody: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"memfaas://127.0.0.1:{silent.getsockname()[1]}?secret={tmp_path / 'secret'}"
        child = subprocess.Popen(
            [sys.executable, "-m", "memfaas.cli", "status", "--broker", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with child:
            peer, _ = silent.accept()
            with peer:
                peer.recv(1)  # by now it waits for our answer
                child.send_signal(signal.SIGINT)
                out, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert (out, errors) == (b"", b"")


# --- settings ---------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_and_that_over_the_file(broker_alone: LocalCluster, tmp_path: Path) -> None:
    good, bad = broker_alone.address, "127.0.0.1:1"
    secret = str(broker_alone.folder / "secret")
    file = tmp_path / "settings.toml"

    def status(in_file: str, env: str | None, flag: str | None) -> int:
        file.write_text(f'[client]\nbroker = "{in_file}"\nsecret_file = "{secret}"\n')
        flags = ["--broker", flag] if flag else []
        environment = {"MEMFAAS_BROKER": env} if env else {}
        return run("--config", str(file), "status", "--json", *flags, env=environment).exit_code

    assert status(good, None, None) == 0
    assert status(bad, None, None) == 31
    assert status(bad, good, None) == 0
    assert status(good, bad, None) == 31
    assert status(bad, bad, good) == 0
    assert status(good, good, bad) == 31


@pytest.mark.parametrize("command", [["get", "k"], ["ls"], ["rm", "k"], ["rm", "--all"]])
def test_the_store_of_a_command_is_a_setting(broker_alone: LocalCluster, tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[client]\nstore = "of the file"\n')
    command = [*command, "--broker", broker_alone.address]
    environment = {"MEMFAAS_STORE": "of the environment"}
    fails(run(*command), 5, "'default'")
    fails(run("--config", str(file), *command), 5, "'of the file'")
    fails(run("--config", str(file), *command, env=environment), 5, "'of the environment'")
    fails(run(*command, "--store", "of the flag", env=environment), 5, "'of the flag'")


def test_status_for_programs(broker_alone: LocalCluster) -> None:
    result = run("status", "--json", "--broker", broker_alone.address, "--tenant", "alice")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["donors"] == []
    assert [session["tenant"] for session in report["sessions"]] == ["alice"]
    assert len(bytes.fromhex(report["sessions"][0]["session"])) == 16


def test_status_for_people(broker_alone: LocalCluster) -> None:
    result = run("status", "--broker", broker_alone.address)
    assert result.exit_code == 0
    for title in ("broker", "donors", "stores", "leases", "sessions"):
        assert title in result.stdout


MEMORY = messages.Memory(offered=8 * GIB, leased=0, populated=0, available=9 * GIB, headroom=GIB)
DONOR = messages.DonorInfo(donor="node7", node="n", host="h", connected=True, memory=MEMORY, leases=1, fabrics=["tcp"])
SPEC = messages.StoreSpec(
    store=b"s" * 16,
    name="x",
    tenant="bob",
    size=GIB,
    shards=1,
    shard_size=GIB,
    persistent=False,
    compression="none",
    on_reclaim="drop",
)
LEASE = messages.LeaseInfo(
    lease=b"l" * 16,
    tenant="bob",
    kind="shard",
    size=GIB,
    donor="node7",
    epoch=3,
    store="x",
    sessions=1,
    expires_in=9,
    links={},
    shard=0,
)
STORE = messages.StoreInfo(spec=SPEC, sessions=1, lost_shards=[])
REPORT = messages.StatusReport(uptime=1, donors=[DONOR], leases=[LEASE], stores=[STORE], sessions=[])


def lines(width: int = 200, **parts: Any) -> list[str]:
    """What `memfaas status` shows of a report that has these parts."""
    console = Console(width=width, file=io.StringIO())
    console.print(status.tables(msgspec.structs.replace(REPORT, **parts), "here"))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def row(begin: str, **parts: Any) -> str:
    (found,) = [line for line in lines(**parts) if line.startswith(begin)]
    return found


def lease(**parts: Any) -> messages.LeaseInfo:
    return msgspec.structs.replace(LEASE, **parts)


def test_status_shows_what_was_taken_back_and_what_is_on_disk() -> None:
    taken = msgspec.structs.replace(DONOR, reclaimed={"job 17": 2 * GIB, "operator": 512 * MIB})
    assert "2 GiB by job 17, 512 MiB by operator" in row("node7", donors=[taken])
    assert " memory " in row("node7")
    assert " disk " in row("node7", donors=[msgspec.structs.replace(DONOR, spill=True)])


def test_status_shows_what_was_dropped() -> None:
    dropped = msgspec.structs.replace(STORE, dropped=7)
    parts = {"stores": [dropped], "leases": [lease(donor="", state="dropped")]}
    found = row("x ", **parts)
    for words in ("a cache", "shards dropped: 0", "7 keys dropped"):
        assert words in found
    assert "dropped" in row("6c6c6c6c", **parts)


@pytest.mark.parametrize(
    ("shard", "store", "words"),
    [
        ({}, {}, "complete"),
        ({"state": "missing", "donor": "", "shard": 3}, {}, "shards missing: 3"),
        ({"state": "lost", "shard": 3}, {"lost_shards": [3]}, "shards lost: 3"),
        ({"state": "granting"}, {}, "being made"),
        ({"store": "y", "state": "missing"}, {}, "complete"),
    ],
)
def test_a_store_is_complete_only_when_all_its_shards_are_there(
    shard: dict[str, Any], store: dict[str, Any], words: str
) -> None:
    assert words in row("x ", leases=[lease(**shard)], stores=[msgspec.structs.replace(STORE, **store)])


def test_a_lease_is_not_shown_as_held_while_its_donor_is_away() -> None:
    away = [msgspec.structs.replace(DONOR, connected=False)]
    assert "node7 (away)" in row("node7", donors=away)
    assert " donor away " in row("6c6c6c6c", donors=away)
    assert "shards with a donor that is away: 0" in row("x ", donors=away)
    assert " held " in row("6c6c6c6c")


def test_a_lease_has_the_number_of_its_shard() -> None:
    assert row("6c6c6c6c", leases=[lease(shard=17)]).split()[:4] == ["6c6c6c6c", "store", "x", "17"]


def test_status_shows_quotas_and_what_is_borrowed() -> None:
    bob = messages.TenantInfo(tenant="bob", leased=3 * GIB, borrowed=GIB, quota=2 * GIB, priority=-5)
    assert row("bob ", tenants=[bob]).split() == ["bob", "3", "GiB", "2", "GiB", "1", "GiB", "-5"]
    assert row("bob ", tenants=[msgspec.structs.replace(bob, quota=None)]).split()[3] == "none"
    assert "held, borrowed" in row("6c6c6c6c", leases=[lease(borrowed=True)])


def test_brackets_in_names_are_no_markup() -> None:
    names = "run[bold]7", "job[/y]"
    taken = msgspec.structs.replace(DONOR, reclaimed={names[1]: GIB})
    spec = msgspec.structs.replace(SPEC, name=names[0])
    parts = {
        "donors": [taken],
        "stores": [msgspec.structs.replace(STORE, spec=spec)],
        "leases": [lease(store=names[0])],
    }
    assert "1 GiB by job[/y]" in row("node7", **parts)
    assert row("run[bold]7 ", **parts)
    assert "store run[bold]7 " in row("6c6c6c6c", **parts)


def test_a_narrow_terminal_has_fewer_columns_and_whole_words() -> None:
    taken = msgspec.structs.replace(
        DONOR, donor="node7.cluster", host="192.168.100.17", reclaimed={f"slurm job {job}": GIB for job in range(4)}
    )
    narrow = lines(80, donors=[taken], leases=[lease(donor="node7.cluster")])
    assert max(map(len, narrow)) <= 80
    (head,) = [line for line in narrow if line.startswith("donor  ")]
    for name in ("offered", "leased", "available", "taken back"):
        assert name in head
    assert "headroom" not in head
    assert any(line.startswith("node7.cluster") for line in narrow)
    assert any("1 GiB by slurm job 0" in line for line in narrow)
    (head,) = [line for line in narrow if line.startswith("lease  ")]
    for name in ("of", "shard", "size", "donor", "state"):
        assert f" {name}" in head
    assert "headroom" in "".join(lines(200, donors=[taken]))


def test_figures_are_marked_as_old_while_the_broker_is_away() -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(status._screen(REPORT, "here", "no broker answers", 5.2))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith("broker away, figures of 5 s ago: no broker answers\n")
    assert "node7" in shown


# --- tenants ----------------------------------------------------------------------------------------


def test_a_tenants_key_file_opens_what_is_his(broker_alone: LocalCluster, tmp_path: Path) -> None:
    key = tmp_path / "alice.key"
    made = run("tenant", "alice", str(key), "--secret-file", str(broker_alone.folder / "secret"))
    assert made.exit_code == 0
    assert key.stat().st_mode & 0o777 == 0o600
    address = broker_alone.address.partition("?")[0]
    good = run("status", "--json", "--broker", address, "--secret-file", str(key))
    assert [session["tenant"] for session in json.loads(good.stdout)["sessions"]] == ["alice"]
    fails(run("status", "--broker", address, "--secret-file", str(key), "--tenant", "bob"), 20, "alice")


def test_a_key_file_is_not_overwritten(broker_alone: LocalCluster, tmp_path: Path) -> None:
    key = tmp_path / "alice.key"
    key.write_text("precious")
    result = run("tenant", "alice", str(key), "--secret-file", str(broker_alone.folder / "secret"))
    fails(result, 2, "alice.key", "there is one already")
    assert key.read_text() == "precious"


# --- broker and donor as processes ------------------------------------------------------------------


def test_a_broker_makes_the_secret_and_says_when_it_is_ready(tmp_path: Path) -> None:
    secret = tmp_path / "new" / "secret"
    command = [sys.executable, "-m", "memfaas.cli", "broker", "--listen-port", "0", "--secret-file", str(secret)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        facts = json.loads(child.stdout.readline())
        assert facts["ready"]
        assert secret.stat().st_mode & 0o777 == 0o600
        result = run("status", "--json", "--broker", facts["address"], "--secret-file", str(secret))
        assert result.exit_code == 0
        child.terminate()
    assert child.returncode == 0


def test_a_broker_on_a_lifeline_ends_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memfaas.cli", "broker", "--listen-port", "0", "--until-eof"]
    environment = os.environ | {"MEMFAAS_SECRET_FILE": str(tmp_path / "secret")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        child.stdin.close()
        assert child.wait(30) == 0


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        fails(
            run("broker", "--listen-port", port, "--secret-file", str(tmp_path / "secret")),
            2,
            port,
            "in use",
            "--listen-port",
        )


def test_a_folder_for_the_secret_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    secret = tmp_path / "file" / "secret"
    result = run("broker", "--listen-port", "0", "--secret-file", str(secret))
    assert (result.exit_code, result.stderr) == (1, f"memfaas: {secret.parent}: File exists\n")


def test_a_tenants_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    missing = str(tmp_path / "tenants.toml")
    result = run("broker", "--listen-port", "0", "--tenants-file", missing, "--secret-file", str(tmp_path / "secret"))
    fails(result, 2, missing, "No such file")
    assert result.stderr.count(missing) == 1
    assert "Errno" not in result.stderr
