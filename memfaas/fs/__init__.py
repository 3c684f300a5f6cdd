"""A file system in a store: what its bytes mean, and the operations on them. The mount (memfaas.fuse) and the fsspec
file system (memfaas.fs.spec) are two faces of it.

    from memfaas.fs import FileSystem

    with memfaas.connect() as session:
        with FileSystem(session.store("scratch", size="1GiB")) as files:
            files.mkdir("/data")
            files.write_bytes("/data/a", b"bytes")

Begin reading at cells.py (how one thing changes at a time), then directory.py and volume.py.
"""

from memfaas.fs.paths import FileSystem

__all__ = ["FileSystem"]
