"""base64url without padding (RFC 7515, 2), as keys, tokens and passwords are written."""

from __future__ import annotations

import base64


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """Raises ValueError where `text` cannot be read; characters of no meaning are passed over."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
