"""The fsspec file system: its own suite for implementations, and libraries that use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import fsspec
import numpy as np
import pandas
import pytest
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from memfaas.client.local import LocalCluster
from memfaas.fs.spec import MemfaasFileSystem
from tests.fuse.conftest import Mount, Mounter

_names = itertools.count()


@pytest.fixture
def spec(cluster: LocalCluster) -> Iterator[MemfaasFileSystem]:
    spec = MemfaasFileSystem(cluster.address, size="64MiB", skip_instance_cache=True)
    yield spec
    spec.close()
    session = spec._connected()
    for one in session.stores():
        session.delete_store(one.spec.name)
    spec.close()


class Fixtures(AbstractFixtures):  # type: ignore[misc]
    @pytest.fixture
    def fs(self, spec: MemfaasFileSystem) -> MemfaasFileSystem:
        return spec

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self) -> str:
        return f"spec{next(_names)}"

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return True


@pytest.mark.slow
class TestCopy(AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.mark.slow
class TestGet(AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


class TestOpen(AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass


class TestPipe(AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.mark.slow
class TestPut(AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


def test_fsspec_knows_the_protocol() -> None:
    assert fsspec.get_filesystem_class("memfaas") is MemfaasFileSystem


def test_a_file_is_what_was_written(spec: MemfaasFileSystem) -> None:
    data = bytes(range(256)) * 1000
    with spec.open("memfaas://s/a/b/f", "wb") as file:
        file.write(data)
    assert spec.cat("s/a/b/f") == data
    assert spec.cat_file("s/a/b/f", 10, 20) == data[10:20]
    assert spec.cat_file("s/a/b/f", -10) == data[-10:]
    assert spec.info("s/a/b/f")["size"] == len(data)
    assert spec.ls("s/a", detail=False) == ["s/a/b"]
    assert spec.find("s") == ["s/a/b/f"]
    assert spec.ls("", detail=False) == ["s"]
    with spec.open("s/a/b/f", "ab") as file:
        file.write(b"more")
    with spec.open("s/a/b/f", "rb") as file:
        file.seek(-4, 2)
        assert file.read() == b"more"
    with spec.open("s/text", "w") as file:
        file.write("äöü\n")
    assert spec.cat("s/text") == "äöü\n".encode()


def test_moving_is_a_rename(spec: MemfaasFileSystem) -> None:
    spec.pipe("s/d/f", b"1")
    spec.mv("s/d", "s/e")
    assert spec.find("s") == ["s/e/f"]
    spec.mv("s/e/f", "s/new/g")
    assert spec.cat("s/new/g") == b"1"
    spec.rm("s/new", recursive=True)
    assert not spec.exists("s/new")


def test_a_transaction_names_its_files_at_its_end(spec: MemfaasFileSystem) -> None:
    with spec.transaction:
        with spec.open("s/f", "wb") as file:
            file.write(b"1")
        assert not spec.exists("s/f")
    assert spec.cat("s/f") == b"1"
    spec.start_transaction()
    spec.open("s/g", "wb").close()
    spec._transaction.complete(commit=False)
    assert spec.ls("s", detail=False) == ["s/f"]


def test_what_is_not_there_is_said(spec: MemfaasFileSystem, cluster: LocalCluster) -> None:
    spec.pipe("s/f", b"1")
    for call in (spec.info, spec.cat, spec.rm, spec.rmdir, spec.ls):
        with pytest.raises(FileNotFoundError):
            call("s/none")
    with pytest.raises(FileNotFoundError, match="no store"):
        MemfaasFileSystem(cluster.address, skip_instance_cache=True).info("none/f")
    with pytest.raises(FileExistsError):
        spec.mkdir("s/f")


def test_a_mount_shows_the_same_files(spec: MemfaasFileSystem, mount: Mounter) -> None:
    spec.pipe("s/d/f", b"from fsspec")
    mounted: Mount = mount("s", "--cache", "0s")
    assert (mounted / "d/f").read_bytes() == b"from fsspec"
    (mounted / "d/g").write_bytes(b"from the mount")
    assert spec.cat("s/d/g") == b"from the mount"


def test_pandas_reads_and_writes(spec: MemfaasFileSystem) -> None:
    frame = pandas.DataFrame({"a": range(1000), "b": np.linspace(0, 1, 1000)})
    with spec.open("s/frame.csv", "w") as file:
        frame.to_csv(file, index=False)
    with spec.open("s/frame.csv") as file:
        pandas.testing.assert_frame_equal(pandas.read_csv(file), frame)


def test_zarr_reads_and_writes(spec: MemfaasFileSystem) -> None:
    store = zarr.storage.FsspecStore(AsyncFileSystemWrapper(spec, asynchronous=True), path="s/array")
    data = np.arange(10_000).reshape(100, 100)
    zarr.create_array(store, data=data, chunks=(10, 100))
    assert np.array_equal(zarr.open_array(store)[:], data)


def test_numpy_saves_and_loads(spec: MemfaasFileSystem) -> None:
    data = np.random.default_rng(1).random((100, 100))
    with spec.open("s/array.npy", "wb") as file:
        np.save(file, data)
    with spec.open("s/array.npy", "rb") as file:
        assert np.array_equal(np.load(file), data)
