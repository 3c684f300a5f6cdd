"""What `memfaas slurm install` writes."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from memfaas.cli import main
from memfaas.server.slurm import keys, stores


def install(folder: Path, *more: str) -> tuple[int, str, str]:
    command = ["slurm", "install", "--dir", str(folder / "hooks"), "--slurm-conf", str(folder / "slurm.conf")]
    done = CliRunner().invoke(main, [*command, "--broker", "127.0.0.1:1", "--runtime-dir", str(folder), *more])
    return done.exit_code, done.stdout, done.stderr


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_slurm_conf_gets_a_line_for_each_hook_and_a_timeout_that_is_long_enough(tmp_path: Path) -> None:
    status, lines, _ = install(tmp_path, "--deadline", "20s")
    assert status == 0
    settings = dict(line.split("=", 1) for line in lines.splitlines())
    for hook in ("PrologSlurmctld", "Prolog", "Epilog", "EpilogSlurmctld"):
        assert os.access(settings[hook], os.X_OK)
    assert settings["PrologFlags"] == "Alloc"
    assert int(settings["PrologEpilogTimeout"]) > 20
    assert "BurstBufferType" not in settings
    assert not (tmp_path / "slurm.conf").exists()


def test_installing_again_changes_nothing(tmp_path: Path) -> None:
    first = install(tmp_path, "--stores")
    before = files(tmp_path)
    assert install(tmp_path, "--stores") == first
    assert files(tmp_path) == before
    assert {"hooks/prolog", "hooks/epilog-slurmctld", "burst_buffer.lua"} <= set(before)


def test_files_of_somebody_else_stay(tmp_path: Path) -> None:
    (tmp_path / "burst_buffer.lua").write_text("-- ours\n")
    status, _, message = install(tmp_path, "--stores")
    assert status == 2
    assert "burst_buffer.lua is there already" in message
    assert (tmp_path / "burst_buffer.lua").read_text() == "-- ours\n"


def test_the_state_of_stores_belongs_to_whom_the_controller_runs_as(tmp_path: Path) -> None:
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    (tmp_path / "slurm.conf").write_text(f"SlurmdUser=root\nSlurmUser={user.pw_name}  # not root\n")
    assert install(tmp_path, "--stores")[0] == 0
    status = (tmp_path / "hooks" / "stores").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (user.pw_uid, user.pw_gid, 0o700)


def test_nothing_is_left_to_be_filled_in(tmp_path: Path) -> None:
    install(tmp_path, "--stores")
    assert [name for name, text in files(tmp_path).items() if "@" in text] == []


def test_a_job_is_told_of_the_store_and_the_key_that_the_hooks_make(tmp_path: Path) -> None:
    folder = tmp_path / "100%"
    folder.mkdir()
    install(folder, "--stores", "--keys", str(folder / "keys"))
    script = (folder / "burst_buffer.lua").read_text()
    form = dict(re.findall(r'^local (store|key) = "(.*)" --', script, re.MULTILINE))
    assert form["store"] % 17 == stores.store_of("17")
    assert form["key"] % 17 == str(keys.path_of(folder / "keys", "17"))


@pytest.mark.parametrize("lua", ["lua5.1", "lua5.2", "lua5.3", "lua5.4", "luajit"])
@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("echo as it is;true", "0"),
        ("echo no room;false", "-1\tno room"),
        ("false", "-1\texit status 1"),
        ("kill -9 $$", "-1\texit status 137"),
    ],
)
def test_a_store_that_could_not_be_made_is_an_error_in_each_lua(
    tmp_path: Path, lua: str, call: str, result: str
) -> None:
    if shutil.which(lua) is None:
        pytest.skip(f"not installed: {lua}")
    install(tmp_path, "--stores")
    script = tmp_path / "burst_buffer.lua"
    text, replaced = re.subn(
        "^local call = .*$", lambda _: f"local call = [[sh -c '{call}']]", script.read_text(), flags=re.M
    )
    assert replaced == 1
    script.write_text(
        "slurm = {SUCCESS = 0, ERROR = -1, log_error = function() end}\n"
        f"{text}\n"
        "print(slurm_bb_setup('17', '1000', '1000', 'memfaas', '16777216', '/none'))\n"
    )
    assert subprocess.run([lua, script], check=True, capture_output=True, text=True).stdout == f"{result}\n"


@pytest.mark.parametrize("which", ["prolog-slurmctld", "prolog", "epilog", "epilog-slurmctld"])
def test_a_hook_succeeds_even_without_memfaas(tmp_path: Path, which: str) -> None:
    """A node on which the installation is missing must not be drained."""
    install(tmp_path)
    script = tmp_path / "hooks" / which
    script.write_text(script.read_text().replace("memfaas.server.slurm.hook", "memfaas.no_such_module"))
    assert subprocess.run([script], env={}, stderr=subprocess.DEVNULL).returncode == 0


def test_a_node_that_lends_nothing_loses_no_time(tmp_path: Path) -> None:
    install(tmp_path)
    script = tmp_path / "hooks" / "prolog"
    script.write_text(script.read_text().replace("timeout ", "echo called; timeout "))

    def run() -> str:
        variables = {"SLURMD_NODENAME": "node1"}
        return subprocess.run([script], env=variables, capture_output=True, check=True, text=True).stdout

    assert run() == ""
    (tmp_path / "node1").mkdir()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "node1" / "agent.sock"))
        assert run() == "called\n"


def test_a_hook_that_hangs_is_ended(tmp_path: Path) -> None:
    install(tmp_path, "--deadline", "10ms")
    script = tmp_path / "hooks" / "prolog"
    text = script.read_text()
    call = next(line for line in text.splitlines() if line.startswith("timeout "))
    limit = call.split()[4]
    script.write_text(text.replace(call, call[: call.index(limit)].replace("-k 1", "-k 0.1") + "0.1 sleep 1000"))
    assert float(limit) < 10
    assert subprocess.run([script], env={}, timeout=60).returncode == 0
