"""Addresses as they may be shown to people."""

from __future__ import annotations


def without_password(url: str) -> str:
    """`url` fit for a log or an error: no user, no password, no query (it may hold one, too).

    Where it cannot be told what of it is the password, all but the scheme is left out.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    place, _, query = rest.partition("?")
    if "@" in query:  # a password with a "?" in it, or a query with an address in it
        return f"{scheme}{separator}..."
    return f"{scheme}{separator}{place.rpartition('@')[2]}"
