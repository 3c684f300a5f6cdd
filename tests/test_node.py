"""What a node's kernel gives to lent memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfaas import node


@pytest.mark.parametrize(
    ("general", "of_size", "expected"),
    [
        ("always within_size [advise] never deny force", None, True),
        ("[always] within_size advise never deny force", None, True),
        ("always [within_size] advise never deny force", None, True),
        ("always within_size advise [never] deny force", None, False),
        ("always within_size advise never [deny] force", None, False),
        ("always within_size [advise] never deny force", "always [inherit] within_size advise never", True),
        ("always within_size advise [never] deny force", "always [inherit] within_size advise never", False),
        ("always within_size advise [never] deny force", "always inherit within_size [advise] never", True),
        ("[always] within_size advise never deny force", "always inherit within_size advise [never]", False),
        (None, None, False),
    ],
)
def test_whether_a_node_gives_huge_pages(
    tmp_path: Path, general: str | None, of_size: str | None, expected: bool
) -> None:
    if general is not None:
        (tmp_path / "shmem_enabled").write_text(general + "\n")
    if of_size is not None:
        (tmp_path / "hugepages-2048kB").mkdir()
        (tmp_path / "hugepages-2048kB/shmem_enabled").write_text(of_size + "\n")
    assert node.gives_huge_pages(tmp_path) is expected
