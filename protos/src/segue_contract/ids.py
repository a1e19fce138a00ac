"""Identifiers: who may be called what, and how new ones are made.

An id travels in topics, Redis keys and file names, so its alphabet is narrow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from segue_contract.errors import InvalidArgument
from segue_contract.limits import MAX_ID_CHARS

DEFAULT_TENANT = "default"

_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32: no letters that look alike


def check_id(value: str, what: str) -> str:
    """Return `value` if it may serve as an id of a `what` ("session", "device", "turn").

    Raises:
        InvalidArgument: empty, too long, or outside letters, digits, '.', '_' and '-'.
    """
    if not value:
        raise InvalidArgument(f"The {what} has no name.", hint=f"Give the {what} a name.")
    if len(value) > MAX_ID_CHARS:
        raise InvalidArgument(
            f"The {what} name has {len(value)} characters; {MAX_ID_CHARS} are allowed.",
            hint="Use a shorter name.",
        )
    if not _ID.fullmatch(value):
        raise InvalidArgument(
            f"The {what} name {value!r} has a character that is not allowed.",
            hint="Use letters, digits, '.', '_' and '-'; begin and end with a letter or digit.",
        )
    return value


@dataclass(frozen=True, order=True, slots=True)
class SessionName:
    """Which session is meant: its name is unique within its tenant. As text, "tenant:session"."""

    tenant: str
    session: str

    def __str__(self) -> str:
        return f"{self.tenant}:{self.session}"

    @classmethod
    def parse(cls, text: str) -> SessionName:
        """The name whose `str` is `text`. Raises ValueError where it is no session's."""
        tenant, session = text.split(":", 1)
        return cls(tenant, session)


@dataclass(frozen=True, slots=True)
class TurnName:
    """Which turn is meant: its id is unique within its session."""

    session: SessionName
    turn: str


def new_id(prefix: str, random_bytes: Callable[[int], bytes]) -> str:
    """A fresh id: `prefix` and 80 random bits of `random_bytes` (`os.urandom`, or a seeded one)."""
    number = int.from_bytes(random_bytes(10), "big")
    digits = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(75, -1, -5))
    return f"{prefix}{digits}"


def digest(*parts: bytes) -> bytes:
    """BLAKE2b-128 over length-prefixed parts, so that no two part lists collide by joining."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()
