"""A donor's folder, and the process that functions are forked from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memfaas.errors import UsageError
from memfaas.server.home import Home, Legacy


def test_a_folder_is_held_by_one_agent_and_then_by_the_next(tmp_path: Path) -> None:
    first, second = Home(tmp_path / "run/d"), Home(tmp_path / "run/d")
    first.enter()
    with pytest.raises(UsageError, match="another donor runs in"):
        second.enter()
    first.leave()
    second.enter()
    second.leave()


LEGACY = Legacy(asked={"job 17": 5}, due={"job 17": 1.5}, nominal=9)


def test_what_was_reclaimed_is_kept_for_the_next_agent_and_a_folder_that_takes_no_file_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path / "run/d")
    home.enter()
    home.leave_behind(LEGACY)
    assert Home(tmp_path / "run/d").legacy() == LEGACY
    home.leave()
    home.enter()
    assert home.legacy() == LEGACY
    home.folder.rename(tmp_path / "elsewhere")
    home.leave_behind(Legacy({"job 17": 6}, {}, 9))
    assert "the next agent of this donor lends it again" in caplog.text


def test_nothing_is_left_when_nothing_is_reclaimed_any_more(tmp_path: Path) -> None:
    home = Home(tmp_path / "run/d")
    home.enter()
    home.leave_behind(LEGACY)
    home.leave_behind(Legacy({}, {}, 9))
    assert home.legacy() == Legacy({}, {}, 0)
    home.leave()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_nothing_is_removed_with_the_one_above(tmp_path: Path) -> None:
    one, other = Home(tmp_path / "run/one"), Home(tmp_path / "run/other")
    one.enter()
    other.enter()
    one.leave()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["other"]
    other.leave()
    assert not (tmp_path / "run").exists()


def test_a_folder_with_sockets_of_functions_stays(tmp_path: Path) -> None:
    home = Home(tmp_path / "run/d")
    home.enter()
    control = home.unix_path(b"L" * 16).with_suffix(".ctl")
    control.touch()
    home.leave()
    assert home.control_paths() == [control]
    home.enter()
    home.forget(control)
    home.leave()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_others_can_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(UsageError, match="everybody can write"):
        Home(tmp_path / "run/d").enter()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 65534, 65534)
    with pytest.raises(UsageError, match="belongs to user 65534"):
        Home(tmp_path / "run/d").enter()


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot use the runtime folder"):
        Home(tmp_path / "file/d").enter()


def test_the_zygote_loads_only_what_functions_need() -> None:
    """All functions share what it has loaded, and would carry what is of no use to them."""
    script = "import sys, memfaas.server.zygote; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.split()
    assert "trio" in loaded
    assert set(loaded).isdisjoint({"numpy", "click", "rich", "lz4", "memfaas.config", "memfaas.client"})
