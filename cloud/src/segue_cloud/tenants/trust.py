"""Which KV each turn may use, and how far each edge's is believed. Pure: clock and chance come from
outside.

    computed ─► what the engine computed for the tenant
    shared   ─► what edges shipped for the tenant whose spot checks have earned it
    one edge ─► what that edge shipped for the tenant before

A turn sees the first two, and the third of the edge that it came through. So nothing that a tenant
sends, and not how fast it is answered, tells of another tenant's prompts; and what an edge ships
reaches turns of other edges only after some of it was computed again and found right. One block
that is wrong drops all that the edge shipped: its domains get other names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from segue_contract.ids import digest
from segue_contract.limits import (
    KV_CHECK_SHARE,
    KV_CHECK_SHARE_TRUSTED,
    KV_CHECKS_TRUSTED,
    KV_REFUSED_S,
    MAX_EDGES_KNOWN,
)

EVERYBODY = (b"",)


@dataclass(slots=True)
class _Edge:
    life: int = 0  # raised where all that it shipped is dropped
    right: int = 0  # blocks that were computed again and found right, in this life
    refused_until_s: float = 0.0


class EdgeTrust:
    """Args:
    keyed: tenants and edges are known, by tokens and certificates. On an open loopback they are
        not, and there is one tenant, whose edge runs on the same machine and could read
        everything anyway: all KV is everybody's.
    chance: a number in [0, 1) each time.
    monotonic: seconds.
    """

    def __init__(
        self, *, keyed: bool, chance: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._keyed = keyed
        self._chance = chance
        self._now_s = monotonic
        self._edges: OrderedDict[str, _Edge] = OrderedDict()
        self._shared_life = 0
        self.checks = {"right": 0, "wrong": 0}

    # -- domains ------------------------------------------------------------------------------

    def domains(self, tenant: str, edge: str = "") -> tuple[bytes, ...]:
        """Of a turn of the tenant that came through that edge ("": none), most trusted first."""
        if not self._keyed:
            return EVERYBODY
        first = digest(b"computed", tenant.encode()), self._shared(tenant)
        return (*first, self._own(tenant, edge)) if edge else first

    def shipped_into(self, tenant: str, edge: str) -> bytes:
        """The domain of what the edge ships for the tenant now."""
        if not self._keyed:
            return EVERYBODY[0]
        return self._shared(tenant) if self.trusts(edge) else self._own(tenant, edge)

    def trusts(self, edge: str) -> bool:
        """Its checks have earned it the tenant's domain."""
        return self._of(edge).right >= KV_CHECKS_TRUSTED

    def refuses(self, edge: str) -> bool:
        """What it shipped was wrong, not long ago: it is to send token ids alone."""
        return self._keyed and self._now_s() < self._of(edge).refused_until_s

    def _shared(self, tenant: str) -> bytes:
        return digest(b"shared", tenant.encode(), str(self._shared_life).encode())

    def _own(self, tenant: str, edge: str) -> bytes:
        life = str(self._of(edge).life).encode()
        return digest(b"edge", tenant.encode(), edge.encode(), life)

    # -- spot checks --------------------------------------------------------------------------

    def picks(self, edge: str) -> bool:
        """Whether the block that the edge just shipped is to be computed again."""
        if not self._keyed:
            return False
        share = KV_CHECK_SHARE_TRUSTED if self.trusts(edge) else KV_CHECK_SHARE
        return self._chance() < share

    def found(self, edge: str, *, right: bool) -> None:
        """The outcome of a check."""
        self.checks["right" if right else "wrong"] += 1
        one = self._of(edge)
        if right:
            one.right += 1
            return
        if self.trusts(edge):
            self._shared_life += 1  # nobody knows any more which of it came from this edge
        one.life += 1
        one.right = 0
        one.refused_until_s = self._now_s() + KV_REFUSED_S

    def _of(self, edge: str) -> _Edge:
        one = self._edges.get(edge)
        if one is None:
            one = self._edges[edge] = _Edge()
            if len(self._edges) > MAX_EDGES_KNOWN:
                self._edges.popitem(last=False)
        self._edges.move_to_end(edge)
        return one
