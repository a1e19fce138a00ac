"""How tenants share the engine while several of them have turns here. Pure.

    allowances ─► which running turns get a part of the step, and who begins next
    budgets    ─► how many prompt tokens of the step each tenant gets

A tenant alone has everything. Among several, each gets as many turns of a step as its weight says,
and what one leaves belongs to the others (weighted max-min). A larger batch makes a step longer for
everybody in it. So the batch holds, of each tenant, as many turns as the smallest one has, or a few
(`turns`) where that has fewer: its ordinary ones. More of them are in it only as far as a step with
them takes no longer than `growth` more, and what their prompts take beside others that decode is as
little again. A flood then costs others what ordinary use would cost them.

What was owed to a tenant in one step, since turns cannot be cut in pieces, is carried over to the
next ones (after "Efficient Fair Queuing Using Deficit Round-Robin", SIGCOMM 1995). Who begins next,
and whose prompt comes first, is decided by tokens served per weight (after "Fairness in Serving
Large Language Models", OSDI 2024).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping
from dataclasses import dataclass

# Weight of the newest step in the mean of its size: a machine that others use shows in some ten.
_NEW = 0.1
# Most prompt tokens that are saved up for turns beyond the ordinary: one chunk of one prompt.
_MOST_SPARE = 256.0
# Most rows that may be owed to a tenant: enough for what cannot be cut in pieces.
_MOST_OWED = 2.0


class StepTimes:
    """Seconds of a step that decodes, by the turns in it, learned from steps: an exponential mean
    for each power of two, and straight lines between."""

    def __init__(self) -> None:
        self.prompt_token_s = 0.0  # of one more token of a prompt; 0.0: none was seen
        self._points: dict[int, tuple[float, float]] = {}
        self._rows: list[float] = []
        self._seconds: list[float] = []

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """A step took so long: `rows` turns with one token each, and so much of prompts."""
        if prompt_tokens:
            each = max(0.0, seconds - (self.seconds(rows) if rows else 0.0)) / prompt_tokens
            self.prompt_token_s += (_NEW if self.prompt_token_s else 1.0) * (
                each - self.prompt_token_s
            )
            return
        size = (rows - 1).bit_length()
        at, mean = self._points.get(size, (float(rows), seconds))
        self._points[size] = (at + _NEW * (rows - at), mean + _NEW * (seconds - mean))
        self._rows, self._seconds = [], []
        for at, mean in sorted(self._points.values()):
            self._rows.append(at)
            # One more turn makes no step shorter, whatever the clock said.
            self._seconds.append(max(mean, self._seconds[-1] if self._seconds else 0.0))

    def seconds(self, rows: int) -> float:
        """About how long a step of so many takes; beyond what was seen, as it grew last. 0.0: no
        step was seen."""
        known = len(self._rows)
        if not known:
            return 0.0
        right = bisect.bisect_left(self._rows, rows)
        if right == 0 or known == 1:
            return self._seconds[0] * rows / self._rows[0]
        right = min(right, known - 1)
        left = right - 1
        slope = (self._seconds[right] - self._seconds[left]) / (
            self._rows[right] - self._rows[left]
        )
        return self._seconds[left] + slope * (rows - self._rows[left])

    def rows_within(self, rows: int, growth: float, most: int) -> int:
        """The largest number up to `most` whose step takes no longer than that of `rows` and
        `growth` of it more."""
        if rows >= most or not self._rows:
            return min(rows, most)
        bound = (1.0 + growth) * self.seconds(rows)
        fits, more = rows, most + 1
        while more - fits > 1:
            middle = (fits + more) // 2
            if self.seconds(middle) <= bound:
                fits = middle
            else:
                more = middle
        return fits


@dataclass(slots=True)
class Demand:
    """Of one tenant: its weight, its turns that run, and all of them."""

    weight: float = 1.0
    running: int = 0
    turns: int = 0


class FairShare:
    """Args:
    turns: of a tenant, per weight, that count as ordinary use.
    growth: share of a step's time by which turns beyond that may lengthen it.
    """

    def __init__(self, turns: int, growth: float) -> None:
        self._turns = turns
        self._growth = growth
        self.times = StepTimes()
        self._served: dict[str, float] = {}
        self._owed: dict[str, float] = {}
        self._ordinary: dict[str, int] = {}
        self._spare = 0.0

    def enter(self, tenant: str) -> None:
        """The tenant has a turn, and had none. It has no claim to what it did not ask for."""
        self._served[tenant] = min(self._served.values(), default=0.0)

    def leave(self, tenant: str) -> None:
        """The tenant has no turn any more."""
        self._served.pop(tenant, None)
        self._owed.pop(tenant, None)

    def charge(self, tenant: str, weight: float, tokens: int) -> None:
        """So many tokens of the tenant were computed."""
        if tenant in self._served:
            self._served[tenant] += tokens / weight

    def served(self, tenant: str) -> float:
        """Tokens per weight; who has fewer comes first."""
        return self._served.get(tenant, 0.0)

    def allowances(self, demands: Mapping[str, Demand], slots: int) -> dict[str, int]:
        """How many turns of each tenant may be in the next step; call it once a step.

        Args:
            demands: of the tenants that have turns.
            slots: most turns in a step.
        """
        rows = self._rows(demands, slots)
        allowed = dict.fromkeys(demands, 0)
        self._spare = min(self._spare + self._spare_tokens(rows), _MOST_SPARE)
        heap = [self._key(tenant, one, 0) for tenant, one in demands.items() if one.turns]
        heapq.heapify(heap)
        for _ in range(rows):
            if not heap:
                break
            tenant = heap[0][-1]
            allowed[tenant] += 1
            if allowed[tenant] < demands[tenant].turns:
                heapq.heapreplace(heap, self._key(tenant, demands[tenant], allowed[tenant]))
            else:
                heapq.heappop(heap)
        self._carry(demands, allowed, rows)
        return allowed

    def _rows(self, demands: Mapping[str, Demand], slots: int) -> int:
        """Turns in the next step, of all tenants together."""
        level = max(self._turns, min(one.turns / one.weight for one in demands.values()))
        self._ordinary = {
            tenant: min(one.turns, max(1, int(level * one.weight)))
            for tenant, one in demands.items()
        }
        wanted = min(slots, sum(one.turns for one in demands.values()))
        return self.times.rows_within(sum(self._ordinary.values()), self._growth, wanted)

    def _spare_tokens(self, rows: int) -> float:
        """Prompt tokens by which a step of so many turns may grow for turns beyond the ordinary."""
        each = self.times.prompt_token_s
        return self._growth * self.times.seconds(rows) / each if each else _MOST_SPARE

    def ordinary(self, tenant: str) -> int:
        """So many turns of the tenant in the step, its oldest, are no more than others have."""
        return self._ordinary.get(tenant, 0)

    def take_spare(self, tokens: int, least: int) -> int:
        """Of `tokens` of the prompt of another turn, those that it may have in this step, beside
        turns of others that decode: none, or at least `least` or all of them."""
        may = min(tokens, int(self._spare))
        if may < min(tokens, least):
            return 0
        self._spare -= may
        return may

    def _key(self, tenant: str, demand: Demand, given: int) -> tuple[float, bool, float, str]:
        """Who gets the next turn of a step: the least, by weight and what is owed. Among equals
        who runs already, then who was served least."""
        owed = self._owed.get(tenant, 0.0)
        return (
            (given + 1 - owed) / demand.weight,
            given >= demand.running,
            self.served(tenant),
            tenant,
        )

    def _carry(self, demands: Mapping[str, Demand], allowed: dict[str, int], rows: int) -> None:
        weights = sum(one.weight for one in demands.values())
        for tenant, one in demands.items():
            due = rows * one.weight / weights
            owed = self._owed.get(tenant, 0.0) + due - allowed[tenant]
            # Who has all that it wants now keeps what is less than a turn.
            most = 1.0 if allowed[tenant] >= one.turns else _MOST_OWED
            # What others left to it is no debt, but for the one turn that cannot be cut.
            self._owed[tenant] = min(max(owed, -1.0), most)

    def budgets(self, demands: Mapping[str, Demand], budget: int, least: int) -> dict[str, int]:
        """Prompt tokens of the next step for each tenant, who was served least first.

        Args:
            demands: of the tenants in the step.
            least: the smallest part that is worth a prompt's place in a step.
        """
        weights = sum(one.weight for one in demands.values())
        parts: dict[str, int] = {}
        left = budget
        for tenant in sorted(demands, key=lambda one: (self.served(one), one)):
            part = max(least, int(budget * demands[tenant].weight / weights))
            parts[tenant] = min(part, left)
            left -= parts[tenant]
        return parts
