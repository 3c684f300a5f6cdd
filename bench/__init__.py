"""Benchmarks of memfaas and, in the same run, of what people would use instead.

Every number in the documentation comes from a command in this package. A peer that is not
installed is named as skipped; it is never left out silently.
"""
