"""Real programs on a mount: git, make, a compiler, tar, rsync, fio, SQLite."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuse.conftest import Mount

MAIN = """
#include <stdio.h>
int answer(void);
int main(void) { printf("%d\\n", answer()); return 0; }
"""
MAKEFILE = """
all: program
program: main.o answer.o
\t$(CC) -o $@ $^
"""

FIO_VERIFIES = ("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=100", "--verify_state_save=0", "--size=6m")
FIO_JOBS = {
    "small": ("rw=randwrite", "bs=4k"),
    "odd": ("rw=randrw", "bsrange=512-72k", "blockalign=512"),
    "large": ("rw=write", "bs=1m", "fsync=2"),
    "mapped": ("rw=randwrite", "bs=4k", "ioengine=mmap", "direct=0"),
    "again": ("rw=randwrite", "bs=16k", "loops=3", "fdatasync=16"),
}


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for name in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{name}_NAME": "n", f"GIT_{name}_EMAIL": "e@example.org"}
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_project_is_cloned_built_and_changed(mounted: Mount, tmp_path: Path) -> None:
    for tool in ("git", "make", "cc"):
        assert shutil.which(tool), f"{tool} is needed"
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "main.c").write_text(MAIN)
    (origin / "answer.c").write_text("int answer(void) { return 42; }\n")
    (origin / "Makefile").write_text(MAKEFILE)
    for number in range(200):
        (origin / f"data{number}").write_bytes(os.urandom(number * 100))
    run("git", "init", "-q", cwd=origin)
    run("git", "add", ".", cwd=origin)
    run("git", "commit", "-qm", "all", cwd=origin)
    run("git", "clone", "-q", origin, mounted / "work", cwd=mounted.folder)
    work = mounted / "work"
    run("make", "-j2", cwd=work)
    assert run(work / "program", cwd=work) == "42\n"
    (work / "answer.c").write_text("int answer(void) { return 43; }\n")
    assert "up to date" not in run("make", cwd=work)
    assert run(work / "program", cwd=work) == "43\n"
    run("git", "commit", "-qam", "43", cwd=work)
    run("git", "gc", "-q", cwd=work)
    run("git", "fsck", "--strict", cwd=work)
    assert run("git", "status", "--porcelain", "--untracked-files=no", cwd=work) == ""
    shutil.rmtree(work)
    assert os.listdir(mounted.folder) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything, and some more."""
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    for number in range(300):
        (tree / "a" / f"f{number}").write_bytes(os.urandom(number * 37))
    (tree / "a" / "f1").chmod(0o4711)
    os.symlink("../f2", tree / "a" / "b" / "link")
    os.link(tree / "a" / "f3", tree / "hard")
    os.mkfifo(tree / "fifo")
    os.setxattr(tree / "hard", "user.kind", b"x")
    os.utime(tree / "a" / "f4", ns=(1, 999_999_999_999_999_999))
    with (tree / "sparse").open("wb") as file:
        file.seek(10 << 20)
        file.write(b"end")
    return tree


@pytest.mark.slow
def test_tar_packs_and_unpacks_what_was_there(mounted: Mount, tree: Path, tmp_path: Path) -> None:
    flags = ["--xattrs", "--sparse"]
    run("tar", "cf", mounted / "all.tar", *flags, "-C", tree, ".", cwd=tmp_path)
    (mounted / "tree").mkdir()
    run("tar", "xf", mounted / "all.tar", *flags, "-C", mounted / "tree", cwd=tmp_path)
    run("tar", "df", mounted / "all.tar", *flags, "-C", mounted / "tree", cwd=tmp_path)
    run("diff", "-r", "--no-dereference", "--exclude=fifo", tree, mounted / "tree", cwd=tmp_path)
    assert os.getxattr(mounted / "tree" / "hard", "user.kind") == b"x"
    assert (mounted / "tree" / "hard").stat().st_nlink == 2


@pytest.mark.slow
def test_rsync_brings_a_tree_there_and_back(mounted: Mount, tree: Path, tmp_path: Path) -> None:
    there, back = mounted / "there", tmp_path / "back"

    def sync(source: Path, target: Path, *flags: str) -> list[str]:
        everything = ("rsync", "--archive", "--hard-links", "--xattrs", "--sparse", "--itemize-changes", "--delete")
        return run(*everything, *flags, f"{source}/", f"{target}/", cwd=tmp_path).splitlines()

    assert len(sync(tree, there)) > 300
    assert sync(tree, there, "--checksum") == []
    (tree / "a" / "f299").write_bytes(b"shorter")
    (tree / "a" / "f298").unlink()
    with (tree / "a" / "f297").open("r+b") as file:
        file.seek(5000)
        file.write(b"other bytes")
    changed = sync(tree, there, "--no-whole-file", "--inplace", "--no-sparse")
    assert {line.split()[1] for line in changed} == {"a/", "a/f297", "a/f298", "a/f299"}
    sync(there, back)
    assert sync(tree, back, "--checksum", "--dry-run") == []
    run("diff", "-r", "--no-dereference", "--exclude=fifo", tree, back, cwd=tmp_path)
    assert (back / "a" / "f4").stat().st_mtime_ns == 999_999_999_999_999_999
    assert (there / "sparse").stat().st_size == (10 << 20) + 3


@pytest.mark.slow
@pytest.mark.parametrize("direct", [0, 1])
def test_fio_finds_what_it_wrote(mounted: Mount, direct: int) -> None:
    jobs: list[str | Path] = []
    for name, settings in FIO_JOBS.items():
        jobs += [f"--name={name}", *(f"--{setting}" for setting in settings)]
    run("fio", f"--direct={direct}", f"--directory={mounted.folder}", *FIO_VERIFIES, *jobs, cwd=mounted.folder)
    assert {path.name for path in mounted.folder.iterdir()} == {f"{name}.0.0" for name in FIO_JOBS}


@pytest.mark.slow
@pytest.mark.parametrize("journal", ["delete", "truncate", "wal"])
def test_sqlite_keeps_its_tables(mounted: Mount, journal: str) -> None:
    path = mounted / "db"
    with sqlite3.connect(path) as db:
        db.execute(f"pragma journal_mode={journal}")
        db.execute("create table t(k integer primary key, v blob)")
    for batch in range(10):
        with sqlite3.connect(path) as db:
            db.executemany("insert into t values(?, ?)", ((batch * 100 + k, bytes(k * 10)) for k in range(100)))
    with sqlite3.connect(path) as db:
        db.execute("delete from t where k % 3 = 0")
    with sqlite3.connect(path, isolation_level=None) as db:
        db.execute("vacuum")
    with sqlite3.connect(path) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert db.execute("select count(*), sum(length(v)) from t").fetchone() == (
            666,
            sum(k % 100 * 10 for k in range(1000) if k % 3),
        )
    db.close()


_COUNT = """
import sqlite3, sys
for _ in range(50):
    db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
    db.execute("begin immediate")
    (n,) = db.execute("select n from counter").fetchone()
    db.execute("update counter set n = ?", (n + 1,))
    db.execute("insert into log values(?, ?)", (n + 1, sys.argv[2]))
    db.execute("commit")
    db.close()
"""


@pytest.mark.slow
def test_two_mounts_share_an_sqlite_database(pair: tuple[Mount, Mount]) -> None:
    """By its POSIX locks, and what was written under them."""
    with sqlite3.connect(pair[0] / "db") as db:
        db.execute("create table counter(n integer)")
        db.execute("create table log(n integer, who text)")
        db.execute("insert into counter values(0)")
    db.close()
    programs = [
        subprocess.Popen([sys.executable, "-c", _COUNT, str(mount / "db"), str(number)])
        for number, mount in enumerate(pair)
    ]
    assert [program.wait() for program in programs] == [0, 0]
    with sqlite3.connect(pair[1] / "db") as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert db.execute("select n from counter").fetchone() == (100,)
        assert [n for (n,) in db.execute("select n from log order by n")] == list(range(1, 101))
    db.close()
