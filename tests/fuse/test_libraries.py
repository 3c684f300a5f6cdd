"""Libraries that read and write `memfaas://` addresses, and find what others wrote."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array
import dask.config
import dask.dataframe
import fsspec
import numpy as np
import pandas
import pyarrow
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest
import xarray

from memfaas.client.local import LocalCluster
from memfaas.client.session import connect
from memfaas.fs.spec import MemfaasFileSystem
from tests.fuse.conftest import Mounter

STORE = "libraries"
BASE = f"memfaas://{STORE}"


@pytest.fixture
def options(cluster: LocalCluster) -> Iterator[dict[str, Any]]:
    """For a store that comes with the first file."""
    options = {"broker": cluster.address, "size": "64MiB"}
    yield options
    for one in MemfaasFileSystem._cache.values():  # one for each thread that used it
        one.close()
    MemfaasFileSystem.clear_instance_cache()
    with connect(cluster.address) as session:
        session.delete_store(STORE)


@pytest.fixture
def frame() -> pandas.DataFrame:
    random = np.random.default_rng(3)
    return pandas.DataFrame(
        {"day": np.repeat(["mon", "tue"], 5000), "number": np.arange(10_000), "value": random.random(10_000)}
    )


@pytest.fixture
def spec(options: dict[str, Any]) -> MemfaasFileSystem:
    spec: MemfaasFileSystem = fsspec.filesystem("memfaas", **options)
    return spec


def test_pandas(options: dict[str, Any], frame: pandas.DataFrame, mount: Mounter) -> None:
    frame.to_csv(f"{BASE}/deep/er/frame.csv.gz", index=False, storage_options=options)
    again = pandas.read_csv(f"{BASE}/deep/er/frame.csv.gz", storage_options=options)
    pandas.testing.assert_frame_equal(again, frame)
    frame.to_parquet(f"{BASE}/frame.parquet", storage_options=options)
    again = pandas.read_parquet(f"{BASE}/frame.parquet", columns=["value"], storage_options=options)
    pandas.testing.assert_frame_equal(again, frame[["value"]])
    mounted = mount(STORE)
    pandas.testing.assert_frame_equal(pandas.read_parquet(mounted / "frame.parquet"), frame)


def test_pyarrow(spec: MemfaasFileSystem, frame: pandas.DataFrame) -> None:
    table = pyarrow.Table.from_pandas(frame)
    files = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(spec))
    pyarrow.parquet.write_table(table, f"{STORE}/table.parquet", filesystem=files)
    assert pyarrow.parquet.read_table(f"{STORE}/table.parquet", filesystem=files).equals(table)
    pyarrow.dataset.write_dataset(
        table,
        f"{STORE}/parts",
        format="parquet",
        partitioning=["day"],
        filesystem=files,
        max_rows_per_group=2000,
        max_rows_per_file=2000,
    )
    found = pyarrow.dataset.dataset(f"{STORE}/parts", partitioning=["day"], filesystem=files)
    assert len(found.files) == 6
    tuesdays = found.to_table(filter=pyarrow.dataset.field("day") == "tue")
    assert sorted(tuesdays["number"].to_pylist()) == list(range(5000, 10_000))
    files.delete_dir_contents(f"{STORE}/parts")
    assert spec.ls(f"{STORE}/parts") == []


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # dask itself uses it
def test_dask(options: dict[str, Any], frame: pandas.DataFrame) -> None:
    with dask.config.set(scheduler="threads", num_workers=4):
        parts = dask.dataframe.from_pandas(frame, npartitions=5)  # type: ignore[no-untyped-call]
        parts.to_parquet(f"{BASE}/parts", storage_options=options)
        again = dask.dataframe.read_parquet(f"{BASE}/parts", storage_options=options)
        assert again.npartitions == 5
        assert again.groupby("day").number.sum().compute().to_dict() == frame.groupby("day").number.sum().to_dict()
        parts.to_csv(f"{BASE}/csv/*.csv", index=False, storage_options=options)
        again = dask.dataframe.read_csv(f"{BASE}/csv/*.csv", storage_options=options)
        assert int(again.number.sum().compute()) == int(frame.number.sum())
        array = dask.array.arange(10_000, chunks=1000).reshape(100, 100)
        array.to_zarr(f"{BASE}/array.zarr", storage_options=options)
        again = dask.array.from_zarr(f"{BASE}/array.zarr", storage_options=options)  # type: ignore[no-untyped-call]
        assert int(again.sum().compute()) == 49_995_000


def test_xarray(options: dict[str, Any]) -> None:
    data = xarray.Dataset(
        {"t": (("time", "x"), np.random.default_rng(4).random((40, 50)))},
        {"time": pandas.date_range("2020-01-01", periods=40), "x": np.arange(50)},
        {"title": "weather"},
    )
    data.to_zarr(f"{BASE}/data.zarr", storage_options=options, zarr_format=2, consolidated=True)
    later = data.assign_coords(time=data.time + np.timedelta64(40, "D"))
    later.to_zarr(f"{BASE}/data.zarr", storage_options=options, append_dim="time")
    with xarray.open_zarr(f"{BASE}/data.zarr", storage_options=options) as again:
        xarray.testing.assert_identical(again.load(), xarray.concat([data, later], "time"))


def test_another_process_gets_the_file_system_by_pickle(spec: MemfaasFileSystem, tmp_path: Path) -> None:
    """As the workers of dask do."""
    spec.pipe(f"{STORE}/f", b"1")
    again = pickle.loads(pickle.dumps(spec))
    assert again.cat(f"{STORE}/f") == b"1"
    spec.get(f"{STORE}/f", str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == b"1"
