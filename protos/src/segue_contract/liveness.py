"""When a peer that says nothing counts as lost, and when compute counts as hung. Pure."""

from __future__ import annotations

import math

from segue_contract.limits import SILENCE_LOOKS, STALL_FACTOR, STALL_LOOK_S, STALL_S


class Silence:
    """Counts looks instead of reading a clock.

    Its owner looks at a steady pace, `SILENCE_LOOKS` times in `SILENCE_S`. A reader that was itself
    not scheduled for a while (a busy machine, a process that was stopped) makes one look when it
    goes on, not as many as it missed: what the peer said meanwhile is still to be read.
    """

    def __init__(self, looks: int = SILENCE_LOOKS) -> None:
        self._bound = looks
        self._looks = 0

    @property
    def looks(self) -> int:
        """So many in a row found nothing."""
        return self._looks

    @property
    def lost(self) -> bool:
        return self._looks >= self._bound

    def heard(self) -> None:
        """The peer said something, or nobody listened until now."""
        self._looks = 0

    def look(self) -> bool:
        """One look further; True once the peer counts as lost."""
        self._looks += 1
        return self.lost


class SameStep:
    """For how many looks a thread has been in one and the same step.

    Looks are counted, as in `Silence`: a process that was stopped for a while, or a machine that
    slept, and then goes on has not hung.
    """

    def __init__(self) -> None:
        self._seen = 0.0
        self._looks = 0

    def look(self, step: float) -> int:
        """`step`: what tells the running step from others; 0 where none runs. Returns how many
        looks after the first one found it."""
        self._looks = self._looks + 1 if step and step == self._seen else 0
        self._seen = step
        return self._looks


class StallWatch:
    """Whether a compute thread hangs in a step; its owner looks each `STALL_LOOK_S`."""

    def __init__(self) -> None:
        self._same = SameStep()

    def look(self, step: float, usual_s: float) -> bool:
        """True while the running step takes much longer than such steps do.

        Args:
            step: as in `SameStep`.
            usual_s: how long such steps take, seconds; infinite where that is not known.
        """
        return self._same.look(step) * STALL_LOOK_S >= max(STALL_S, STALL_FACTOR * usual_s)


class UsualTime:
    """How long steps of one kind take: the longest one, forgotten within some hundred steps, so
    that a few short ones do not make a long one look hung. Infinite before the first."""

    def __init__(self) -> None:
        self.seconds = math.inf

    def took(self, seconds: float) -> None:
        kept = 0.0 if math.isinf(self.seconds) else 0.98 * self.seconds
        self.seconds = max(kept, seconds)
