"""What goes in comes out: buffers and arrays of every kind."""

from __future__ import annotations

import array
import ctypes
import mmap
import sys
import types
from typing import Any

import hypothesis.extra.numpy as hnp
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfaas.client import codec
from memfaas.errors import UsageError, ValueCorrupt


def round_trip(value: Any) -> Any:
    payload, meta, flags = codec.flatten(value)
    assert flags
    return codec.shape_array(np.frombuffer(bytearray(payload), np.uint8), meta)


STRUCTURED = np.dtype([("a", "<i4"), ("b", ">f8", (2, 3)), ("c", [("d", "S3"), ("e", "?")])])
PADDED = np.dtype({"names": ["x", "y"], "formats": ["u1", "<f8"], "offsets": [1, 8], "itemsize": 24})


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12).reshape(3, 4),
        np.array(2.5),
        np.float32(2.5),
        np.array([], dtype="<c16"),
        np.zeros((0, 3), dtype=">i2"),
        np.zeros((2, 0, 5)),
        np.array([True, False, True]),
        np.array(["2020-02-29", "NaT"], dtype="datetime64[D]"),
        np.array([1, 2], dtype="timedelta64[ns]"),
        np.array(["ab", "", "ünï"]),
        np.array([b"x", b"yy"]),
        np.zeros(3, dtype="S0"),
        np.zeros((2, 2), dtype="V5"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(10)[::-2],
        np.broadcast_to(np.arange(3), (2, 3)),
        np.ones(4, dtype=STRUCTURED),
        np.zeros((2, 2), dtype=PADDED),
    ],
    ids=lambda value: f"{value.dtype}-{value.shape}".replace(" ", ""),
)
def test_an_array_comes_back_equal(value: Any) -> None:
    back = round_trip(value)
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    assert back.tobytes() == value.tobytes()


@given(hnp.arrays(hnp.scalar_dtypes() | hnp.array_dtypes(), hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))
def test_any_array_comes_back_equal(value: Any) -> None:
    back = round_trip(value)
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    assert back.tobytes() == value.tobytes()


def test_a_contiguous_array_is_not_copied() -> None:
    value = np.arange(100.0).reshape(10, 10)
    payload, _, _ = codec.flatten(value)
    assert np.shares_memory(np.frombuffer(payload, np.uint8), value)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.array([object()]), "Python objects"),
        (np.ma.masked_array([1, 2], mask=[True, False]), "mask"),
        (np.array(["a"], dtype=np.dtypes.StringDType()), "Python objects"),
        ("text", "encode"),
        (17, "not int"),
        (None, "not NoneType"),
    ],
    ids=["objects", "masked", "strings", "str", "int", "None"],
)
def test_what_has_no_bytes_is_refused(value: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        codec.flatten(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (bytearray(b"abc"), b"abc"),
        (memoryview(b"abcdef")[1:4], b"bcd"),
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"),
        (array.array("H", [1, 2]), b"\1\0\2\0"),
        ((ctypes.c_uint16 * 2)(1, 2), b"\1\0\2\0"),
        ((ctypes.c_int * 0)(), b""),
        (b"", b""),
    ],
)
def test_any_buffer_gives_its_bytes(value: Any, expected: bytes) -> None:
    payload, meta, flags = codec.flatten(value)
    assert (bytes(payload), meta, flags) == (expected, b"", 0)


def test_bytes_can_be_stored_while_another_thread_imports_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", types.ModuleType("numpy"))  # as it looks in the beginning
    assert bytes(codec.flatten(b"abc")[0]) == b"abc"
    assert len(codec.view_writable(bytearray(3))) == 3


def test_a_mapped_file_gives_its_bytes() -> None:
    with mmap.mmap(-1, 4096) as mapped:
        mapped[:3] = b"abc"
        payload, _, _ = codec.flatten(mapped)
        assert bytes(payload[:4]) == b"abc\0"
        payload.release()


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"\xff\xff",
        msgpack.packb(["<f8"]),
        msgpack.packb(["<f8", [3]]),
        msgpack.packb(["|O", [2]]),
        msgpack.packb(["[('a', '<f8')", [2]]),
        msgpack.packb(["__import__('os')", [2]]),
        msgpack.packb([17, [2]]),
    ],
)
def test_a_description_that_does_not_fit_is_corrupt(meta: bytes) -> None:
    with pytest.raises(ValueCorrupt):
        codec.shape_array(np.zeros(16, np.uint8), meta)


@given(st.integers(0, 300) | st.just(5 << 20))
def test_fresh_bytes_take_what_is_written_through_the_view(length: int) -> None:
    content = (bytes(range(251)) * (length // 251 + 1))[:length]
    whole, view = codec.fresh_bytes(length)
    view[:] = content
    if length > 1:
        assert whole == content
    assert bytes(view) == content
    assert bytes(1) == b"\0"


@pytest.mark.parametrize("length", [0, 1, 6, 1 << 20])
def test_thawed_bytes_live_as_long_as_the_array(length: int) -> None:
    thawed = codec.thaw(bytes(bytearray(b"a" * length)))
    part = thawed[length // 2 :]
    del thawed
    part[...] = ord("x")
    assert bytes(part) == b"x" * (length - length // 2)
    assert bytes([97, 97]) == b"a" * 2


@pytest.mark.parametrize(
    "buffer", [bytearray(8), memoryview(bytearray(8)), np.zeros(1), np.zeros((2, 4), "u1"), np.zeros(1, "M8[s]")]
)
def test_a_writable_buffer_is_seen_as_its_bytes(buffer: Any) -> None:
    codec.view_writable(buffer)[:] = b"12345678"
    assert (buffer.tobytes() if isinstance(buffer, np.ndarray) else bytes(buffer)) == b"12345678"


@pytest.mark.parametrize(
    "buffer", [b"read-only", np.zeros(8)[::2], np.zeros(4, object), np.broadcast_to(np.zeros(1), (4,))]
)
def test_a_buffer_that_cannot_be_filled_is_refused(buffer: Any) -> None:
    with pytest.raises(UsageError):
        codec.view_writable(buffer)
