"""The scheduler's turns by tenant: whose may be in the step, who begins next, who rests. Pure.

With one tenant none of it decides anything: order of arrival does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from segue_cloud.engine.fair import Demand, FairShare
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.sequence import Sequence

# A prompt's smallest share of a step: below it the fixed cost of a step outweighs the fairness.
MIN_SHARE = 64


class Tenants:
    """Counts the turns of each tenant, and says by `FairShare` what each may have.

    `plan` begins a step; what the other methods say is of that step.
    """

    def __init__(self, fair: FairShare) -> None:
        self._fair = fair
        self._demands: dict[str, Demand] = {}
        self._allowed: dict[str, int] | None = None  # turns of the step; None: all

    @property
    def several(self) -> bool:
        """More than one tenant has turns."""
        return self._allowed is not None

    # -- turns come and go --------------------------------------------------------------------

    def came(self, turn: EngineTurn) -> None:
        """It waits."""
        if turn.tenant not in self._demands:
            self._demands[turn.tenant] = Demand()
            self._fair.enter(turn.tenant)
        self._demands[turn.tenant].weight = turn.weight
        self._demands[turn.tenant].turns += 1

    def began(self, turn: EngineTurn) -> None:
        """It runs."""
        self._demands[turn.tenant].running += 1

    def stopped(self, turn: EngineTurn) -> None:
        """It waits again."""
        self._demands[turn.tenant].running -= 1

    def left(self, turn: EngineTurn) -> None:
        """It waited, and is gone."""
        demand = self._demands[turn.tenant]
        demand.turns -= 1
        if not demand.turns:
            del self._demands[turn.tenant]
            self._fair.leave(turn.tenant)

    def computed(self, turn: EngineTurn, tokens: int) -> None:
        self._fair.charge(turn.tenant, turn.weight, tokens)

    # -- one step -----------------------------------------------------------------------------

    def plan(self, slots: int) -> None:
        """Begin a step of at most so many turns."""
        self._allowed = None
        if len(self._demands) > 1:
            self._allowed = self._fair.allowances(self._demands, slots)

    def active(self, running: Seq[Sequence]) -> list[Sequence]:
        """Of the running turns, oldest first, those that may be in the step."""
        if self._allowed is None:
            return list(running)
        left = dict(self._allowed)
        active = []
        for sequence in running:
            if left.get(sequence.turn.tenant, 0) > 0:
                left[sequence.turn.tenant] -= 1
                active.append(sequence)
        return active

    def lend(self, running: Seq[Sequence]) -> None:
        """What waiting turns could not take, for want of room, goes to running ones for now."""
        if self._allowed is None:
            return
        allowed, demands = self._allowed, self._demands
        spare = sum(max(0, allowed[t] - one.running) for t, one in demands.items() if t in allowed)
        seen: dict[str, int] = {}
        for sequence in running if spare else ():
            tenant = sequence.turn.tenant
            seen[tenant] = seen.get(tenant, 0) + 1
            if spare and seen[tenant] > allowed.get(tenant, 0):
                allowed[tenant] = seen[tenant]
                spare -= 1

    def next(self, waiting: deque[Sequence]) -> Sequence | None:
        """Who begins next: in order of arrival; where several tenants have turns, of the one that
        has least by its weight and may have more."""
        if self._allowed is None or not waiting:
            return waiting[0] if waiting else None
        allowed, demands = self._allowed, self._demands
        first: dict[str, Sequence] = {}
        for sequence in waiting:
            tenant = sequence.turn.tenant
            if tenant not in first and demands[tenant].running < allowed[tenant]:
                first[tenant] = sequence
        if not first:
            return None

        def has(tenant: str) -> tuple[float, float, str]:
            one = demands[tenant]
            return one.running / one.weight, self._fair.served(tenant), tenant

        return first[min(first, key=has)]

    def resting(self, running: Seq[Sequence]) -> Sequence | None:
        """The youngest turn that is not in the step, of the tenant with the most such by weight.

        Not a tenant's only one: it would be computed again each time that its turn comes."""
        if self._allowed is None:
            return None
        allowed = self._allowed
        over = {
            tenant: (one.running - allowed[tenant]) / one.weight
            for tenant, one in self._demands.items()
            if tenant in allowed and one.running > max(1, allowed[tenant])
        }
        if not over:
            return None
        most = max(over, key=lambda tenant: (over[tenant], tenant))
        return next(s for s in reversed(running) if s.turn.tenant == most)

    def share(self, active: list[Sequence], budget: int, decodes: bool) -> dict[Sequence, int]:
        """Share `budget` tokens among the prompts of turns in the step: by tenant, and among those
        of each.

        Args:
            decodes: some wait for the step's end; then no tenant gets more than its part.
        """
        prompts = [s for s in active if not s.decoding]
        if self._allowed is None or not prompts:
            return _equally(prompts, budget)
        of = self._ordinary_prompts(active)
        allowed = self._allowed
        there = {t: one for t, one in self._demands.items() if one.running and allowed[t]}
        counts = dict.fromkeys(prompts, 0)
        for tenant, part in self._fair.budgets(there, budget, MIN_SHARE).items():
            counts.update(_equally(of.get(tenant, []), part))
        left = budget - sum(counts.values())
        decoding = {s.turn.tenant for s in active if s.decoding}
        for sequence in prompts:
            beside = bool(decoding - {sequence.turn.tenant})
            if decodes and counts[sequence] and beside:
                continue
            more = min(sequence.uncomputed - counts[sequence], left)
            more = self._fair.take_spare(more, MIN_SHARE) if beside else more
            counts[sequence] += more
            left -= more
        return counts

    def _ordinary_prompts(self, active: list[Sequence]) -> dict[str, list[Sequence]]:
        """Prompts of each tenant that are no more than others have."""
        seen: dict[str, int] = {}
        of: dict[str, list[Sequence]] = {}
        for sequence in active:
            tenant = sequence.turn.tenant
            seen[tenant] = seen.get(tenant, 0) + 1
            if not sequence.decoding and seen[tenant] <= self._fair.ordinary(tenant):
                of.setdefault(tenant, []).append(sequence)
        return of

    def check_integrity(self, turns: Seq[Sequence], running: Seq[Sequence]) -> None:
        """Assert that the counts are those of the turns."""
        assert set(self._demands) == {s.turn.tenant for s in turns}
        for tenant, demand in self._demands.items():
            assert demand.turns == sum(s.turn.tenant == tenant for s in turns)
            assert demand.running == sum(s.turn.tenant == tenant for s in running)


def _equally(prompts: list[Sequence], budget: int) -> dict[Sequence, int]:
    """An equal part of `budget` tokens for each prompt, the rest to the oldest."""
    share = max(MIN_SHARE, budget // max(1, len(prompts)))
    counts: dict[Sequence, int] = {}
    left = budget
    for sequence in prompts:
        counts[sequence] = min(sequence.uncomputed, share, left)
        left -= counts[sequence]
    for sequence in prompts:
        more = min(sequence.uncomputed - counts[sequence], left)
        counts[sequence] += more
        left -= more
    return counts
