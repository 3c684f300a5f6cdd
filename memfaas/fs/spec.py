"""`memfaas://STORE/path` for fsspec, and so for pandas, xarray, zarr, pyarrow and dask: the same files that the
mounts show.

import fsspec

with fsspec.open("memfaas://scratch/run7/log.txt", "w", size="1GiB") as file:
    file.write("text")
"""

from __future__ import annotations

import datetime
import io
import os
import secrets
import stat
import threading
from typing import Any

from fsspec.spec import AbstractFileSystem

import memfaas
from memfaas.errors import UnknownStore
from memfaas.fs.paths import FileSystem
from memfaas.fs.records import Inode

_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


class MemfaasFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Files in stores. The first part of a path is the store's name.

    broker, tenant, secret_file, fabric, timeout: as for `memfaas.connect`.
    size: of a store that does not exist and has to be made, as text or bytes. Without it, it must exist.

    Folders that a file needs are made. Errors are those of FileSystem: FileNotFoundError and other OSErrors.
    """

    protocol = "memfaas"
    root_marker = ""

    def __init__(
        self,
        broker: str | None = None,
        *,
        size: str | int | None = None,
        tenant: str | None = None,
        secret_file: str | None = None,
        fabric: Any = None,
        timeout: str | float | None = None,
        **storage_options: Any,
    ) -> None:
        super().__init__(**storage_options)
        self._size = size
        self._connection: dict[str, Any] = {
            "address": broker,
            "tenant": tenant,
            "secret_file": secret_file,
            "fabric": fabric,
            "timeout": timeout,
        }
        self._opening = threading.Lock()
        self._session: memfaas.Session | None = None
        self._stores: dict[tuple[int, str], FileSystem] = {}

    # --- which store --------------------------------------------------------------------------------------

    def _split(self, path: str) -> tuple[FileSystem, str]:
        """The file system, and the path in it. FileNotFoundError when there is no such store."""
        name, _, inside = self._strip_protocol(path).partition("/")
        if not name:
            raise FileNotFoundError("the first part of a path is the name of a store")
        return self._files(name), "/" + inside

    def _files(self, store: str) -> FileSystem:
        key = (os.getpid(), store)
        with self._opening:
            found = self._stores.get(key)
            if found is None:
                session = self._connected()
                try:
                    opened = session.store(store)
                except UnknownStore as error:
                    if self._size is None:
                        raise FileNotFoundError(f"there is no store {store!r}, and no size to make one") from error
                    opened = session.store(store, size=self._size, persistent=True)
                found = self._stores[key] = FileSystem(opened)
            return found

    def _connected(self) -> memfaas.Session:
        if self._session is None:
            self._session = memfaas.connect(**self._connection)
        return self._session

    def close(self) -> None:
        """Writes what waits, and ends the session. The next use opens another one."""
        with self._opening:
            for (pid, _), files in self._stores.items():
                if pid == os.getpid():
                    files.close()
            self._stores.clear()
            if self._session is not None:
                self._session.close()
                self._session = None

    # --- what is there ------------------------------------------------------------------------------------

    def _described(self, path: str, inode: Inode) -> dict[str, Any]:
        return {
            "name": path,
            "size": inode.size if not inode.is_dir else 0,
            "type": _TYPES.get(stat.S_IFMT(inode.mode), "other"),
            "created": inode.btime / 1e9,
            "mtime": inode.mtime / 1e9,
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.gid,
            "nlink": inode.nlink,
        }

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if not path:
            return {"name": "", "size": 0, "type": "directory"}
        files, inside = self._split(path)
        found = self._described(path, files.stat(inside, follow=False))
        if found["type"] == "link":
            found = self._described(path, files.stat(inside)) | {"islink": True}
        return found

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if not path:
            names = [one.spec.name for one in self._connected().stores()]
            found: list[dict[str, Any]] = [{"name": name, "size": 0, "type": "directory"} for name in names]
        else:
            found = [self.info(path)]
            if found[0]["type"] == "directory":
                files, inside = self._split(path)
                found = [
                    self._described(f"{path}/{os.fsdecode(entry.name)}", inode) for entry, inode in files.scan(inside)
                ]
                found = [self.info(one["name"]) if one["type"] == "link" else one for one in found]
        found.sort(key=lambda one: str(one["name"]))
        return found if detail else [one["name"] for one in found]

    def created(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["created"], tz=datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    # --- folders ------------------------------------------------------------------------------------------

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        files, inside = self._split(path)
        if inside == "/":
            raise FileExistsError(path)
        if create_parents and "/" in inside.strip("/"):
            self._make_parents(files, inside)
        files.mkdir(inside)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        files, inside = self._split(path)
        if files.exists(inside):
            if not exist_ok or not files.stat(inside).is_dir:
                raise FileExistsError(path)
            return
        files.mkdir(inside, parents=True)

    @staticmethod
    def _make_parents(files: FileSystem, inside: str) -> None:
        parent = inside.rstrip("/").rpartition("/")[0]
        if parent and not files.exists(parent):
            files.mkdir(parent, parents=True)

    def rmdir(self, path: str) -> None:
        files, inside = self._split(path)
        files.rmdir(inside)

    # --- files --------------------------------------------------------------------------------------------

    def rm_file(self, path: str) -> None:
        files, inside = self._split(path)
        files.remove(inside)

    _rm = rm_file

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        for one in reversed(self.expand_path(path, recursive=recursive, maxdepth=maxdepth)):
            if self.info(one)["type"] == "directory":
                if self._split(one)[1] != "/":
                    self.rmdir(one)
            else:
                self.rm_file(one)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        if self.isdir(path1):
            self.makedirs(path2, exist_ok=True)
            return
        with self.open(path1, "rb") as source, self.open(path2, "wb") as target:
            while piece := source.read(1 << 20):
                target.write(piece)

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        """A rename, and so atomic, within one store."""
        if isinstance(path1, str) and isinstance(path2, str) and "*" not in path1 and not path2.endswith("/"):
            (one, source), (two, target) = self._split(path1), self._split(path2)
            if one is two and not (two.exists(target) and two.stat(target).is_dir):
                self._make_parents(two, target)
                one.rename(source, target)
                return
        super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        files, inside = self._split(path)
        if (start or 0) < 0 or (end or 0) < 0:
            size = files.stat(inside).size
            start = start if start is None or start >= 0 else max(size + start, 0)
            end = end if end is None or end >= 0 else size + end
        return files.read_bytes(inside, start or 0, end)

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        files, inside = self._split(path)
        if truncate or not files.exists(inside):
            self._make_parents(files, inside)
            files.write_bytes(inside, b"")
        else:
            files.utime(inside)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        files, inside = self._split(path)
        if mode[:1] != "r":
            self._make_parents(files, inside)
        if autocommit or mode[:1] == "r":
            return files.open(inside, mode)
        draft = f"{inside}.{secrets.token_hex(4)}.draft"
        return _Draft(files, inside, draft, mode)


class _Draft(io.BufferedWriter):
    """A file of an fsspec transaction: it gets its name when that is committed."""

    def __init__(self, files: FileSystem, path: str, draft: str, mode: str) -> None:
        if mode[:1] == "a" and files.exists(path):
            files.write_bytes(draft, files.read_bytes(path))
        super().__init__(files._open(draft, mode), files.chunk)
        self._files, self._path, self._draft = files, path, draft

    def commit(self) -> None:
        self._files.rename(self._draft, self._path)

    def discard(self) -> None:
        self._files.remove(self._draft)
