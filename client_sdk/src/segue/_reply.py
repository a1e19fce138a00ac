"""What the wire says of one turn, turned into the events its reader gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from segue import events
from segue_contract.errors import InvalidArgument, TurnFailed
from segue_contract.plan import PlanReport, decode_plan
from segue_contract.turn.events import Durable, Ended, Frame, Reason, Rewound, Started, TurnEvent
from segue_contract.turn.merge import Merged, Merger
from segue_contract.turn.wire import from_wire
from segue_contract.v1 import agent_pb2 as pb


class ReplyView:
    """Collects one turn's events over any number of streams, each token once.

    `incomplete` is true right after an end that came before all of the turn's tokens: a further
    stream from `resume_index` brings them, and the end again.
    """

    def __init__(self, turn: str) -> None:
        self.turn = turn
        self.merger = Merger()
        self.started = False
        self.ended: events.Ended | None = None
        self.incomplete = False

    @property
    def resume_index(self) -> int:
        """Where a further stream must begin: tokens before it are known and in the log."""
        return self.merger.durable_index

    def reopen(self) -> None:
        """The end was not the log's; the log's own is to come."""
        self.ended = None
        self.merger.reopen()

    def take(self, wire: pb.TurnEvent) -> list[events.TurnEvent]:
        """The events that `wire` brings; [] where it says what is known.

        Raises:
            InvalidArgument: a frame that is none.
        """
        event = from_wire(wire)
        if self.ended is not None or event is None:
            return []
        self.incomplete = False
        out: list[events.TurnEvent] = []
        if not self.started:  # a joined turn may begin with a frame
            self.started = True
            first = event if isinstance(event, Started) else Started(self.turn, 1)
            out.append(events.Started(first.turn or self.turn, first.epoch or 1, first.offset))
        return out + self._take(event)

    def _take(self, event: TurnEvent) -> list[events.TurnEvent]:
        match event:
            case Frame():
                return _told(self.merger.push(event))
            case Durable():
                return _told(self.merger.confirm(event.next_index, event.offset))
            case Rewound():
                return _told(self.merger.rewind(event.epoch, event.index))
            case Ended():
                return self._end(event)
            case Started():
                return []

    def _end(self, end: Ended) -> list[events.TurnEvent]:
        merged = self.merger.confirm(end.next_index, end.offset) if end.durable else []
        out = _told(merged + self.merger.end(end.next_index))
        self.incomplete = not self.merger.complete
        if self.incomplete:
            return out
        self.ended = events.Ended(
            reason=end.reason,
            usage=end.usage,
            plan=_plan(end.plan),
            epoch=end.epoch,
            offset=end.offset,
            durable=end.durable,
            error=_error(end),
        )
        return [*out, self.ended]


def _told(merged: Sequence[Merged]) -> list[events.TurnEvent]:
    out: list[events.TurnEvent] = []
    for one in merged:
        match one:
            case Frame():
                out.append(
                    events.Frame(
                        index=one.index,
                        tokens=one.tokens,
                        pieces=one.pieces,
                        durable=one.durable,
                        made_by=one.made_by,
                        epoch=one.epoch,
                        offset=one.offset,
                    )
                )
            case Durable():
                out.append(events.Durable(one.next_index, one.offset))
            case Rewound():
                out.append(events.Rewound(one.index, one.epoch))
    return out


def _plan(data: bytes) -> PlanReport | None:
    if not data:
        return None
    try:
        return decode_plan(data)
    except InvalidArgument:
        return None  # a later version's report: not worth failing a reply that is whole


def _error(end: Ended) -> TurnFailed | None:
    if end.reason is not Reason.ERROR:
        return None
    return TurnFailed(end.error_message or "The turn failed.", code=end.error_code)
