"""How far a turn's reply has come, and who may make its next token. Pure.

    EDGE ──hand_over, lost──► CLOUD ──► ENDED
      └────ended, stopped──────────────►┘

The edge makes tokens until it hands over, ends the reply, is lost, or the turn is stopped; from
then on nothing of it is taken. So no token is made twice, and none is skipped.
"""

from __future__ import annotations

from enum import StrEnum

from segue_contract.errors import InvalidArgument
from segue_contract.turn.events import Reason

END_REASONS = frozenset({Reason.STOP, Reason.LENGTH, Reason.CANCELLED})


class Maker(StrEnum):
    EDGE = "edge"
    CLOUD = "cloud"
    NOBODY = "nobody"  # the reply has its end: `ReplyProgress.reason`


class ReplyProgress:
    """Args:
    made: tokens that the reply has already.
    max_tokens: of the whole reply.
    vocab: token ids are below it.
    edge: whether an edge takes part.
    """

    def __init__(self, made: tuple[int, ...], *, max_tokens: int, vocab: int, edge: bool) -> None:
        self.tokens: list[int] = list(made)
        self.maker = Maker.EDGE if edge else Maker.CLOUD
        self.reason = ""
        self._max_tokens = max_tokens
        self._vocab = vocab

    @property
    def next_index(self) -> int:
        return len(self.tokens)

    # -- the edge ------------------------------------------------------------------------------

    def edge_tokens(
        self, index: int, tokens: tuple[int, ...], pieces: tuple[str, ...]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What of the edge's tokens is new, and taken; their index was `next_index`.

        Raises:
            InvalidArgument: they leave a gap, come without their pieces, or cannot be the reply's.
        """
        if len(tokens) != len(pieces):
            raise InvalidArgument("The edge sent tokens without their text.")
        if index > self.next_index:
            raise InvalidArgument(
                f"The edge sent token {index}; {self.next_index} is the next one."
            )
        if any(token >= self._vocab for token in tokens):
            raise InvalidArgument("The edge sent tokens that the model does not have.")
        if index + len(tokens) > self._max_tokens:
            raise InvalidArgument("The edge sent more tokens than the turn may have.")
        if self.maker is not Maker.EDGE:
            return (), ()
        skip = self.next_index - index
        self.tokens += tokens[skip:]
        return tokens[skip:], pieces[skip:]

    def hand_over(self, next_index: int) -> None:
        """The edge stops; the cloud makes tokens from `next_index` on.

        Raises:
            InvalidArgument: tokens before `next_index` never came.
        """
        if self.maker is not Maker.EDGE:
            return  # it was stopped meanwhile: its last tokens were not taken
        if next_index != self.next_index:
            raise InvalidArgument(
                f"The edge hands over at token {next_index}; {self.next_index} came."
            )
        self.maker = Maker.CLOUD

    def edge_ended(self, reason: str, next_index: int) -> None:
        """The edge made the whole reply. Raises InvalidArgument as `hand_over` does."""
        if self.maker is not Maker.EDGE:
            return
        if next_index != self.next_index or reason not in END_REASONS:
            raise InvalidArgument(f"The edge ended a turn ({reason!r}) whose tokens never came.")
        self.end(reason)

    def edge_lost(self) -> None:
        if self.maker is Maker.EDGE:
            self.maker = Maker.CLOUD

    # -- the cloud -----------------------------------------------------------------------------

    def stop(self) -> None:
        """Somebody stopped the turn: while the edge makes it, that is its end."""
        if self.maker is Maker.EDGE:
            self.end(Reason.CANCELLED)

    def cloud_tokens(self, tokens: tuple[int, ...]) -> None:
        assert self.maker is not Maker.NOBODY, "a token after the end"
        self.tokens += tokens

    def end(self, reason: str) -> None:
        if self.maker is not Maker.NOBODY:
            self.maker, self.reason = Maker.NOBODY, reason

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        assert (self.maker is Maker.NOBODY) == bool(self.reason)
        assert len(self.tokens) <= self._max_tokens
