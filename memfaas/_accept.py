"""What the values of settings may be: functions that read what a person wrote, or refuse it.

Each also takes its own result, and raises UsageError without naming the setting: its caller knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from memfaas import auth
from memfaas.addresses import Address, parse_address
from memfaas.errors import UsageError
from memfaas.units import format_duration, format_size, parse_duration, parse_size


def size(minimum: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        amount = parse_size(value)
        if amount < minimum:
            raise UsageError(f"{format_size(amount)} is too little; at least {format_size(minimum)}")
        return amount

    return parse


def size_or_auto(minimum: int) -> Callable[[Any], int | Literal["auto"]]:
    parse_amount = size(minimum)

    def parse(value: Any) -> int | Literal["auto"]:
        if isinstance(value, str) and value.strip().lower() == "auto":
            return "auto"
        return parse_amount(value)

    return parse


def duration(minimum: float, maximum: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        seconds = parse_duration(value)
        if not minimum <= seconds <= maximum:
            raise UsageError(
                f"{format_duration(seconds)} is out of range; "
                f"from {format_duration(minimum)} to {format_duration(maximum)}"
            )
        return seconds

    return parse


def integer(minimum: int, maximum: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        digits = value.strip() if isinstance(value, str) else str(value)
        if isinstance(value, bool) or not isinstance(value, str | int) or not re.fullmatch(r"-?[0-9]{1,18}", digits):
            raise UsageError(f"{value!r} is not a whole number")
        if not minimum <= int(digits) <= maximum:
            raise UsageError(f"{digits} is out of range; from {minimum} to {maximum}")
        return int(digits)

    return parse


def choice(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise UsageError(f"{value!r} is none of {', '.join(choices)}")
        return str(value)

    return parse


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{value!r} is not a text")
    return value.strip()


def host(value: Any) -> str:
    name = text(value).removeprefix("[").removesuffix("]")
    if re.search(r"[\s/?#@\[\]]", name):
        raise UsageError(f"{value!r} is not a host name or IP address")
    return name


def host_or_auto(value: Any) -> str | None:
    return None if value is None or value == "auto" else host(value)


def donor_name(value: Any) -> str:
    # It is also the name of a folder.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", text(value)):
        raise UsageError(f"{value!r} is not a donor's name: 1 to 64 letters, digits and ._- and no dot at the start")
    return text(value)


def tenant(value: Any) -> str | None:
    return None if value is None else auth.valid_tenant(text(value))


def store_name(value: Any) -> str:
    # As it is, spaces too: it may be another program's.
    if not isinstance(value, str) or not value or not value.isprintable():
        raise UsageError(f"{value!r} is not a store's name")
    return value


def device(value: Any) -> str:
    # The choice among several is made where it is used: what a port is like may change.
    if value in ("", "auto"):
        return ""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,60}(:[1-9][0-9]{0,2}(:[0-9]{1,3})?)?", text(value)):
        raise UsageError(f"{value!r} is not an RDMA device: NAME[:PORT[:GID]], like mlx5_0 or mlx5_0:1:3")
    return text(value)


def path(value: Any) -> Path:
    words = str(value) if isinstance(value, Path) else text(value)
    if "\0" in words:
        raise UsageError(f"{value!r} is not a path")
    try:
        return Path(words).expanduser().absolute()
    except RuntimeError as error:  # ~someone who does not exist
        raise UsageError(f"{value!r}: {error}") from None


def path_or_none(value: Any) -> Path | None:
    return None if value is None else path(value)


def address(value: Any) -> Address:
    return value if isinstance(value, Address) else parse_address(text(value))
