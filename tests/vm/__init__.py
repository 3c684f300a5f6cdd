"""Tests that need a kernel of their own: they run in a virtual machine, which `conftest.py` starts."""
