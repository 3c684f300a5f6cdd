"""The mount: the files of a store (memfaas.fs) in the kernel's tree.

This package builds on `memfaas.client` and `memfaas.fs`, and needs pyfuse3. It is the one place where pyfuse3 may
be imported, so that everything else works without FUSE.
"""

import os
import sys

# Before pyfuse3, and for it to see: extra.c says why.
_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from memfaas.fuse import _extra as _extra
finally:
    sys.setdlopenflags(_flags)
