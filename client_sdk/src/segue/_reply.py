"""What the wire says of one turn, turned into the events its reader gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from segue import events
from segue_contract.errors import InvalidArgument, TurnFailed
from segue_contract.plan import PlanReport, decode_plan
from segue_contract.sync.merge import Durable, Fresh, Rewound, TurnMerger
from segue_contract.sync.ops import Usage
from segue_contract.v1 import agent_pb2 as pb


class ReplyView:
    """Collects one turn's events over any number of streams, each token once.

    `incomplete` is true right after an end that came before all of the turn's tokens: a further
    stream from `resume_index` brings them, and the end again.
    """

    def __init__(self, turn: str) -> None:
        self.turn = turn
        self.merger = TurnMerger()
        self.started = False
        self.ended: events.Ended | None = None
        self.incomplete = False

    @property
    def resume_index(self) -> int:
        """Where a further stream must begin: tokens before it are known and in the log."""
        return self.merger.durable_index

    def take(self, wire: pb.TurnEvent) -> list[events.TurnEvent]:
        """The events that `wire` brings; [] where it says what is known.

        Raises:
            InvalidArgument: a frame that is none.
        """
        if self.ended is not None:
            return []
        self.incomplete = False
        out: list[events.TurnEvent] = []
        kind = wire.WhichOneof("kind")
        if not self.started and kind is not None:
            # a joined turn may begin with a frame
            self.started = True
            first = wire.started
            out.append(events.Started(first.turn or self.turn, first.epoch or 1, first.offset))
        match kind:
            case "frame":
                out += self._frame(wire.frame)
            case "durable":
                merged = self.merger.confirm(wire.durable.next_index)
                out += self._events(merged, offset=wire.durable.offset)
            case "rewound":
                merged = self.merger.rewind(wire.rewound.epoch, wire.rewound.index)
                out += self._events(merged)
            case "ended":
                out += self._end(wire.ended)
        return out

    def _frame(self, frame: pb.TokenFrame) -> list[events.TurnEvent]:
        merged = self.merger.push(
            frame.epoch, frame.index, tuple(frame.tokens), tuple(frame.pieces), frame.durable
        )
        return self._events(merged, offset=frame.offset, made_by=frame.made_by)

    def _end(self, end: pb.TurnEnded) -> list[events.TurnEvent]:
        merged = self.merger.confirm(end.next_index) if end.durable else []
        merged = merged + self.merger.end(end.next_index)
        out = self._events(merged, offset=end.offset)
        self.incomplete = not self.merger.complete
        if self.incomplete:
            return out
        usage = Usage(
            prompt_tokens=end.usage.prompt_tokens,
            completion_tokens=end.usage.completion_tokens,
            edge_cached_tokens=end.usage.edge_cached_tokens,
            cloud_cached_tokens=end.usage.cloud_cached_tokens,
        )
        self.ended = events.Ended(
            reason=end.reason,
            usage=usage,
            plan=_plan(end.plan),
            epoch=end.epoch,
            offset=end.offset,
            durable=end.durable,
            error=_error(end),
        )
        return [*out, self.ended]

    def _events(
        self, merged: Sequence[Fresh | Durable | Rewound], *, offset: int = 0, made_by: str = ""
    ) -> list[events.TurnEvent]:
        out: list[events.TurnEvent] = []
        epoch = self.merger.epoch
        for one in merged:
            match one:
                case Fresh():
                    out.append(
                        events.Frame(
                            index=one.index,
                            tokens=one.tokens,
                            pieces=one.pieces,
                            durable=one.durable,
                            made_by=made_by,
                            epoch=epoch,
                            offset=offset if one.durable else 0,
                        )
                    )
                case Durable():
                    out.append(events.Durable(one.next_index, offset))
                case Rewound():
                    out.append(events.Rewound(one.index, epoch))
        return out


def _plan(data: bytes) -> PlanReport | None:
    if not data:
        return None
    try:
        return decode_plan(data)
    except InvalidArgument:
        return None  # a later version's report: not worth failing a reply that is whole


def _error(end: pb.TurnEnded) -> TurnFailed | None:
    if end.reason != "error":
        return None
    return TurnFailed(end.error_message or "The turn failed.", code=end.error_code)
