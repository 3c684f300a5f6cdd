"""Compression is for what gains from it, and what does not gain is remembered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfaas._native import FLAG_LZ4
from memfaas.client.compress import Compressor, expand, expand_writable
from memfaas.errors import ValueCorrupt

TEXT = b"the same words again and again " * 100
NOISE = random.Random(1).randbytes(3000)


def shrink(compressor: Compressor, key: bytes, value: bytes) -> tuple[bytes, int]:
    stored, flags = compressor.shrink(key, memoryview(value))
    return bytes(stored), flags


@given(st.binary(max_size=400).map(lambda block: block * 7))
def test_a_compressed_value_expands_to_itself(value: bytes) -> None:
    stored, flags = shrink(Compressor(), b"k", value)
    assert (expand(stored) if flags & FLAG_LZ4 else stored) == value


def test_a_value_that_gains_is_stored_small() -> None:
    stored, flags = shrink(Compressor(), b"k", TEXT)
    assert flags == FLAG_LZ4
    assert len(stored) < len(TEXT) // 8
    assert expand_writable(stored) == bytearray(TEXT)


def test_a_value_that_gains_too_little_is_stored_as_it_is() -> None:
    almost = NOISE + bytes(200)
    assert shrink(Compressor(), b"k", almost) == (almost, 0)


def test_a_tiny_value_is_not_tried() -> None:
    compressor = Compressor()
    assert shrink(compressor, b"k", b"a" * 100) == (b"a" * 100, 0)
    assert compressor.stats.tried_in_vain == 0


def test_a_kind_without_gain_is_passed_over() -> None:
    compressor = Compressor()
    for number in range(1000):
        shrink(compressor, b"noise/%d" % number, NOISE)
    assert compressor.stats.tried_in_vain < 20
    assert compressor.stats.passed_over > 980


def test_a_kind_without_gain_does_not_spoil_another() -> None:
    compressor = Compressor()
    for number in range(100):
        shrink(compressor, b"noise/%d" % number, NOISE)
        shrink(compressor, b"video%d" % number, NOISE)
        assert shrink(compressor, b"text/%d" % number, TEXT)[1] == FLAG_LZ4
        assert shrink(compressor, b"log%d" % number, TEXT)[1] == FLAG_LZ4


def test_a_kind_that_begins_to_gain_is_noticed() -> None:
    compressor = Compressor()
    for number in range(100):
        shrink(compressor, b"data/%d" % number, NOISE)
    flags = [shrink(compressor, b"data/%d" % number, TEXT)[1] for number in range(200)]
    assert FLAG_LZ4 in flags
    assert set(flags[flags.index(FLAG_LZ4) :]) == {FLAG_LZ4}


def test_the_memory_of_kinds_is_bounded() -> None:
    compressor = Compressor()
    for number in range(5000):
        shrink(compressor, b"%d/x" % number, NOISE)
    assert len(compressor._groups) <= 1024


@pytest.mark.parametrize("packed", [b"", b"abc", b"\xff\xff\xff\x7f" + b"abc" * 10, b"\x10\0\0\0nonsense"])
def test_what_was_not_compressed_is_corrupt(packed: bytes) -> None:
    with pytest.raises(ValueCorrupt):
        expand(packed)
    with pytest.raises(ValueCorrupt):
        expand_writable(packed)
