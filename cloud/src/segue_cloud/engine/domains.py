"""Whose KV a turn may use: a domain is part of a cached block's name, so others' are not found.

A turn names its domains in order of trust. In the first lies what the engine computed for its
tenant, in later ones what edges shipped. What is computed after a block of a later domain belongs
to that domain: attention has carried that block's numbers into it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from segue_contract.ids import digest

# Where nobody is told apart: one tenant, and edges of the same user on the same machine.
OPEN = b""


def named(domain: bytes, block: bytes) -> bytes:
    """The name in the cache of what others call `block`."""
    return digest(b"segue-domain-1", domain, block) if domain else block


def names(domains: Sequence[bytes], *blocks: bytes) -> Iterator[tuple[int, bytes]]:
    """All that `blocks` may be called in `domains`, each with its domain's place there."""
    for place, domain in enumerate(domains):
        for block in blocks:
            yield place, named(domain, block)
