"""What is installed is one package, memfaas, however the repository is laid out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROLES = ("server", "client", "fuse", "bench")


@pytest.mark.parametrize("role", ROLES)
def test_each_roles_package_is_a_relative_link_to_its_folder(role: str) -> None:
    assert (ROOT / "memfaas" / role).is_symlink()
    assert os.readlink(ROOT / "memfaas" / role) == f"../{role}"
    assert (ROOT / "memfaas" / role / "__init__.py").samefile(ROOT / role / "__init__.py")


def test_nothing_but_memfaas_can_be_imported_from_elsewhere(tmp_path: Path) -> None:
    script = (
        "import importlib.util, json, sys;"
        "find = lambda name: getattr(importlib.util.find_spec(name), 'origin', None);"
        "print(json.dumps([sys.path, {name: find(name) for name in sys.argv[1:]}]))"
    )
    names = [*ROLES, "tests", "memfaas", *(f"memfaas.{role}" for role in ROLES)]
    done = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    )
    path, origins = json.loads(done.stdout)
    assert str(ROOT) not in path
    for name in (*ROLES, "tests"):
        assert origins[name] is None or not Path(origins[name]).is_relative_to(ROOT)
    for name in ("memfaas", *(f"memfaas.{role}" for role in ROLES)):
        assert origins[name] is not None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution, and the wheel that was built from it, both from a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    leave_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "build", "dist", "*.egg-info", "*.so", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=leave_out)

    def build(kind: str, cwd: Path) -> Path:
        script = f"import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        (result,) = folder.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
        return result

    sdist = build("sdist", folder / "copy")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked)


@pytest.mark.slow
def test_the_wheel_holds_memfaas_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"memfaas"}
    assert {"memfaas/py.typed", "memfaas/_native.pyi"} <= set(names)
    assert {f"memfaas/{role}/__init__.py" for role in ROLES} <= set(names)
    assert any(name.startswith("memfaas/_native.") and name.endswith(".so") for name in names)
    compiled_when_run = {f"memfaas/{path.relative_to(ROOT)}" for path in (ROOT / "bench").rglob("*.c")}
    assert {name for name in names if name.endswith((".c", ".h", ".pyx", ".pxd"))} == compiled_when_run


@pytest.mark.slow
def test_the_installed_wheel_imports(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    script = "import memfaas, memfaas._native, memfaas.server, memfaas.client; print(memfaas.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert Path(done.stdout.strip()) == tmp_path / "site/memfaas/__init__.py"
