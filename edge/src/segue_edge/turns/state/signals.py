"""What a turn is told (signals) and what it asks for (instructions). Pure values.

`turn.TurnState` makes the one of the other; `TurnExecutor` performs instructions and
brings the signals. `link` and `maker` number the attempts: what an earlier one still says is known
by its number and has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from segue_contract.errors import SegueError
from segue_contract.plan import Shape
from segue_contract.turn.events import Durable, Ended, Frame, Reason, Rewound, Started, TurnEvent

# -- signals: from the edge's own decoder --------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """The maker is past another token. `tokens` are those that may be shown now, from `index` on:
    none while they may begin a stop string."""

    maker: int
    index: int
    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class MakerEnded:
    """The maker made the reply's last token."""

    maker: int
    reason: Reason


@dataclass(frozen=True)
class MakerFailed:
    maker: int
    error: SegueError


# -- signals: from a cloud -----------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The cloud answers for the turn.

    Attributes:
        next_index: first token that its log lacks.
        attached: it ran the turn already, so what this edge makes is not taken.
        ships: KV goes up over this link, and a hand-over is owed when it is ready.
    """

    link: int
    epoch: int
    next_index: int = 0
    attached: bool = False
    ships: bool = False


@dataclass(frozen=True)
class Ready:
    """All KV is there and so is a place in the batch."""

    link: int


@dataclass(frozen=True)
class ShipFailed:
    """No more KV comes over this link; the cloud computes what is missing."""

    link: int


@dataclass(frozen=True)
class StopNow:
    """Somebody stopped the turn; the cloud ends it."""

    link: int


@dataclass(frozen=True)
class Logged:
    """The log, as this cloud reads it, says `event` of the turn."""

    link: int
    event: Started | Frame | Durable | Rewound | Ended


@dataclass(frozen=True)
class Broke:
    """The link is gone before the turn's end: refused, lost, silent, or closed without an end.

    `slept`: this node itself stood still, for so long that the others took it for lost.
    """

    link: int
    error: SegueError
    slept: bool = False


@dataclass(frozen=True)
class NoMoreClouds:
    """Every cloud was tried once since the last pause."""

    link: int


# -- signals: from here --------------------------------------------------------------------------


@dataclass(frozen=True)
class Woke:
    """A pause that was asked for is over."""


@dataclass(frozen=True)
class RoomKept:
    """The outbox will take this turn."""


@dataclass(frozen=True)
class NoRoom:
    error: SegueError


@dataclass(frozen=True)
class StopAsked:
    """A device stops the turn, and no cloud serves it."""


@dataclass(frozen=True)
class Stored:
    """The outbox has the turn; `ended` is what its readers are told."""

    ended: Ended


Signal: TypeAlias = (
    Made
    | MakerEnded
    | MakerFailed
    | Opened
    | Ready
    | ShipFailed
    | StopNow
    | Logged
    | Broke
    | NoMoreClouds
    | Woke
    | RoomKept
    | NoRoom
    | StopAsked
    | Stored
)

# -- instructions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MakeTokens:
    """Prefill the prompt and `made`, decode from there on, and say so as `maker`."""

    maker: int
    made: tuple[int, ...] = ()


@dataclass(frozen=True)
class HaltMaker:
    """No more tokens; the KV under way goes on going up, unless `drop`."""

    drop: bool = False


@dataclass(frozen=True)
class Open:
    """Open the turn at the cloud where it began, as planned."""

    link: int
    shape: Shape


@dataclass(frozen=True)
class TakeOver:
    """Open the turn at the next cloud with the tokens that are known; `fresh` begins a round of
    all clouds, the best first. `ship`: the prompt's KV goes along where it is at hand."""

    link: int
    known: tuple[int, ...]
    fresh: bool
    ship: bool = True


@dataclass(frozen=True)
class Follow:
    """Read the turn from the log through the best cloud, from token `from_index` on."""

    link: int
    from_index: int


@dataclass(frozen=True)
class CloseLink:
    pass


@dataclass(frozen=True)
class SendTokens:
    frame: Frame


@dataclass(frozen=True)
class SendPlan:
    """The plan's report as measured so far."""


@dataclass(frozen=True)
class HandOver:
    """The edge made the tokens before `next_index` and makes no more. `last`: nothing follows on
    this link, KV included."""

    next_index: int
    last: bool = False


@dataclass(frozen=True)
class SendEnd:
    """The edge made the whole reply."""

    reason: Reason
    next_index: int


@dataclass(frozen=True)
class Show:
    event: TurnEvent


@dataclass(frozen=True)
class Wait:
    seconds: float


@dataclass(frozen=True)
class KeepRoom:
    """The turn goes on without a cloud: reserve a place in the outbox."""


@dataclass(frozen=True)
class FreeRoom:
    """A cloud has the turn after all."""


@dataclass(frozen=True)
class Store:
    """Put the turn into the outbox: the edge ended it for `reason`."""

    reason: Reason


@dataclass(frozen=True)
class Close:
    """Nothing more is shown. With `error` the turn could not be served here; the session's log
    may have it, or will."""

    error: SegueError | None = None


Instruction: TypeAlias = (
    MakeTokens
    | HaltMaker
    | Open
    | TakeOver
    | Follow
    | CloseLink
    | SendTokens
    | SendPlan
    | HandOver
    | SendEnd
    | Show
    | Wait
    | KeepRoom
    | FreeRoom
    | Store
    | Close
)
