"""Is everything in a file system as it should be? For tests, and for who doubts it. Reads all keys of the store."""

from __future__ import annotations

import stat
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from memfaas.fs.cells import Cells, KeyValue
from memfaas.fs.directory import Directories
from memfaas.fs.presence import Presence
from memfaas.fs.records import ROOT, Inode, number_of, numbers_of


@dataclass
class Findings:
    wrong: list[str] = field(default_factory=list)
    """What must never be."""
    leaked: set[int] = field(default_factory=set)
    """Inodes that no name leads to and nobody will free: a mount was killed while it made them."""


def check(store: KeyValue) -> Findings:
    """Nobody may change the file system meanwhile."""
    cells = Cells(store)
    dirs = Directories(cells)
    findings = Findings()
    keys = store.keys()
    for key in keys:
        if key[:1] in b"idxbnMR":
            cells.load(key)  # settles what a dead one left
    inodes = {
        number_of(key[1:]): Inode.unpack(value)
        for key in keys
        if key[:1] == b"i" and (value := cells.read(key)) is not None
    }
    buried = {ino for key in keys if key[:1] == b"g" for ino in numbers_of(cells.read(key))}
    names = _walk(dirs, inodes, findings)
    for ino, inode in inodes.items():
        count = names[ino]
        if ino == ROOT or count == inode.nlink > 0:
            continue
        if count == 0 and ino not in buried:
            findings.leaked.add(ino)
        elif count != inode.nlink:
            findings.wrong.append(f"inode {ino} has {count} names, and says {inode.nlink}")
    _check_chunks(cells, keys, inodes, findings)
    for key in keys:
        if key[:1] == b"d" and cells.read(key) is not None and number_of(key[1:9]) not in inodes:
            findings.wrong.append(f"a node of directory {number_of(key[1:9])}, which is not there")
    return findings


def _check_chunks(cells: Cells, keys: list[bytes], inodes: dict[int, Inode], findings: Findings) -> None:
    presence = Presence(cells, lambda: None)
    chunks: defaultdict[int, set[int]] = defaultdict(set)
    for key in keys:
        if key[:1] in (b"c", b"b") and number_of(key[1:9]) not in inodes:
            findings.wrong.append(f"data of inode {number_of(key[1:9])}, which is not there")
        elif key[:1] == b"c":
            chunks[number_of(key[1:9])].add(number_of(key[9:]))
    for ino, there in chunks.items():
        for index in sorted(there.difference(presence.present(ino, inodes[ino]))):
            findings.wrong.append(f"chunk {index} of inode {ino}, of which nobody knows")


def _walk(dirs: Directories, inodes: dict[int, Inode], findings: Findings) -> Counter[int]:
    """How many names lead to each inode from the root."""
    names: Counter[int] = Counter()
    waiting = [ROOT]
    while waiting:
        above = waiting.pop()
        for entry in dirs.entries(above):
            names[entry.ino] += 1
            inode = inodes.get(entry.ino)
            if inode is None:
                findings.wrong.append(f"{entry.name!r} in directory {above} leads to inode {entry.ino}: not there")
            elif stat.S_IFMT(inode.mode) != entry.type:
                findings.wrong.append(f"{entry.name!r} in directory {above} has another type than its inode")
            elif inode.is_dir:
                if inode.parent != above:
                    findings.wrong.append(f"directory {entry.ino} is in {above}, and says {inode.parent}")
                if names[entry.ino] == 1:
                    waiting.append(entry.ino)
    return names
