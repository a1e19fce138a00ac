"""When a step counts as stuck: a hanging card and a lost thread raise nothing. Pure."""

from __future__ import annotations

LOOKS = 8  # at one and the same step; evenly spread over the time that a step may take


class StuckWatch:
    """Counts looks instead of reading a clock: a process that was stopped for a while, or a machine
    that slept, and then goes on has not hung."""

    def __init__(self) -> None:
        self._seen = 0.0
        self._looks = 0

    def look(self, step: float) -> bool:
        """`step`: what tells the running step from others, 0.0 where none runs. True once it was
        the same at `LOOKS` looks after the first."""
        self._looks = self._looks + 1 if step and step == self._seen else 0
        self._seen = step
        return self._looks >= LOOKS
