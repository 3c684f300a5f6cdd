"""Who may do what: the cluster secret, keys derived from it, tickets, and the two handshakes.

The broker and the donors share one secret (a file, mode 0600). From it come, by HMAC-SHA256
with a label each, the donors' key, one key per tenant, and one ticket key per donor. A key file
given to a tenant therefore opens nothing of another tenant's.

Both handshakes are three messages, mutual, and bound to fresh nonces of both sides, so a recorded
one is worth nothing:

    client -> Hello | TicketHello (nonce c)
    server -> Challenge (nonce s, HMAC(key, "server" c s context))
    client -> Answer (HMAC(key, "client" c s context))
    server -> Welcome | Refused

The steps are pure functions on messages; `memfaas.rpc` and `memfaas.fabric` move the bytes.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import msgpack
import msgspec

from memfaas import messages
from memfaas.errors import AccessError, ProtocolError, TicketExpired, UsageError, from_code
from memfaas.messages import short

DEFAULT_SECRET_FILE = Path("~/.config/memfaas/secret")
OPERATOR = "operator"
"""The tenant that sees what belongs to every tenant (but may touch only its own)."""
TICKET_LIFE_S = 300.0
CLOCK_SKEW_S = 30.0
"""How far the clocks of two nodes may differ before tickets are refused wrongly."""
_NONCE = 16


def derive(secret: bytes, label: str) -> bytes:
    return hmac.digest(secret, label.encode(), "sha256")


@dataclass(frozen=True)
class Credentials:
    """What a client or donor proves itself with to the broker."""

    name: str
    key: bytes

    @classmethod
    def of_donor(cls, secret: bytes, donor: str) -> Credentials:
        return cls(donor, derive(secret, "donor"))

    @classmethod
    def of_tenant(cls, secret: bytes, tenant: str) -> Credentials:
        return cls(tenant, derive(secret, f"tenant:{tenant}"))


def ticket_key(secret: bytes, donor: str) -> bytes:
    return derive(secret, f"ticket:{donor}")


# --- files --------------------------------------------------------------------------------------


def create_secret(path: Path) -> None:
    """Makes a new secret file, mode 0600; an existing one stays as it is."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(draft, path)  # atomic, and never over a secret that is in use
        except FileExistsError:
            pass
    finally:
        draft.unlink()


def write_tenant_key(path: Path, credentials: Credentials) -> None:
    """Writes a file that lets its reader be this one tenant: `tenant:hexkey`, mode 0600."""
    handle = os.open(path.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f"{credentials.name}:{credentials.key.hex()}\n")


def _read_private(path: Path) -> str:
    path = path.expanduser()
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except OSError as error:
        raise AccessError(
            f"cannot read the secret file {path} ({error.strerror}); a broker (`memfaas up`) makes it: copy it "
            "from the broker's node, or name another with --secret-file or MEMFAAS_SECRET_FILE"
        ) from error
    except UnicodeDecodeError as error:
        raise AccessError(f"{path} is not a secret file of memfaas") from error
    if stat.S_IMODE(mode) & 0o077:
        raise AccessError(f"the secret file {path} can be read by others; run: chmod 600 {path}")
    return text


def _key_of_hex(text: str, path: Path) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise AccessError(f"{path} is not a secret file of memfaas: expected 64 hexadecimal digits")
    return key


def read_secret(path: Path) -> bytes:
    """The cluster secret. AccessError when the file is missing, malformed or open to others."""
    return _key_of_hex(_read_private(path), path)


def read_credentials(path: Path, tenant: str | None = None) -> Credentials:
    """A client's credentials, from the cluster secret or from a tenant's key file."""
    text = _read_private(path)
    name, colon, key = text.rpartition(":")
    if not colon:
        return Credentials.of_tenant(_key_of_hex(text, path), tenant or _login())
    if tenant is not None and tenant != name:
        raise AccessError(
            f"{path} is the key of tenant {name!r}, not of {tenant!r}; name the cluster's secret, or the key of "
            f"{tenant!r}, with --secret-file or MEMFAAS_SECRET_FILE"
        )
    return Credentials(name, _key_of_hex(key, path))


def _login() -> str:
    """The login name as a tenant. A container may run us under a number that has no name."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"
    return "".join(c if c.isalnum() or c in "._-@" else "_" for c in name)[:64]


# --- tickets ------------------------------------------------------------------------------------


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """A capability for one lease. Whoever knows its proof key holds it."""

    tenant: str
    lease: bytes
    epoch: int
    """Of the lease: what was moved, or is newer, it does not open."""
    donor: str
    expires: float
    """Seconds since 1970, by the broker's clock."""
    uid: int | None
    """User id that a process on the same node must have; None: any."""

    def encode(self) -> bytes:
        packed: bytes = msgpack.packb(msgspec.to_builtins(self, builtin_types=(bytes,)))
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Ticket:
        try:
            return msgspec.convert(msgpack.unpackb(data), cls)
        except Exception as error:  # hostile bytes
            raise ProtocolError(f"malformed ticket: {error}") from error


def proof_key(key: bytes, ticket: bytes) -> bytes:
    """The secret half of a ticket; `key` is the donor's ticket key."""
    return hmac.digest(key, b"proof:" + ticket, "sha256")


def check_ticket(data: bytes, *, lease: bytes, epoch: int, tenant: str, donor: str, now: float | None = None) -> Ticket:
    """Whether an encoded ticket is for this lease at this epoch, and still good. Raises AccessError.

    It proves nothing yet: a forger fails the handshake, for want of the proof key.
    """
    ticket = Ticket.decode(data)
    if (ticket.lease, ticket.tenant, ticket.donor) != (lease, tenant, donor):
        raise AccessError(f"this ticket is not for lease {short(lease)} on donor {donor}")
    if ticket.epoch != epoch:
        raise AccessError(f"this ticket is for epoch {ticket.epoch} of lease {short(lease)}, which is at {epoch}")
    if ticket.expires + CLOCK_SKEW_S < (time.time() if now is None else now):
        raise TicketExpired(f"the ticket for lease {short(lease)} has expired; ask the broker for a new one")
    return ticket


# --- handshakes ---------------------------------------------------------------------------------


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE)


def _proof(key: bytes, side: bytes, client_nonce: bytes, server_nonce: bytes, context: bytes) -> bytes:
    return hmac.digest(key, b"\0".join((side, client_nonce, server_nonce, context)), hashlib.sha256)


def _context(hello: messages.Hello | messages.TicketHello) -> bytes:
    if isinstance(hello, messages.Hello):
        return f"{hello.role}:{hello.name}".encode()
    return hello.fabric.encode() + b":" + hello.ticket


def check_hello(hello: messages.Message) -> None:
    """Version and nonce of a hello, before anything else is believed."""
    if not isinstance(hello, messages.Hello | messages.TicketHello):
        raise ProtocolError(f"expected a hello, got {type(hello).__name__}")
    if hello.version != messages.VERSION:
        raise ProtocolError(f"protocol version {hello.version} is not ours ({messages.VERSION}); update the older side")
    if len(hello.nonce) != _NONCE:
        raise ProtocolError("a nonce has 16 bytes")


def challenge(hello: messages.Hello | messages.TicketHello, key: bytes) -> messages.Challenge:
    """The server's step."""
    nonce = new_nonce()
    return messages.Challenge(
        version=messages.VERSION, nonce=nonce, proof=_proof(key, b"server", hello.nonce, nonce, _context(hello))
    )


def answer(hello: messages.Hello | messages.TicketHello, reply: messages.Message, key: bytes) -> messages.Answer:
    """The client's second step. AccessError when the server does not know the key."""
    if isinstance(reply, messages.Refused):
        raise from_code(reply.code, reply.text)
    if not isinstance(reply, messages.Challenge):
        raise ProtocolError(f"expected a challenge, got {type(reply).__name__}")
    expected = _proof(key, b"server", hello.nonce, reply.nonce, _context(hello))
    if not hmac.compare_digest(expected, reply.proof):
        raise AccessError("the other side does not know our secret; compare the secret files of both nodes")
    return messages.Answer(proof=_proof(key, b"client", hello.nonce, reply.nonce, _context(hello)))


def check_answer(
    hello: messages.Hello | messages.TicketHello, asked: messages.Challenge, reply: messages.Message, key: bytes
) -> None:
    """The server's last step. AccessError when the client does not know the key."""
    if not isinstance(reply, messages.Answer):
        raise ProtocolError(f"expected an answer, got {type(reply).__name__}")
    expected = _proof(key, b"client", hello.nonce, asked.nonce, _context(hello))
    if not hmac.compare_digest(expected, reply.proof):
        raise AccessError("wrong secret or forged ticket: the proof does not match")


def valid_tenant(name: str) -> str:
    if not 1 <= len(name) <= 64 or not all(c.isalnum() or c in "._-@" for c in name):
        raise UsageError(f"tenant {name!r}: 1 to 64 letters, digits and ._-@")
    return name
