"""How many turns an instance may run, which ones hold a place, and whose turn is next. Pure.

A turn holds its place from before its claim until its owner has ended. One that waits for its
session holds none: it costs nothing yet.

Where all places are taken, a turn that asks is refused, and asks again. Until it does, its tenant
has a claim to the next place that comes free, before tenants that hold more by their weight: so a
tenant that fills an instance gets no more than its part while others ask (max-min fairness).
Claims count among tenants; within one it is as if there were none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from segue_contract.ids import TurnName
from segue_contract.limits import PLACE_CLAIM_S


class Places:
    """Of one and the same turn several may hold its place: who runs it, and who asks for it again.
    It is free once each of them gave it back.

    Args:
        weight: of a tenant.
        monotonic: seconds.
    """

    def __init__(
        self,
        most: int,
        weight: Callable[[str], float] = lambda tenant: 1.0,
        monotonic: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.most = most
        self._weight = weight
        self._now_s = monotonic
        self._held: Counter[TurnName] = Counter()
        self._of: Counter[str] = Counter()  # places of each tenant
        # Of each tenant, turns that were refused, and when; as many as there are places.
        self._claims: dict[str, dict[TurnName, float]] = {}

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def free(self) -> int:
        return max(0, self.most - len(self._held))

    def of(self, tenant: str) -> int:
        """Places that the tenant holds."""
        return self._of[tenant]

    def holds(self, turn: TurnName) -> bool:
        return turn in self._held

    def take(self, turn: TurnName) -> bool:
        """A place for `turn`, or the one that it holds; False where none is left for it."""
        if turn not in self._held:
            if self.free <= self._before(turn.session.tenant):
                self._claim(turn)
                return False
            self._claims.get(turn.session.tenant, {}).pop(turn, None)
            self._of[turn.session.tenant] += 1
        self._held[turn] += 1
        return True

    def give_back(self, turn: TurnName) -> None:
        """What one `take` took."""
        assert self._held[turn] > 0, "a place that nobody took"
        self._held[turn] -= 1
        if not self._held[turn]:
            del self._held[turn]
            self._of[turn.session.tenant] -= 1
            if not self._of[turn.session.tenant]:
                del self._of[turn.session.tenant]

    def _claim(self, turn: TurnName) -> None:
        claims = self._claims.setdefault(turn.session.tenant, {})
        claims.pop(turn, None)
        claims[turn] = self._now_s()  # so that the oldest is first
        if len(claims) > self.most:
            del claims[next(iter(claims))]

    def _before(self, tenant: str) -> int:
        """Claims of tenants that would still have less by their weight, with each of them met, or
        as much and have asked for longer."""
        if not self._claims:
            return 0
        mine = (self._of[tenant] + 1) / self._weight(tenant)
        since_s = self._since(tenant)
        found = 0
        for other in list(self._claims):
            if other == tenant:
                continue
            older = self._since(other) < since_s
            # How many more it may have until it has as much by its weight.
            level = mine * self._weight(other) - self._of[other]
            more = math.floor(level) if older else math.ceil(level) - 1
            found += min(max(0, more), len(self._claims.get(other, ())))
        return found

    def _since(self, tenant: str) -> float:
        """When the tenant was first refused what it still asks for; inf: it was not."""
        claims, old_s = self._claims.get(tenant, {}), self._now_s() - PLACE_CLAIM_S
        while claims and claims[first := next(iter(claims))] < old_s:
            del claims[first]
        if not claims:
            self._claims.pop(tenant, None)
        return next(iter(claims.values()), math.inf)
