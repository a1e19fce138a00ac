"""A turn's tokens on their way into the log: chunks as they were made, frames as they are kept.
Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from segue_contract.sync.ops import Frame

_MAX_FRAME_TOKENS = 1024


@dataclass(frozen=True)
class Chunk:
    """Tokens [index, next_index) of a reply, with their text, made at once by one maker."""

    index: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    made_by: str

    @property
    def next_index(self) -> int:
        return self.index + len(self.tokens)

    def after(self, index: int) -> Chunk | None:
        """What of it lies at `index` or beyond."""
        skip = max(0, index - self.index)
        if skip >= len(self.tokens):
            return None
        return Chunk(self.index + skip, self.tokens[skip:], self.pieces[skip:], self.made_by)


def frames_of(
    chunks: Iterable[Chunk], *, turn: str, epoch: int, device: str, at_ms: int
) -> list[Frame]:
    """Neighbouring tokens of one maker become one frame."""
    joined: list[Chunk] = []
    for chunk in chunks:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.made_by == chunk.made_by
            and len(last.tokens) + len(chunk.tokens) <= _MAX_FRAME_TOKENS
        ):
            joined[-1] = Chunk(
                last.index, last.tokens + chunk.tokens, last.pieces + chunk.pieces, last.made_by
            )
        else:
            joined.append(chunk)
    return [
        Frame(
            id=f"{turn}.{epoch}.{chunk.index}",
            device=device,
            at_ms=at_ms,
            turn=turn,
            epoch=epoch,
            index=chunk.index,
            tokens=chunk.tokens,
            pieces=chunk.pieces,
            made_by=chunk.made_by,
        )
        for chunk in joined
    ]


def after(frame: Frame, index: int) -> Frame | None:
    """What of `frame` lies at token `index` or beyond."""
    skip = max(0, index - frame.index)
    if skip >= len(frame.tokens):
        return None
    if not skip:
        return frame
    return msgspec.structs.replace(
        frame,
        index=frame.index + skip,
        tokens=frame.tokens[skip:],
        pieces=frame.pieces[skip:],
    )
