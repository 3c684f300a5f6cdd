"""A broker's address: both forms are read, and what makes no sense says why."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfaas.addresses import Address, parse_address
from memfaas.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("node7", Address("node7", 7411)),
        ("node7:7500", Address("node7", 7500)),
        (" 10.0.0.1:1 ", Address("10.0.0.1", 1)),
        ("[::1]", Address("::1", 7411)),
        ("[fe80::1]:65535", Address("fe80::1", 65535)),
        ("memfaas://node7", Address("node7", 7411)),
        ("memfaas://node7:80/", Address("node7", 80)),
        ("MEMFAAS://node7:80?secret=/a/b", Address("node7", 80, Path("/a/b"))),
        ("memfaas://[::1]:80?secret=/a%20b/%C3%A9", Address("::1", 80, Path("/a b/é"))),
    ],
)
def test_an_address_is_read(text: str, address: Address) -> None:
    assert parse_address(text) == address


def test_the_secret_may_lie_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert parse_address("memfaas://node7?secret=~/key").secret_file == Path("/home/ada/key")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no host"),
        (":7411", "no host"),
        ("two words:7411", "no host"),
        ("http://node7:80", "scheme"),
        ("user@node7:80", "no host"),
        ("node7:", "port"),
        ("node7:http", "port"),
        ("node7:0", "port"),
        ("node7:65536", "port"),
        ("node7:٣", "port"),
        ("::1:7411", "brackets"),
        ("[::1", "brackets"),
        ("[::1]7411", "brackets"),
        ("memfaas://", "no host"),
        ("memfaas://node7?secret=", "secret="),
        ("memfaas://node7?secret=/a&secret=/b", "secret="),
        ("memfaas://node7?sekret=/a", "'sekret'"),
        ("memfaas://node7?x", "name=value"),
    ],
)
def test_an_address_without_sense_says_why(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert reason in str(caught.value)
    assert repr(text) in str(caught.value)


@given(
    st.one_of(st.ip_addresses().map(str), st.from_regex(r"\A[a-z0-9.-]{1,40}\Z")),
    st.integers(1, 65535),
    st.none() | st.text(min_size=1).filter(lambda text: "\0" not in text).map(lambda text: Path("/", text)),
)
def test_a_shown_address_can_be_read_back(host: str, port: int, secret: Path | None) -> None:
    address = Address(host, port, secret)
    assert parse_address(str(address)) == address


@given(st.text(max_size=60), st.sampled_from(["", "memfaas://"]))
def test_any_text_is_either_understood_or_a_usage_error(text: str, scheme: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_address(scheme + text).port > 0
