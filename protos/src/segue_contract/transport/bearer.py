"""A session token as a call's metadata carries it (RFC 6750)."""

from __future__ import annotations

from collections.abc import Iterable

_HEADER = "authorization"
_SCHEME = "Bearer "


def bearer(token: str) -> tuple[tuple[str, str], ...] | None:
    """Metadata of a call that is made with a token; None without one."""
    return ((_HEADER, _SCHEME + token),) if token else None


def token_in(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token that a call came with; "" where it has none."""
    for key, value in metadata:
        if key == _HEADER and isinstance(value, str) and value.startswith(_SCHEME):
            return value[len(_SCHEME) :]
    return ""
