"""How messages travel: one typed structure each, as msgpack of `[type, {field: value}]`.

An unknown field is ignored (a newer peer), an unknown type is a `ProtocolError`. The types of the fields are
checked on arrival.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from memfaas.errors import ProtocolError

VERSION = 1
"""Version of the control protocol; both sides say theirs in the hello and must agree."""


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""


TYPES: dict[str, type[Message]] = {}
"""All that there are, by their names on the wire."""


class Message(Struct, frozen=True, kw_only=True):
    """A message; its class name is its type on the wire."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TYPES[cls.__name__] = cls


def encode(message: Message) -> bytes:
    packed: bytes = msgpack.packb([type(message).__name__, msgspec.to_builtins(message, builtin_types=(bytes,))])
    return packed


def decode(data: bytes) -> Message:
    """Raises ProtocolError for anything that is not a well-formed, well-typed message."""
    try:
        name, fields = msgpack.unpackb(data)
        kind = TYPES[name]
        return msgspec.convert(fields, kind)
    except KeyError:
        raise ProtocolError(f"unknown message {str(name)[:60]!r}") from None
    except Exception as error:  # msgpack raises many kinds on hostile bytes; all mean the same
        raise ProtocolError(f"malformed message: {error}") from error


class Done(Message, frozen=True, kw_only=True):
    """Reply of requests that have nothing to say but that they are done."""
