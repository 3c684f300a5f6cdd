"""What the values of a file system's store mean: its keys, inodes, and the superblock.

| key | value |
|---|---|
| `S` | the superblock |
| `n` | the next inode number that nobody has taken |
| `i` ino | an inode |
| `d` ino path | a node of a directory (directory.py) |
| `c` ino index | a chunk of a file's data (data.py) |
| `b` ino level number | which chunks of a file there may be (presence.py) |
| `x` ino | extended attributes |
| `t` id | a transaction (cells.py) |
| `M`, `m` id, `g` id | mounts, the sign of life of each, and what it has to free (members.py) |
| `l` ino | locks (locks.py) |
| `R` | changes whenever a directory is moved to another parent |

Inode numbers are never used again, so a key never means anything else later.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from typing import Any

import msgpack

FORMAT = 1
ROOT = 1
SUPERBLOCK = b"S"
NEXT_INODE = b"n"
MEMBERS = b"M"
MOVES = b"R"
NAME_MAX = 255
LINK_MAX = 0xFFFF_FFFF
TARGET_MAX = 4095
DEFAULT_CHUNK = 64 << 10
FILE_MAX = (1 << 63) - 1

_NUMBER = struct.Struct(">Q")
_CHUNK = struct.Struct(">cQQ")
_BITS = struct.Struct(">cQBQ")
_INODE = struct.Struct("<BIIIIQQQBQIQqqqqQB")


def number(value: int) -> bytes:
    return _NUMBER.pack(value)


def number_of(data: bytes) -> int:
    return int(_NUMBER.unpack(data)[0])


def numbers_of(data: bytes | None) -> list[int]:
    """What `number` made, one behind the other."""
    data = data or b""
    return [number_of(data[at : at + 8]) for at in range(0, len(data), 8)]


def inode_key(ino: int) -> bytes:
    return b"i" + _NUMBER.pack(ino)


def chunk_key(ino: int, index: int) -> bytes:
    return _CHUNK.pack(b"c", ino, index)


def bits_key(ino: int, level: int, index: int) -> bytes:
    return _BITS.pack(b"b", ino, level, index)


def xattr_key(ino: int) -> bytes:
    return b"x" + _NUMBER.pack(ino)


def lock_key(ino: int) -> bytes:
    return b"l" + _NUMBER.pack(ino)


@dataclass(slots=True)
class Inode:
    """What a file is, but for its name and data. Times are in ns."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    top: int
    """Bytes up to which there may be data in chunks; it can be more than the size, and, of a sparse file, less."""
    low: int
    """A bit for each of the first chunks that may be there (presence.py)."""
    levels: int
    """How many levels of nodes there may be for the others."""
    rdev: int
    cuts: int
    """How often the file became shorter: who writes data beyond its end can see that it was cut meanwhile."""
    version: int
    """Raised before and after each change of the data: who kept what he read of one version has the newest of it."""
    atime: int
    mtime: int
    ctime: int
    btime: int
    parent: int
    """Of a directory; 0 for all others, which may have several."""
    has_xattrs: int
    target: bytes = b""
    """Of a symbolic link."""

    def pack(self) -> bytes:
        return (
            _INODE.pack(
                FORMAT,
                self.mode,
                self.uid,
                self.gid,
                self.nlink,
                self.size,
                self.top,
                self.low,
                self.levels,
                self.rdev,
                self.cuts & 0xFFFF_FFFF,
                self.version,
                self.atime,
                self.mtime,
                self.ctime,
                self.btime,
                self.parent,
                self.has_xattrs,
            )
            + self.target
        )

    @classmethod
    def unpack(cls, data: bytes) -> Inode:
        fields: tuple[Any, ...] = _INODE.unpack_from(data)
        inode = cls(*fields[1:])
        inode.target = data[_INODE.size :]
        return inode

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_lost(self) -> bool:
        """Whether it only stands for one (lost_inode)."""
        return self.btime == 0

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


def new_inode(mode: int, uid: int, gid: int, now: int, *, rdev: int = 0, parent: int = 0, target: bytes = b"") -> Inode:
    return Inode(mode, uid, gid, 1, len(target), 0, 0, 0, rdev, 0, 0, now, now, now, now, parent, 0, target)


def lost_inode(kind: int) -> Inode:
    """Stands for one whose memory is lost. Only its type is known, from its name."""
    return Inode(kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def drop_privileges(inode: Inode) -> None:
    """Who writes to a file, or gives it away, must not leave others its owner's rights."""
    inode.mode &= ~stat.S_ISUID
    if inode.mode & stat.S_IXGRP:
        inode.mode &= ~stat.S_ISGID


@dataclass(frozen=True)
class Superblock:
    chunk: int
    """Bytes of data under one key."""
    id: bytes

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb({"format": FORMAT, "chunk": self.chunk, "id": self.id})
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Superblock:
        """ValueError when another version of memfaas wrote it, or nobody."""
        try:
            fields = msgpack.unpackb(data)
            if fields["format"] != FORMAT:
                raise ValueError(f"its format is {fields['format']}, this version knows {FORMAT}")
            return cls(int(fields["chunk"]), bytes(fields["id"]))
        except (KeyError, TypeError, msgpack.UnpackException) as error:
            raise ValueError("it holds no file system") from error
