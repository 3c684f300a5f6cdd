"""The public names: all there, all documented, and none imported before it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import memfaas


@pytest.mark.parametrize("name", memfaas.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    thing = getattr(memfaas, name)
    if name != "__version__":
        assert inspect.getdoc(thing)


@pytest.mark.parametrize("name", ["Session", "Store", "Region", "AsyncSession", "AsyncStore", "LocalCluster"])
def test_every_public_method_is_typed(name: str) -> None:
    for method, function in inspect.getmembers(getattr(memfaas, name), inspect.isfunction):
        if not method.startswith("_"):
            assert "return" in function.__annotations__, method


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        memfaas.conect  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_imports_little() -> None:
    code = (
        "import sys, memfaas\n"
        "print([name for name in sys.modules if name.startswith('memfaas.')])\n"
        "print([name for name in ('numpy', 'trio', 'click', 'rich', 'pyfuse3') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_the_client_needs_no_numpy_for_bytes() -> None:
    code = "import sys, memfaas\nmemfaas.connect, memfaas.Store, memfaas.LocalCluster\nprint('numpy' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
