"""Where a broker is: `HOST:PORT`, or `memfaas://HOST:PORT?secret=/path/to/secret`.

The long form carries all that is needed to connect; `LocalCluster.address` has it.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from memfaas.errors import UsageError

DEFAULT_PORT = 7411
_SCHEME = "memfaas://"
_HELP = f"an address is HOST, HOST:PORT (default port {DEFAULT_PORT}), or memfaas://HOST:PORT?secret=/path/to/secret"


@dataclass(frozen=True)
class Address:
    """A broker's host and port, and the secret file to use with it, if the address names one."""

    host: str
    port: int
    secret_file: Path | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.secret_file is None:
            return f"{host}:{self.port}"
        return f"{_SCHEME}{host}:{self.port}?secret={urllib.parse.quote(str(self.secret_file))}"


def parse_address(text: str) -> Address:
    """Reads either form. An IPv6 host stands in brackets: `[::1]:7411`.

    Raises UsageError when it makes no sense.
    """
    place, secret_file = text.strip(), None
    if place.lower().startswith(_SCHEME):
        place, _, query = place[len(_SCHEME) :].partition("?")
        place = place.removesuffix("/")
        secret_file = _secret_of(query, text)
    elif "://" in place:
        raise _nonsense(text, "its scheme is not memfaas")
    host, port = _split(place, text)
    return Address(host, port, secret_file)


def _secret_of(query: str, text: str) -> Path | None:
    try:
        options = urllib.parse.parse_qs(query, keep_blank_values=True, strict_parsing=True) if query else {}
    except ValueError:
        raise _nonsense(text, "what follows the ? is not name=value") from None
    unknown = sorted(options.keys() - {"secret"})
    if unknown:
        raise _nonsense(text, f"it has an unknown part {unknown[0]!r}")
    secrets = options.get("secret", [])
    if len(secrets) > 1 or secrets == [""]:
        raise _nonsense(text, "secret= must name one file")
    return Path(secrets[0]).expanduser() if secrets else None


def _split(place: str, text: str) -> tuple[str, int]:
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or rest[:1] not in ("", ":"):
            raise _nonsense(text, "the brackets around an IPv6 host do not match")
        port = rest[1:] if rest else str(DEFAULT_PORT)
    elif place.count(":") > 1:
        raise _nonsense(text, "an IPv6 host stands in brackets, like [::1]:7411")
    else:
        host, colon, port = place.partition(":")
        port = port if colon else str(DEFAULT_PORT)
    if not host or any(c.isspace() or c in "/?#@[]" for c in host):
        raise _nonsense(text, "it names no host")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise _nonsense(text, "a port is a number from 1 to 65535")
    return host, int(port)


def _nonsense(text: str, reason: str) -> UsageError:
    shown = repr(text) if len(text) <= 100 else repr(text[:97]) + "..."
    return UsageError(f"{shown} is not a broker's address: {reason}; {_HELP}")
