"""Imports point one way: bench, fuse -> client -> memfaas <- server."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROLES = ("server", "client", "fuse", "bench")
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "server": {"server"},
    "client": {"client"},
    "fuse": {"fuse", "client"},
    "bench": {"bench", "fuse", "client"},
}
"""Which roles' packages the code of each may import; all may import the core."""


def is_composition_root(module: str) -> bool:
    """The public face and the command line put the parts together, so they know all of them."""
    return module == "memfaas" or module.split(".")[1].split("_")[0] == "cli"


def part_of(module: str) -> str:
    """`memfaas.client.store` is of the client; what is in no role's package is of the core."""
    role = module.split(".")[1:2]
    return role[0] if role and role[0] in ROLES else "core"


def sources() -> dict[str, Path]:
    """Every module of ours by its import name, each file once."""
    found = {}
    for folder, package in (("memfaas", "memfaas"), *((role, f"memfaas.{role}") for role in ROLES)):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder)
            if folder == "memfaas" and inside.parts[0] in ROLES:  # through a symlink
                continue
            found[".".join((package, *inside.with_suffix("").parts)).removesuffix(".__init__")] = path
    return found


def imports_of(module: str, tree: ast.AST, *, is_package: bool) -> Iterator[str]:
    """Absolute names of all that is imported, at whatever depth of the code."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def breaches(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What a module imports although its place in the layers forbids it."""
    wrong = []
    part = part_of(module)
    for name in imports_of(module, ast.parse(source), is_package=is_package):
        top = name.split(".")[0]
        if top in ROLES:
            wrong.append(f"{module} imports {name}: say memfaas.{name}")
        elif top == "pyfuse3" and part not in ("fuse", "bench"):
            wrong.append(f"{module} imports pyfuse3: only memfaas.fuse may, and its benchmark")
        elif top == "memfaas" and not is_composition_root(module):
            target = part_of(name)
            if target != "core" and target not in MAY_IMPORT[part]:
                wrong.append(f"{module} imports {name}: {part} must not know {target}")
    return wrong


@pytest.mark.parametrize("module", sorted(sources()))
def test_a_module_imports_only_downwards(module: str) -> None:
    path = sources()[module]
    assert breaches(module, path.read_text(), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("memfaas.rpc", "import memfaas.client"),
        ("memfaas.rpc", "def f():\n    from memfaas.server import broker"),
        ("memfaas.rpc", "from memfaas import client"),
        ("memfaas.fabric.tcp", "from ..server.broker import Broker"),
        ("memfaas.server.broker", "from memfaas.client.store import Store"),
        ("memfaas.server.broker", "from .. import client"),
        ("memfaas.client.cluster", "if TYPE_CHECKING:\n    import memfaas.server.donor"),
        ("memfaas.client.cluster", "importlib.import_module('memfaas.server.donor')"),
        ("memfaas.client.store", "from memfaas.bench import peers"),
        ("memfaas.fuse.mount", "from memfaas.server import broker"),
        ("memfaas.bench.kv", "from memfaas.server import broker"),
        ("memfaas.client.store", "import pyfuse3"),
        ("memfaas.cli", "import server"),
        ("memfaas.bench.kv", "from client.store import Store"),
    ],
)
def test_an_import_upwards_is_found(module: str, source: str) -> None:
    assert len(breaches(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("memfaas.client.store", "from memfaas.errors import UsageError\nfrom .session import Session"),
        ("memfaas.server.broker", "from memfaas import rpc\nimport memfaas.server.leases"),
        ("memfaas.fuse.mount", "import pyfuse3\nfrom memfaas.client import store"),
        ("memfaas.bench.kv", "from memfaas.client import session\nfrom memfaas.bench import peers"),
        ("memfaas.cli_run", "from memfaas.server import broker\nfrom memfaas.client import session"),
        ("memfaas", "from memfaas.client import session"),
    ],
)
def test_an_import_downwards_is_allowed(module: str, source: str) -> None:
    assert breaches(module, source) == []


def test_importing_memfaas_is_light(tmp_path: Path) -> None:
    """A program that only wants an error class must not pay for NumPy, nor need FUSE or RDMA."""
    heavy = ("numpy", "pyfuse3", "pyverbs", "matplotlib", "memfaas.server", "memfaas.fuse", "memfaas.bench")
    script = "import sys, memfaas; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    assert "memfaas" in loaded
    assert sorted(set(loaded) & set(heavy)) == []
