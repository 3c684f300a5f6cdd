"""Exit status 0 when the Python that runs this is good enough to build memfaas."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("too old")

import ensurepip  # noqa: F401  (Debian packs it separately)
import sysconfig
import venv  # noqa: F401
from pathlib import Path

if not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.exit("no headers")
