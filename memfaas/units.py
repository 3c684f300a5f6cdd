"""Sizes and durations as people write them, and back.

A size is a number of bytes; k, M, G, T (and KiB, MiB, GiB, TiB) are powers of 1024, while kB, MB,
GB, TB are powers of 1000. A duration is a number of seconds. Upper and lower case are the same.
"""

from __future__ import annotations

import math
import operator
import re
from fractions import Fraction
from typing import SupportsIndex

from memfaas.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_MAX_SIZE = (1 << 63) - 1
"""The largest offset that the kernel knows."""

_SIZE_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _SIZE_UNITS[_letter] = _SIZE_UNITS[f"{_letter}ib"] = 1024**_power
    _SIZE_UNITS[f"{_letter}b"] = 1000**_power

_DURATION_UNITS: dict[str, Fraction] = {
    name: Fraction(seconds)
    for names, seconds in (
        ("us µs", "1/1000000"),
        ("ms", "1/1000"),
        ("s sec", "1"),
        ("m min", "60"),
        ("h", "3600"),
        ("d", "86400"),
    )
    for name in names.split()
}

_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
_SIZE = re.compile(rf"{_NUMBER}\s*([a-z]*)", re.ASCII)
_DURATION_PART = re.compile(rf"{_NUMBER}\s*([a-zµ]+)\s*")
_SECONDS = re.compile(_NUMBER)
_NEGATIVE = re.compile(r"-\s*[0-9]")

_SIZE_HELP = "a size is a number of bytes, or a number with a unit, like 512MiB, 16GiB, 64k or 1.5GB"
_DURATION_HELP = "a duration is a number of seconds, or numbers with units, like 500ms, 30s, 5min or 1h30min"


def parse_size(value: str | SupportsIndex) -> int:
    """Bytes of a size such as `"512MiB"`, `"64k"`, `"1.5GB"` or `4096`; a fraction is rounded down.

    Raises UsageError when it makes no sense.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        match = _SIZE.fullmatch(text)
        if _NEGATIVE.match(text):
            raise UsageError(f"{_shown(value)} is not a size: it must not be negative")
        if match is None or match[2] not in _SIZE_UNITS:
            raise UsageError(f"{_shown(value)} is not a size; {_SIZE_HELP}")
        size = int(Fraction(match[1]) * _SIZE_UNITS[match[2]])
    else:
        try:
            if isinstance(value, bool):
                raise TypeError
            size = operator.index(value)
        except TypeError:
            raise UsageError(f"{_shown(value)} is not a size; {_SIZE_HELP}") from None
    if not 0 <= size <= _MAX_SIZE:
        raise UsageError(f"{_shown(value)} is not a size: it must be from 0 to 2^63 - 1 bytes")
    return size


def format_size(size: int) -> str:
    """A size for people, to within half a percent: `"512 MiB"`, `"1.5 GiB"`, `"100 B"`."""
    if abs(size) < KIB:
        return f"{size} B"
    for unit, name in ((KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB")):
        text = _digits(size / unit)
        if abs(float(text)) < 1024:
            return f"{text} {name}"
    return f"{_digits(size / TIB)} TiB"


def parse_duration(value: str | float) -> float:
    """Seconds of a duration such as `"500ms"`, `"30s"`, `"1h30min"` or `2.5`.

    Raises UsageError when it makes no sense.
    """
    if isinstance(value, str):
        return _parse_duration_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{_shown(value)} is not a duration; {_DURATION_HELP}")
    if not 0 <= value < math.inf:
        raise UsageError(f"{_shown(value)} is not a duration: it must be finite and not negative")
    return float(value)


def _parse_duration_text(value: str) -> float:
    text = value.strip().lower()
    if _SECONDS.fullmatch(text):
        return float(text)
    if _NEGATIVE.match(text):
        raise UsageError(f"{_shown(value)} is not a duration: it must not be negative")
    total = Fraction(0)
    end = 0
    while match := _DURATION_PART.match(text, end):
        if match[2] not in _DURATION_UNITS:
            break
        total += Fraction(match[1]) * _DURATION_UNITS[match[2]]
        end = match.end()
    if not text or end < len(text):
        raise UsageError(f"{_shown(value)} is not a duration; {_DURATION_HELP}")
    return float(total)


def format_duration(seconds: float) -> str:
    """A duration for people: `"850 µs"`, `"12.3 ms"`, `"30 s"`, `"2 min 5 s"`, `"3 h 20 min"`."""
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if seconds < 0.9995e-3:
        return f"{_digits(seconds * 1e6)} µs"
    if seconds < 0.9995:
        return f"{_digits(seconds * 1e3)} ms"
    if seconds < 59.5:
        return f"{_digits(seconds)} s"
    if seconds < 3599.5:
        return _two_parts(round(seconds), 60, "min", "s")
    if round(seconds / 60) < 24 * 60:
        return _two_parts(round(seconds / 60), 60, "h", "min")
    return _two_parts(round(seconds / 3600), 24, "d", "h")


def _two_parts(amount: int, ratio: int, large: str, small: str) -> str:
    whole, rest = divmod(amount, ratio)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def _digits(value: float) -> str:
    """Three digits that count, without idle zeros after the point."""
    places = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
