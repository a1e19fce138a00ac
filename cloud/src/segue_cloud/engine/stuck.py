"""When a step counts as stuck: a hanging card and a lost thread raise nothing. Pure."""

from __future__ import annotations

from segue_contract.liveness import SameStep

LOOKS = 8  # at one and the same step; evenly spread over the time that a step may take


class StuckWatch:
    def __init__(self) -> None:
        self._same = SameStep()

    def look(self, step: float) -> bool:
        """`step`: as in `SameStep`. True once it was the same at `LOOKS` looks after the first."""
        return self._same.look(step) >= LOOKS
