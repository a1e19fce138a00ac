"""How many turns an instance may run, and which ones hold a place. Pure.

A turn holds its place from before its claim until its owner has ended. One that waits for its
session holds none: it costs nothing yet.
"""

from __future__ import annotations

from segue_contract.ids import TurnName


class Places:
    def __init__(self, most: int) -> None:
        self.most = most
        self._held: set[TurnName] = set()

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def free(self) -> int:
        return max(0, self.most - len(self._held))

    def take(self, turn: TurnName) -> bool:
        """A place for `turn`, or the one that it holds; False where none is left."""
        if turn in self._held:
            return True
        if not self.free:
            return False
        self._held.add(turn)
        return True

    def give_back(self, turn: TurnName) -> None:
        self._held.discard(turn)
