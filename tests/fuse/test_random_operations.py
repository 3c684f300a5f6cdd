"""Random reads and writes, compared with a plain sequence of bytes (in the manner of fsx)."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from memfaas.client.store import Store
from memfaas.fs.records import ROOT
from memfaas.fs.volume import Volume
from tests.fuse.conftest import Mount

CHUNK = 4096
LARGEST = 5 * CHUNK

positions = st.one_of(
    st.integers(0, LARGEST),
    st.builds(lambda chunk, by: max(0, chunk * CHUNK + by), st.integers(0, 5), st.integers(-3, 3)),
)
operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "truncate", "append", "punch", "reserve", "flush", "close", "swap"]),
        st.integers(0, 1),
        positions,
        positions,
    ),
    max_size=40,
)


@dataclass
class Model:
    data: bytearray
    fill: int = 0

    def piece(self, length: int) -> bytes:
        self.fill = self.fill % 255 + 1
        return bytes([self.fill]) * length

    def write(self, offset: int, data: bytes) -> None:
        if data:
            self.grow(offset + len(data))
            self.data[offset : offset + len(data)] = data

    def grow(self, size: int) -> None:
        self.data.extend(bytes(max(0, size - len(self.data))))

    def truncate(self, size: int) -> None:
        self.grow(size)
        del self.data[size:]


RELAXED: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.slow
@settings(max_examples=300, **RELAXED)
@example([("write", 1, 0, 1), ("punch", 0, 0, 1)])
@given(operations)
def test_a_file_is_a_sequence_of_bytes(store: Store, steps: list[tuple[str, int, int, int]]) -> None:
    """On two volumes by turns; what one wrote is flushed before the other one's turn."""
    store.clear()
    volumes = [Volume(store, chunk=CHUNK, cache_s=0.0) for _ in range(2)]
    ino, _ = volumes[0].make(ROOT, b"f", 0o100644, 0, 0)
    opened = [volume.files.open(ino) for volume in volumes]
    model = Model(bytearray())
    last = 0
    for name, turn, offset, other in steps:
        files, file = volumes[turn].files, opened[turn]
        if turn != last:
            volumes[last].files.flush(opened[last])
            last = turn
        length = other % (2 * CHUNK)
        match name:
            case "write":
                piece = model.piece(length)
                files.write(file, offset, piece)
                model.write(offset, piece)
            case "append":
                piece = model.piece(length)
                files.append(file, piece)
                model.write(len(model.data), piece)
            case "read":
                assert files.read(file, offset, length) == bytes(model.data[offset : offset + length])
            case "truncate":
                files.truncate(ino, offset, 0)
                model.truncate(offset)
            case "punch":
                files.punch(file, offset, length)
                end = min(offset + length, len(model.data))
                if offset < end:
                    model.data[offset:end] = bytes(end - offset)
            case "reserve":
                files.reserve(file, offset, length, keep_size=bool(other % 2))
                if not other % 2:
                    model.grow(offset + length)
            case "flush":
                files.flush(file)
            case "close":
                files.close(file)
                opened[turn] = files.open(ino)
            case "swap":
                other_volume = volumes[1 - turn]
                files.flush(file)
                assert other_volume.files.read(opened[1 - turn], 0, LARGEST * 3) == bytes(model.data)
        assert volumes[turn].inode(ino).size == len(model.data)
    volumes[last].files.flush(opened[last])
    for volume, file in zip(volumes, opened, strict=True):
        assert volume.files.read(file, 0, LARGEST * 3) == bytes(model.data)


calls = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "read", "truncate", "append", "map", "rewrite"]),
        st.integers(0, 1),
        st.integers(0, 300_000),
        st.integers(0, 150_000),
    ),
    max_size=25,
)


@pytest.mark.slow
@settings(max_examples=40, **RELAXED)
@given(calls)
def test_a_file_on_two_mounts_is_one_sequence_of_bytes(
    pair: tuple[Mount, Mount], steps: list[tuple[str, int, int, int]]
) -> None:
    """Each call opens the file on one of the mounts, and closes it."""
    model = Model(bytearray())
    (pair[0] / "f").write_bytes(b"")
    for name, turn, offset, length in steps:
        path = pair[turn] / "f"
        match name:
            case "write":
                piece = model.piece(length)
                with path.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), piece, offset)
                model.write(offset, piece)
            case "append":
                piece = model.piece(length)
                with path.open("ab") as buffered:
                    buffered.write(piece)
                model.write(len(model.data), piece)
            case "read":
                with path.open("rb", buffering=0) as file:
                    assert os.pread(file.fileno(), length, offset) == model.data[offset : offset + length]
            case "truncate":
                os.truncate(path, offset)
                model.truncate(offset)
            case "map" if model.data:
                with path.open("r+b") as random, mmap.mmap(random.fileno(), 0) as mapped:
                    assert mapped[:] == bytes(model.data)
                    at = offset % len(model.data)
                    piece = model.piece(min(length, len(model.data) - at))
                    mapped[at : at + len(piece)] = piece
                    mapped.flush()
                model.write(at, piece)
            case "rewrite":
                piece = model.piece(length)
                path.write_bytes(piece)
                model.data = bytearray(piece)
        assert (pair[1 - turn] / "f").stat().st_size == len(model.data)
    for mount in pair:
        assert (mount / "f").read_bytes() == model.data
