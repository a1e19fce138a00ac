"""Which node is nearest: round trips as they were measured, and when to move. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from segue_contract.limits import EDGES_KEPT, NEAR_GAIN_S, NEAR_SAMPLES, NEAR_SHARE


class Nearest:
    """An order of addresses by round trip. The one in use stays first until another one is clearly
    nearer (by `NEAR_GAIN_S`, and less than `NEAR_SHARE` of it), or until it does not answer:
    whoever moves leaves its KV behind.

    Args:
        given: what the app named, in its order; they compete with what was found, and none of them
            is ever left out.
    """

    def __init__(self, given: Sequence[str]) -> None:
        self._given = tuple(given)
        self._samples: dict[str, deque[float]] = {}
        self._current = self._given[0]

    def saw(self, address: str, round_trip_s: float | None) -> None:
        """It answered after so long; None: it did not."""
        if round_trip_s is None:
            self._samples.pop(address, None)
            return
        self._samples.setdefault(address, deque(maxlen=NEAR_SAMPLES)).append(round_trip_s)

    def keep(self, addresses: Iterable[str]) -> None:
        """Nothing is known of others any more."""
        kept = {*addresses}
        self._samples = {one: seen for one, seen in self._samples.items() if one in kept}

    def round_trip_s(self, address: str) -> float | None:
        """The best of its last ones: a single slow answer says nothing of the way."""
        seen = self._samples.get(address)
        return min(seen) if seen else None

    def order(self) -> list[str]:
        """The one to use first, the next nearest, and all that were given."""
        known = sorted((min(seen), one) for one, seen in self._samples.items())
        if known:
            best_s, best = known[0]
            now_s = self.round_trip_s(self._current)
            if now_s is None or (best_s < now_s * NEAR_SHARE and now_s - best_s >= NEAR_GAIN_S):
                self._current = best
        near = [one for _, one in known if one != self._current][: EDGES_KEPT - 1]
        return list(dict.fromkeys([self._current, *near, *self._given]))
