"""What happens in one turn, in the order in which its readers are told."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from segue_contract.sync.ops import Usage


class Reason(StrEnum):
    """Why a turn ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens, or the context, is reached
    CANCELLED = "cancelled"  # somebody stopped it
    ERROR = "error"  # `Ended.error_code` says which


class MadeBy(StrEnum):
    """Which decoder made a token."""

    EDGE = "edge"
    CLOUD = "cloud"


class Started(msgspec.Struct, frozen=True):
    """The log has the turn; `offset` is that of its first op (0: it began out of the log)."""

    turn: str
    epoch: int
    offset: int = 0


class Frame(msgspec.Struct, frozen=True):
    """Tokens [index, index + len(tokens)) of the reply; `pieces[i]` is the text that token i
    completed. `durable`: the log holds them, at `offset`; otherwise they are a preview."""

    epoch: int
    index: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    durable: bool = False
    offset: int = 0
    made_by: MadeBy = MadeBy.CLOUD

    @property
    def next_index(self) -> int:
        return self.index + len(self.tokens)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def beyond(self, index: int) -> Frame | None:
        """The part from token `index` on; None where nothing is left."""
        skip = index - self.index
        if skip <= 0:
            return self
        if skip >= len(self.tokens):
            return None
        return msgspec.structs.replace(
            self, index=index, tokens=self.tokens[skip:], pieces=self.pieces[skip:]
        )


class Durable(msgspec.Struct, frozen=True):
    """Tokens before `next_index`, shown earlier as previews, are in the log now."""

    next_index: int
    offset: int = 0


class Rewound(msgspec.Struct, frozen=True):
    """Tokens from `index` on were shown and are taken back; what follows replaces them."""

    epoch: int
    index: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the turn with `next_index` tokens. `durable` is False only for a turn served
    while the cloud was out of reach: the log gets it later, or refused it for good (ERROR)."""

    reason: Reason
    next_index: int
    epoch: int = 0
    usage: Usage = Usage()
    plan: bytes = b""
    offset: int = 0
    error_code: str = ""
    error_message: str = ""
    durable: bool = True


TurnEvent: TypeAlias = Started | Frame | Durable | Rewound | Ended
