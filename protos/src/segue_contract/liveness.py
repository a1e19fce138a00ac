"""When a peer that says nothing counts as lost. Pure."""

from __future__ import annotations

from segue_contract.limits import SILENCE_LOOKS


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
    def lost(self) -> bool:
        return self._looks >= self._bound

    def heard(self) -> None:
        """The peer said something, or nobody listened until now."""
        self._looks = 0

    def look(self) -> bool:
        """One look further; True once the peer counts as lost."""
        self._looks += 1
        return self.lost
