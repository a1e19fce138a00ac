"""The log's digests at the last offsets, as the entries that a follower has seen make them. Pure.

They begin where the log itself was read, and are compared with the log's own: a follower that was
told something else than the log has (anybody may publish where a broker lets them) finds out.
"""

from __future__ import annotations

from segue_contract.limits import FOLLOWER_DIGESTS
from segue_contract.sync.chain import chained


class Digests:
    def __init__(self, bound: int = FOLLOWER_DIGESTS) -> None:
        self._bound = bound
        self._known: dict[int, bytes] = {}  # consecutive offsets, the oldest first

    def start(self, offset: int, digest: bytes) -> None:
        """The log says that this is its digest at `offset`."""
        self._known = {offset: digest}

    def clear(self) -> None:
        self._known.clear()

    def add(self, offset: int, op: bytes) -> None:
        """The entry at `offset`, after the one before it."""
        before = self._known.get(offset - 1)
        if before is None:
            self._known.clear()
            return
        self._known[offset] = chained(before, op)
        if len(self._known) > self._bound:
            del self._known[next(iter(self._known))]

    def at(self, offset: int) -> bytes | None:
        return self._known.get(offset)

    def contradict(self, offset: int, op: bytes) -> bool:
        """Another op is known at `offset`."""
        before, known = self._known.get(offset - 1), self._known.get(offset)
        return before is not None and known is not None and chained(before, op) != known
