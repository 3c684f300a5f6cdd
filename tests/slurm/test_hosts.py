"""Reading Slurm's lists of hosts."""

from __future__ import annotations

import pytest

from memfaas.errors import ProtocolError
from memfaas.server.slurm import hosts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,2],login", ["node08", "node09", "node10", "node2", "login"]),
        ("a,rack[1-2]n[01-02]x", ["a", "rack1n01x", "rack1n02x", "rack2n01x", "rack2n02x"]),
    ],
)
def test_a_list_of_hosts_is_expanded(text: str, names: list[str]) -> None:
    assert hosts.expand(text) == names


@pytest.mark.parametrize(
    "text", ["node[", "node]1", "node[a-b]", "node[1-]", "node[]", "a[1]b]", "node[3-1]", "node[²]"]
)
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        hosts.expand(text)


@pytest.mark.parametrize("text", ["n[1-999999999]", "n[1-60000],m[1-60000]", "n[1-999][1-999]", "n[1-60000,1-60000]"])
def test_more_hosts_than_a_cluster_has_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="more than"):
        hosts.expand(text)


def test_as_many_hosts_as_are_allowed_are_expanded() -> None:
    assert hosts.expand("n[1-2],m", 3) == ["n1", "n2", "m"]
    with pytest.raises(ProtocolError):
        hosts.expand("n[1-2],m", 2)
