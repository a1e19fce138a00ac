"""A rate that may be exceeded for a while (token bucket). Pure: `now_s` comes from outside."""

from __future__ import annotations

import math


class Bucket:
    """Fills at `rate` a second up to `burst_s` seconds' worth.

    Args:
        rate: a second; inf: no bound.
    """

    def __init__(self, rate: float, burst_s: float, now_s: float) -> None:
        self.rate = rate
        self._most = rate * burst_s
        self._left = self._most
        self._at_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0.0: now. More than a full bucket holds may be taken
        from a full one: it is in debt then."""
        if math.isinf(self.rate):
            return 0.0
        self._fill(now_s)
        missing = min(amount, self._most) - self._left
        return max(0.0, missing / self.rate)

    def take(self, amount: float, now_s: float) -> None:
        """Whatever is there: what was used is used."""
        if not math.isinf(self.rate):
            self._fill(now_s)
            self._left -= amount

    def change(self, rate: float, burst_s: float, now_s: float) -> None:
        """Another rate from now on; what was used stays used, at most a full bucket of it."""
        self._fill(now_s)
        used = 0.0 if math.isinf(self.rate) else self._most - self._left
        self.rate, self._most = rate, rate * burst_s
        self._left = self._most if math.isinf(rate) else self._most - min(used, self._most)

    def _fill(self, now_s: float) -> None:
        if not math.isinf(self.rate):
            passed_s = max(0.0, now_s - self._at_s)
            self._left = min(self._most, self._left + self.rate * passed_s)
        self._at_s = max(self._at_s, now_s)
