"""A maker's tokens as text, going on where another maker of the same reply stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from segue_contract.chat.detokenizer import Detokenizer
from segue_contract.chat.stops import Scan, StopScanner


class MakesDetokenizers(Protocol):
    """What is needed of a tokenizer (implemented by `segue_contract.chat.ChatTokenizer`)."""

    def detokenizer(self) -> Detokenizer: ...


class ReplyText:
    """Detokenizer and stop strings of one reply.

    Args:
        made: the reply's tokens so far, shown already: a character or a stop string that begins in
            them is completed by the next ones, and they themselves are not given back again.
    """

    def __init__(
        self, tokenizer: MakesDetokenizers, stop: Sequence[str], made: Sequence[int]
    ) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._scanner = StopScanner(stop)
        pieces = [self._detokenizer.push(token) for token in made]
        shown = self._scanner.push(made, pieces)
        self._shown_and_held = 0 if shown.stopped else len(made) - len(shown.tokens)

    def push(self, tokens: Sequence[int]) -> Scan:
        """What may be shown now that `tokens` came."""
        pieces = [self._detokenizer.push(token) for token in tokens]
        return self._fresh(self._scanner.push(tokens, pieces))

    def flush(self) -> Scan:
        """What was held back, at the reply's end."""
        return self._fresh(self._scanner.flush())

    def _fresh(self, scan: Scan) -> Scan:
        skip = min(self._shown_and_held, len(scan.tokens))
        self._shown_and_held -= skip
        return Scan(scan.tokens[skip:], scan.pieces[skip:], scan.stopped)
