"""What a turn's readers have been shown."""

from __future__ import annotations

from collections.abc import Sequence

from segue_contract.turn.events import Started
from segue_contract.turn.merge import Merged, Merger
from segue_edge.turns.state.signals import Instruction, Show


class Shown:
    """`merger` has the reply; the start is told before anything of it, once."""

    def __init__(self, turn: str, epoch: int, offset: int) -> None:
        self.merger = Merger()
        self.started = False
        self._turn = turn
        self._epoch = epoch
        self._offset = offset

    @property
    def epoch(self) -> int:
        return max(self._epoch, self.merger.epoch)

    def learn(self, epoch: int, offset: int = 0) -> None:
        """Somebody speaks for the turn under `epoch`; the log has it at `offset`, where known."""
        self._epoch = max(self._epoch, epoch)
        self._offset = self._offset or offset

    def start(self) -> list[Instruction]:
        if self.started:
            return []
        self.started = True
        return [Show(Started(self._turn, self.epoch, self._offset))]

    def show(self, merged: Sequence[Merged]) -> list[Instruction]:
        before = self.start() if merged else []  # a joined turn may begin with a frame
        return [*before, *(Show(one) for one in merged)]
