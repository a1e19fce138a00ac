"""What a running turn, and a followed session, tell their reader.

Every event has `.text`: the new text it brings, "" where it brings none. So
`print(event.text, end="")` over the events of a turn prints the reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from segue_contract.errors import TurnFailed
from segue_contract.plan import PlanReport
from segue_contract.sync.ops import Frame as FrameOp
from segue_contract.sync.ops import Op, Usage
from segue_contract.sync.state import Cursor, SessionState


@dataclass(frozen=True, slots=True)
class Started:
    """The turn was accepted; from here on it runs to its end, whoever listens."""

    turn: str
    epoch: int
    offset: int

    @property
    def text(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens [index, index + len(tokens)) of the reply; `pieces[i]` is the text token i completed.

    `durable`: the session log holds them (at `offset`); otherwise they are a preview that a later
    `Durable` confirms or a `Rewound` takes back. `made_by` is "edge" or "cloud".
    """

    index: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    durable: bool
    made_by: str
    epoch: int
    offset: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def next_index(self) -> int:
        return self.index + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Durable:
    """Tokens before `next_index`, shown earlier as previews, are in the log now."""

    next_index: int
    offset: int

    @property
    def text(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Rewound:
    """Tokens from `index` on never became durable: forget them; what follows replaces them."""

    index: int
    epoch: int

    @property
    def text(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn's last event. `reason`: "stop", "length", "cancelled" or "error" (see `error`).

    `durable` is False where the reply was made out of the log's reach: `Turn.settled` tells what
    becomes of it.
    """

    reason: str
    usage: Usage
    plan: PlanReport | None
    epoch: int
    offset: int
    durable: bool = True
    error: TurnFailed | None = None

    @property
    def text(self) -> str:
        return ""

    @property
    def pending(self) -> bool:
        """The log has yet to take the turn."""
        return not self.durable and self.error is None


TurnEvent: TypeAlias = Started | Frame | Durable | Rewound | Ended


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    turn: str
    text: str
    tokens: tuple[int, ...]
    reason: str
    usage: Usage
    plan: PlanReport | None


@dataclass(frozen=True, slots=True)
class Lost:
    """Entries [first, last] that were read under `generation` are not in the log any more."""

    generation: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole session folded at `offset`: always the first item of a followed session.

    A later one replaces everything known before it: the log was compacted past what this device
    had, or the store lost entries that this device had seen: `lost` says which.
    `state` is a copy that nobody else changes.
    """

    state: SessionState
    offset: int
    generation: int
    lost: Lost | None = None

    @property
    def text(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the session log: exactly one per offset, in order."""

    offset: int
    op: Op
    generation: int

    @property
    def text(self) -> str:
        """Text of reply tokens, for a frame; "" for every other op."""
        return self.op.text if isinstance(self.op, FrameOp) else ""


@dataclass(frozen=True, slots=True)
class Imported:
    """A session that was made of a file; its log ends at `cursor`."""

    session: str
    cursor: Cursor
    turns: int


@dataclass(frozen=True, slots=True)
class OfflineTurn:
    """A message that an edge served out of the log's reach, and that the log does not have.

    `title`: how it begins. `error`: why the log refused it for good; None while it waits.
    """

    turn: str
    device: str
    title: str
    error: TurnFailed | None = None


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One line of the list of sessions. `updated_ms`: milliseconds since 1970."""

    session: str
    cursor: Cursor
    updated_ms: int
    title: str
    turns: int
    running_turn: str


@dataclass(slots=True)
class Timing:
    """Measured by this device's clock, in seconds from the call to `run`; 0.0: not yet."""

    first_token_s: float = 0.0
    first_token_by: str = ""
    last_token_s: float = 0.0
    first_tokens: int = 0
    tokens: int = 0

    def saw(self, seconds: float, next_index: int, made_by: str) -> None:
        """A frame came; the reply has `next_index` tokens now."""
        if not self.first_token_by:
            self.first_token_s, self.first_token_by = seconds, made_by or "?"
            self.first_tokens = next_index
        self.tokens = next_index
        self.last_token_s = seconds

    @property
    def tokens_per_s(self) -> float:
        """After the first frame, so that the wait for it does not count; 0.0 where unknown."""
        span = self.last_token_s - self.first_token_s
        return max(0, self.tokens - self.first_tokens) / span if span > 0 else 0.0
