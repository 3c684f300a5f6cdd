"""Keys and values that say which put wrote them, for histories that are checked afterwards."""

from __future__ import annotations

TORN = 1
"""Number of what is no value that anybody has put, or not all of one."""


def key_of(number: int) -> bytes:
    return b"key-%d" % number


class Values:
    """Values of eight lengths, each a multiple of 8: a number, repeated. Its rest by 8 says which length."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def value_of(self, number: int) -> bytes:
        """`number`: above TORN, a multiple of 8 plus the index of its length."""
        return number.to_bytes(8, "little") * (self.lengths[number % 8] // 8)

    def number_of(self, value: bytes) -> int:
        number = int.from_bytes(value[:8], "little")
        return number if number > TORN and value == self.value_of(number) else TORN
