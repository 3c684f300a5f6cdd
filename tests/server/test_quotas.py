"""Quotas and priorities of tenants, and the file that they stand in."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfaas.errors import UsageError
from memfaas.server.quotas import Quotas, Share
from memfaas.units import GIB

FILE = """
[default]
quota = "16GiB"
priority = 1

[tenants.alice]
quota = "64GiB"
priority = 5

[tenants.bob]
priority = -3

[tenants."eve@site"]
quota = 0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    return path


def refusal(file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        Quotas.load(file)
    return str(caught.value)


def test_without_a_file_nobody_has_a_limit() -> None:
    assert Quotas.load(None).standing("ann", 1 << 50, 1 << 50) == (0, False)


def test_a_tenant_has_what_its_table_says_and_the_rest_as_everybody(file: Path) -> None:
    quotas = Quotas.load(file)
    assert quotas.share("alice") == Share(64 * GIB, 5)
    assert quotas.share("bob") == Share(16 * GIB, -3)
    assert quotas.share("nobody") == Share(16 * GIB, 1)


def test_a_lease_beyond_the_quota_is_borrowed(file: Path) -> None:
    quotas = Quotas.load(file)
    assert quotas.standing("alice", 60 * GIB, 4 * GIB) == (5, False)
    assert quotas.standing("alice", 60 * GIB, 4 * GIB + 1) == (5, True)
    assert quotas.standing("eve@site", 0, 1) == (1, True)


def test_no_default_is_no_limit(file: Path) -> None:
    file.write_text('[tenants.alice]\nquota = "1GiB"\n')
    assert Quotas.load(file).share("bob") == Share(None, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[tenants.alice]\nquotas = "1GiB"', "[tenants.alice]: unknown setting 'quotas'; the nearest is 'quota'"),
        ('[tenants.alice]\nquota = "much"', "[tenants.alice] quota: 'much' is not a size"),
        ("[tenants.alice]\npriority = 1.5", "[tenants.alice] priority: 1.5 is not a whole number"),
        ("[tenants.alice]\npriority = 100000", "[tenants.alice] priority: 100000 is out of range"),
        ("[tenants]\nalice = 5", "[tenants.alice] must be a table"),
        ("tenants = 5", "[tenants] must be a table"),
        ("[tenant.alice]\npriority = 1", "unknown section 'tenant'"),
        ('[tenants.""]\npriority = 1', "[tenants.]: "),
        ("[tenants", "cannot read the tenants' file"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_its_name(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    assert str(file) in refusal(file)
    assert words in refusal(file)


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """It was named: without it, everybody would have no limit."""
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
