"""Slurm's lists of hosts, such as `rack[1-2]n[01-03,7],login`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product

from memfaas.errors import ProtocolError

MOST = 1 << 16
"""Nodes that a cluster of Slurm has at most."""

_BRACKETS = re.compile(r"\[([^\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", re.ASCII)


def expand(text: str, most: int = MOST) -> list[str]:
    """The names in a list of hosts. Raises ProtocolError, also for more names than `most`: before it makes them."""
    names: list[str] = []
    for word in _words(text):
        names += _expand_word(word, most - len(names))
    return names


def _words(text: str) -> Iterator[str]:
    """What stands between commas that are not in brackets."""
    yield from re.findall(r"(?:\[[^\]]*\]|[^,])+", text)


def _expand_word(word: str, most: int) -> list[str]:
    parts = _BRACKETS.split(word)  # text and content of brackets by turns
    if any(set("[]") & set(part) for part in parts):
        raise ProtocolError(f"{word[:100]!r} is not a list of hosts")
    choices = [_numbers(part, most) if index % 2 else [part] for index, part in enumerate(parts)]
    if math.prod(map(len, choices)) > most:
        raise ProtocolError(f"{word[:100]!r} are more than {most} hosts")
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(text: str, most: int) -> list[str]:
    """`1-3,07` is 1, 2, 3, 07: a range is as wide as its first number."""
    found: list[str] = []
    for part in text.split(","):
        ends = _RANGE.fullmatch(part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if ends is None or last < first:
            raise ProtocolError(f"[{text[:100]}] is not a range in a list of hosts")
        if last - first >= most - len(found):
            raise ProtocolError(f"[{text[:100]}] are more than {most} hosts")
        found += [f"{number:0{len(ends[1])}}" for number in range(first, last + 1)]
    return found
