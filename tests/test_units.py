"""Sizes and durations: what people write is understood, and what is shown can be read back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memfaas.errors import MemfaasError, UsageError
from memfaas.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("100 B", 100),
        ("64k", 64 * 1024),
        ("64 KiB", 64 * 1024),
        ("64kB", 64_000),
        ("512MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        ("512M", 512 * 2**20),
        ("16GiB", 16 * 2**30),
        ("1.5GB", 1_500_000_000),
        (" 1.5 GiB ", 3 * 2**29),
        ("2T", 2 * 2**40),
        ("0.1GiB", 107_374_182),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    [
        *["", " ", "many", "MiB", "-1", "-1MiB", "1e6", "1,5GB", "1.GiB", ".5GiB", "1 2", "5 MiBs", "64kk", "٣MiB"],
        *["nan", "9999999999T", "0x10", "1_000"],
        *[-1, 2**63, 1.5, True, None, b"1MiB"],
    ],
)
def test_a_size_without_sense_is_named_and_explained(value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(value)
    assert repr(value) in str(caught.value)
    assert "size" in str(caught.value)


def test_a_wrong_size_is_a_value_error_and_an_error_of_memfaas() -> None:
    with pytest.raises(ValueError, match="16GiB"):
        parse_size("sixteen gig")
    with pytest.raises(MemfaasError):
        parse_size("sixteen gig")


@pytest.mark.parametrize("read", [parse_size, parse_duration])
@pytest.mark.parametrize("text", ["-1", "-5GiB", "- 3s", "-0.5"])
def test_what_is_negative_is_called_so(read: Callable[[str], float], text: str) -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        read(text)


def test_a_very_long_text_is_not_repeated_whole_in_the_message() -> None:
    with pytest.raises(UsageError) as caught:
        parse_size("9" * 100_000)
    assert len(str(caught.value)) < 300


def test_a_numpy_integer_is_a_size() -> None:
    size = parse_size(np.int64(2**20))
    assert size == 2**20
    assert type(size) is int


@given(st.integers(0, 2**63 - 1))
def test_a_size_in_bytes_is_itself(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size} B") == size


@given(st.integers(0, 1000), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_a_round_size_survives_being_shown(count: int, unit: str) -> None:
    size = parse_size(f"{count}{unit}")
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 2**62))
def test_a_shown_size_is_right_to_half_a_percent(size: int) -> None:
    shown = format_size(size)
    assert abs(parse_size(shown) - size) <= 0.005 * size + 0.5
    assume(size < 1023 * 2**40)
    assert len(shown) <= len("1023 KiB")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (512 * 2**20, "512 MiB"),
        (100 * 2**20, "100 MiB"),
        (5 * 2**40, "5 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes_are_shown_short(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        ("0", 0.0),
        ("2.5", 2.5),
        ("30s", 30.0),
        ("30 S", 30.0),
        ("10sec", 10.0),
        ("500ms", 0.5),
        ("250us", 0.00025),
        ("250 µs", 0.00025),
        ("5min", 300.0),
        ("5m", 300.0),
        ("1h30min", 5400.0),
        ("1 d 2 h", 93_600.0),
        (7, 7.0),
        (0.25, 0.25),
    ],
)
def test_durations_are_read_as_people_write_them(given_value: str | float, seconds: float) -> None:
    result = parse_duration(given_value)
    assert result == seconds
    assert type(result) is float


@pytest.mark.parametrize(
    "value",
    [
        *["", "soon", "-5s", "5 parsecs", "5 6", "1h30", "ms", "1e3", "inf", "nan", "5s!", "s5"],
        *[-1, -0.5, math.inf, math.nan, True, None, b"5s"],
    ],
)
def test_a_duration_without_sense_is_named_and_explained(value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(value)
    assert repr(value) in str(caught.value)
    assert "duration" in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"),
        (0.000_85, "850 µs"),
        (0.000_999_9, "1 ms"),
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (30, "30 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (3599.9, "1 h"),
        (12_000, "3 h 20 min"),
        (86_399, "1 d"),
        (100_000, "1 d 4 h"),
        (-0.5, "-500 ms"),
    ],
)
def test_durations_are_shown_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, 1e9, allow_nan=False))
def test_a_shown_duration_can_be_read_back(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=0.025, abs=5e-9)


@given(st.text(max_size=20))
def test_any_text_is_either_understood_or_a_usage_error(text: str) -> None:
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(UsageError):
            assert parse(text) >= 0
