"""Which broker the clouds of this store publish through, as the store keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from segue_cloud.sessions import scripts
from segue_cloud.sessions.wire import Wire
from segue_contract.limits import BROKER_LEASE_S
from segue_contract.topics import BROKER_KEY

BROKER = scripts.load("broker.lua")


@dataclass(frozen=True)
class KnownBroker:
    """`owner`: the instance whose child the broker is; "": it runs by itself."""

    url: str
    owner: str
    left_s: float


class BrokerRecord:
    """All methods raise StoreUnavailable.

    Args:
        lease_s: how long a broker is kept after it was last claimed.
    """

    def __init__(self, wire: Wire, lease_s: float = BROKER_LEASE_S) -> None:
        self._wire = wire
        self.lease_s = lease_s

    async def look(self) -> KnownBroker | None:
        """None where no cloud keeps one."""
        return _known(await self._call("look"))

    async def claim(self, url: str, owner: str = "", *, replaces: str = "") -> KnownBroker:
        """Keep `url` for `lease_s`, where no other one is kept than `replaces`.

        Returns what is kept then: another one where the claim failed.
        """
        lease_ms = int(self.lease_s * 1000)
        known = _known(await self._call("claim", url, owner, lease_ms, replaces))
        assert known is not None
        return known

    async def release(self, url: str, owner: str) -> None:
        """The broker ends with its owner."""
        await self._call("release", url, owner)

    async def _call(self, verb: str, *args: str | int) -> list[bytes | int]:
        (row,) = await self._wire.call(BROKER.call((BROKER_KEY,), verb, *args))
        return list(row)


def _known(row: list[bytes | int]) -> KnownBroker | None:
    url, owner, left_ms = row
    assert isinstance(url, bytes)
    assert isinstance(owner, bytes)
    return KnownBroker(url.decode(), owner.decode(), int(left_ms) / 1000) if url else None
