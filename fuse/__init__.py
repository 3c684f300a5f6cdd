"""The mount: the files of a store (memfaas.fs) in the kernel's tree.

This package builds on `memfaas.client` and `memfaas.fs`, and needs pyfuse3. It is the one place where pyfuse3 may
be imported, so that everything else works without FUSE.
"""
