"""The mount: a store shown as a file system.

This package builds on `memfaas.client` only, and needs the `fuse` extra (pyfuse3). It is the
one place where pyfuse3 may be imported, so that everything else works without FUSE.
"""
