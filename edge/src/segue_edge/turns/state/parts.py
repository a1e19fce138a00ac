"""What a turn's state consists of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from segue_contract.plan import Shape


@dataclass(frozen=True)
class Duties:
    """What a plan's shape asks of the edge."""

    makes: bool  # it prefills and makes tokens
    hands_over: bool  # it stops when the cloud is ready


DUTIES = {
    Shape.TEXT: Duties(makes=False, hands_over=False),
    Shape.SHIP: Duties(makes=True, hands_over=True),
    Shape.EDGE: Duties(makes=True, hands_over=False),
}


class Maker(Enum):
    """The edge's own decoder."""

    NONE = "none"
    MAKING = "making"
    HALTED = "halted"
    ENDED = "ended"
    FAILED = "failed"


@dataclass
class Link:
    """The one attempt at a cloud that counts now."""

    number: int
    shape: Shape = Shape.TEXT
    takes_tokens: bool = False  # the first attempt: the edge's tokens go up over it
    known: tuple[int, ...] = ()  # a take-over's: tokens that it was opened with
    opened: bool = False
    opened_at: float = 0.0
    progressed: bool = False  # it brought something that was not known
    resume_at: int = 0
    attached: bool = False
    ships: bool = False
    ready: bool = False
    last: bool = False  # KV failed: nothing follows a hand-over
    settled: bool = False  # handed over, ended or stopped: the edge owes nothing more
    follows: bool = False

    @property
    def owes(self) -> bool:
        """What the edge makes goes to this cloud, and its end or a hand-over is to come."""
        return self.takes_tokens and not self.settled and not self.attached
