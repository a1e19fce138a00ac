"""Pure: how much work callers with bad tokens may make. A token that was refused is remembered for
a moment; an address that shows many different ones is refused before signatures are checked."""

from __future__ import annotations

import hashlib
import ipaddress
import math
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

from segue_contract.bucket import Bucket
from segue_contract.errors import Overloaded, Unauthenticated
from segue_contract.limits import (
    BAD_TOKEN_KEPT_S,
    BAD_TOKEN_PEERS,
    BAD_TOKENS_BURST,
    BAD_TOKENS_KEPT,
    BAD_TOKENS_OF_ALL,
    BAD_TOKENS_PER_S,
)

_K = TypeVar("_K")


def _allowance(now_s: float, times: int = 1) -> Bucket:
    """Of one address, or of `times` as many."""
    return Bucket(BAD_TOKENS_PER_S * times, BAD_TOKENS_BURST / BAD_TOKENS_PER_S, now_s)


def _check(allowance: Bucket, now_s: float, where: str) -> None:
    """Raises Overloaded where nothing is left."""
    if (wait_s := allowance.wait_s(1, now_s)) > 0:
        raise Overloaded(
            f"Too many bad tokens came from {where}.",
            hint="Show a good one a little later.",
            retry_after_s=math.ceil(1000 * wait_s) / 1000,
        )


class BadTokens:
    """For one listener. What it remembers is bounded, the oldest is forgotten first."""

    def __init__(self, kept: int = BAD_TOKENS_KEPT, peers: int = BAD_TOKEN_PEERS) -> None:
        self._kept, self._most_peers = kept, peers
        self._refused: dict[bytes, tuple[float, str, str]] = {}
        self._peers: dict[str, Bucket] = {}
        self._all = _allowance(-math.inf, BAD_TOKENS_OF_ALL)

    def checked(self, peer: str, token: str, now_s: float, verify: Callable[[], Any]) -> Any:
        """What `verify` gives, where it may be asked at all.

        Args:
            peer: the caller's address, see `address_of`.
            now_s: seconds of a clock that never goes back.

        Raises:
            Unauthenticated: `verify` does, or did so for this token a moment ago.
            Overloaded: too many bad tokens came, of that address or of all; this one was not looked
                at.
        """
        name = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        known = self._refused.get(name)
        if known is not None and now_s < known[0]:
            raise Unauthenticated(known[1], hint=known[2])
        allowance = self._peers.get(peer) or _allowance(now_s)
        _check(allowance, now_s, "this address")
        _check(self._all, now_s, "everywhere")
        try:
            return verify()
        except Unauthenticated as error:
            said = (now_s + BAD_TOKEN_KEPT_S, error.message, error.hint)
            _remember(self._refused, name, said, self._kept)
            self._all.take(1, now_s)
            allowance.take(1, now_s)
            _remember(self._peers, peer, allowance, self._most_peers)
            raise


def _remember(some: dict[_K, Any], key: _K, value: Any, most: int) -> None:
    some.pop(key, None)
    while len(some) >= most:
        del some[next(iter(some))]
    some[key] = value


def address_of(peer: str) -> str:
    """The address in gRPC's name of a peer ("ipv4:10.0.0.1:4711"), without the port; of IPv6 the
    network of 64 bits, as one host has all of it."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"{kind}:{host or rest}"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address), 64), strict=False))
    return str(address)
