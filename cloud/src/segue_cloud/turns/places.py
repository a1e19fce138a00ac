"""How many turns an instance may run, and which ones hold a place. Pure.

A turn holds its place from before its claim until its owner has ended. One that waits for its
session holds none: it costs nothing yet.
"""

from __future__ import annotations

from collections import Counter

from segue_contract.ids import TurnName


class Places:
    """Of one and the same turn several may hold its place: who runs it, and who asks for it again.
    It is free once each of them gave it back."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: Counter[TurnName] = Counter()

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def free(self) -> int:
        return max(0, self.most - len(self._held))

    def take(self, turn: TurnName) -> bool:
        """A place for `turn`, or the one that it holds; False where none is left."""
        if turn not in self._held and not self.free:
            return False
        self._held[turn] += 1
        return True

    def give_back(self, turn: TurnName) -> None:
        """What one `take` took."""
        assert self._held[turn] > 0, "a place that nobody took"
        self._held[turn] -= 1
        if not self._held[turn]:
            del self._held[turn]
