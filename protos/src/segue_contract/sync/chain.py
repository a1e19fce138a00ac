"""The log's digest: whoever saw the same ops in the same order has the same one. Pure.

The log keeps it for its tail (`log.lua` makes it in the same way), so a follower that was told
something else than the log has sees it at the next comparison. It is no proof against whoever can
choose ops for that: it is not keyed.
"""

from __future__ import annotations

from hashlib import sha1

DIGEST_CHARS = 16


def chained(before: bytes, op: bytes) -> bytes:
    """The digest behind `op`, as hexadecimal digits; `before`: that before it, b"" at the begin."""
    return sha1(before + op, usedforsecurity=False).hexdigest()[:DIGEST_CHARS].encode()
