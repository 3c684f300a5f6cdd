"""The floor: a file system by pyfuse3 that keeps all in a dictionary, and does only what is needed for that."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from typing import Any

import pyfuse3
import trio


class Bare(pyfuse3.Operations):
    """One folder with files. The kernel keeps names and attributes for a second, as it does for a mount of memfaas."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[bytes, Any] = {}
        self.data: dict[Any, bytearray] = {}
        self.last: int = pyfuse3.ROOT_INODE

    def _attributes(self, ino: Any) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        is_root = ino == pyfuse3.ROOT_INODE
        entry.st_ino = ino
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644)
        entry.st_nlink = 1
        entry.st_size = 0 if is_root else len(self.data[ino])
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.entry_timeout = entry.attr_timeout = 1.0
        return entry

    async def lookup(self, parent_inode: Any, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name not in self.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(self.names[name])

    async def getattr(self, inode: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(self, inode: Any, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            data = self.data[inode]
            del data[attr.st_size :]
            data.extend(bytes(attr.st_size - len(data)))
        return self._attributes(inode)

    async def create(self, parent_inode: Any, name: bytes, mode: Any, flags: Any, ctx: Any) -> Any:
        self.last += 1
        self.names[name] = self.last
        self.data[self.last] = bytearray()
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(self.last)), self._attributes(self.last)

    async def open(self, inode: Any, flags: Any, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self.data[inode] = bytearray()
        return pyfuse3.FileInfo(fh=inode)

    async def unlink(self, parent_inode: Any, name: bytes, ctx: Any) -> None:
        del self.names[name]

    async def read(self, fh: Any, off: int, size: int) -> bytes:
        piece: Any = memoryview(self.data[fh])[off : off + size]
        return piece  # type: ignore[no-any-return]

    async def write(self, fh: Any, off: int, buf: bytes) -> int:
        self.data[fh][off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh: Any) -> None: ...

    async def fsync(self, fh: Any, datasync: bool) -> None: ...

    async def release(self, fh: Any) -> None: ...

    async def opendir(self, inode: Any, ctx: Any) -> Any:
        return inode

    async def readdir(self, fh: Any, start_id: int, token: Any) -> None:
        for number, (name, ino) in enumerate(list(self.names.items())[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._attributes(ino), number):
                return

    async def releasedir(self, fh: Any) -> None: ...

    async def access(self, inode: Any, mode: Any, ctx: Any) -> bool:
        return True


async def _serve() -> None:
    async def end() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                pyfuse3.terminate()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> None:
    pyfuse3.init(Bare(), sys.argv[1], {"default_permissions", "fsname=bare"})
    print("ready", flush=True)
    try:
        trio.run(_serve)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
