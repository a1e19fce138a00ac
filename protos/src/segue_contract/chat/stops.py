"""Stop strings over a stream of tokens: nothing is shown that may turn out to be one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from segue_contract.limits import MAX_STOP_CHARS, MAX_STOP_STRINGS


@dataclass(frozen=True)
class Scan:
    """What may be shown now; `stopped`: a stop string was found and everything after it dropped."""

    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    stopped: bool = False


class StopScanner:
    """Feed it tokens with the text each completed; it gives them back once they are safe to show.

    The stop string that ends first wins, so the result does not depend on how the stream is cut.
    A token that holds the beginning of a stop string keeps the text before it; a token with no
    text before it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        assert len(self._stops) <= MAX_STOP_STRINGS, "checked where the request came in"
        assert all(len(stop) <= MAX_STOP_CHARS for stop in self._stops)
        self._held: deque[tuple[int, str]] = deque()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        return self._stopped

    def push(self, tokens: Sequence[int], pieces: Sequence[str]) -> Scan:
        """`pieces[i]` is the text that `tokens[i]` completed. After a stop, nothing comes back."""
        assert len(tokens) == len(pieces)
        if self._stopped:
            return Scan(stopped=True)
        if not self._stops:
            return Scan(tuple(tokens), tuple(pieces))
        self._held.extend(zip(tokens, pieces, strict=True))
        text = "".join(piece for _, piece in self._held)
        start = self._match(text)
        if start is not None:
            self._stopped = True
            scan = self._cut(start)
            self._held.clear()
            return scan
        return self._release(len(text) - self._suspicious(text))

    def flush(self) -> Scan:
        """The stream has ended: what was held back is no stop string after all."""
        held, self._held = self._held, deque()
        return Scan(tuple(t for t, _ in held), tuple(p for _, p in held), self._stopped)

    def _match(self, text: str) -> int | None:
        """Start of the stop string that ends first; of those that end together, the longest."""
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        return min(ends)[1] if ends else None

    def _suspicious(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0

    def _release(self, safe: int) -> Scan:
        """Give back the tokens whose text lies in the first `safe` characters."""
        tokens, pieces, position = [], [], 0
        while self._held and position + len(self._held[0][1]) <= safe:
            token, piece = self._held.popleft()
            position += len(piece)
            tokens.append(token)
            pieces.append(piece)
        return Scan(tuple(tokens), tuple(pieces))

    def _cut(self, start: int) -> Scan:
        tokens, pieces, position = [], [], 0
        for token, piece in self._held:
            if position >= start:
                break
            tokens.append(token)
            pieces.append(piece[: start - position])
            position += len(piece)
        return Scan(tuple(tokens), tuple(pieces), True)
