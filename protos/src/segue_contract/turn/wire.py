"""A turn's events to and from protobuf: the one place that looks at a message's kind.

`Decode.Run` and `Agent.RunTurn` carry the same submessages in different envelopes; the functions
named after a submessage serve both.
"""

from __future__ import annotations

from segue_contract.errors import InvalidArgument
from segue_contract.limits import MAX_NEW_TOKENS
from segue_contract.sync.ops import Usage
from segue_contract.turn.events import (
    Durable,
    Ended,
    Frame,
    MadeBy,
    Reason,
    Rewound,
    Started,
    TurnEvent,
)
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb


def to_wire(event: TurnEvent) -> pb.TurnEvent:
    match event:
        case Started():
            started = pb.TurnStarted(turn=event.turn, epoch=event.epoch, offset=event.offset)
            return pb.TurnEvent(started=started)
        case Frame():
            return pb.TurnEvent(frame=frame_message(event))
        case Durable():
            return pb.TurnEvent(durable=durable_message(event))
        case Rewound():
            return pb.TurnEvent(rewound=pb.TurnRewound(epoch=event.epoch, index=event.index))
        case Ended():
            return pb.TurnEvent(ended=ended_message(event))


def from_wire(wire: pb.TurnEvent) -> TurnEvent | None:
    """The event; None where the message says nothing of the reply (a sign of life, or a kind of a
    later version).

    Raises:
        InvalidArgument: the fields of the event cannot be right.
    """
    match wire.WhichOneof("kind"):
        case "started":
            return Started(wire.started.turn, wire.started.epoch, wire.started.offset)
        case "frame":
            return frame_of(wire.frame)
        case "durable":
            return durable_of(wire.durable)
        case "rewound":
            return Rewound(wire.rewound.epoch, _index(wire.rewound.index))
        case "ended":
            return ended_of(wire.ended)
        case _:
            return None


def to_reply(event: TurnEvent) -> dpb.RunReply | None:
    """The event in a `Decode.Run` stream; None for those that it has no place for."""
    match event:
        case Frame():
            return dpb.RunReply(frame=frame_message(event))
        case Durable():
            return dpb.RunReply(durable=durable_message(event))
        case Ended():
            return dpb.RunReply(ended=ended_message(event))
        case Started() | Rewound():
            return None


def from_reply(reply: dpb.RunReply) -> TurnEvent | None:
    """The event in a reply of `Decode.Run`; None where it says something else.

    Raises:
        InvalidArgument: the fields of the event cannot be right.
    """
    match reply.WhichOneof("kind"):
        case "frame":
            return frame_of(reply.frame)
        case "durable":
            return durable_of(reply.durable)
        case "ended":
            return ended_of(reply.ended)
        case _:
            return None


def frame_message(frame: Frame) -> pb.TokenFrame:
    return pb.TokenFrame(
        epoch=frame.epoch,
        index=frame.index,
        tokens=frame.tokens,
        pieces=frame.pieces,
        durable=frame.durable,
        offset=frame.offset,
        made_by=frame.made_by,
    )


def frame_of(message: pb.TokenFrame) -> Frame:
    """Raises InvalidArgument where tokens and pieces do not fit, or the index is out of bounds."""
    if len(message.tokens) != len(message.pieces):
        raise InvalidArgument(
            f"A frame has {len(message.tokens)} tokens and {len(message.pieces)} pieces."
        )
    _index(message.index + len(message.tokens))
    return Frame(
        message.epoch,
        message.index,
        tuple(message.tokens),
        tuple(message.pieces),
        message.durable,
        message.offset,
        _made_by(message.made_by),
    )


def durable_message(event: Durable) -> pb.TurnDurable:
    return pb.TurnDurable(next_index=event.next_index, offset=event.offset)


def durable_of(message: pb.TurnDurable) -> Durable:
    """Raises InvalidArgument where the index is out of bounds."""
    return Durable(_index(message.next_index), message.offset)


def ended_message(event: Ended) -> pb.TurnEnded:
    return pb.TurnEnded(
        epoch=event.epoch,
        reason=event.reason,
        usage=usage_message(event.usage),
        plan=event.plan,
        offset=event.offset,
        error_code=event.error_code,
        error_message=event.error_message,
        next_index=event.next_index,
        durable=event.durable,
    )


def ended_of(message: pb.TurnEnded) -> Ended:
    """Raises InvalidArgument where the reason is unknown."""
    return Ended(
        epoch=message.epoch,
        reason=reason_of(message.reason),
        usage=usage_of(message.usage),
        plan=message.plan,
        offset=message.offset,
        error_code=message.error_code,
        error_message=message.error_message,
        next_index=_index(message.next_index),
        durable=message.durable,
    )


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        edge_cached_tokens=usage.edge_cached_tokens,
        cloud_cached_tokens=usage.cloud_cached_tokens,
    )


def usage_of(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        edge_cached_tokens=message.edge_cached_tokens,
        cloud_cached_tokens=message.cloud_cached_tokens,
    )


def reason_of(text: str) -> Reason:
    """Raises InvalidArgument where `text` is no reason."""
    try:
        return Reason(text)
    except ValueError:
        raise InvalidArgument(f"{text[:32]!r} is no reason for a turn to end.") from None


def _made_by(text: str) -> MadeBy:
    try:
        return MadeBy(text or MadeBy.CLOUD)
    except ValueError:
        raise InvalidArgument(f"{text[:32]!r} makes no tokens here.") from None


def _index(index: int) -> int:
    if not 0 <= index <= MAX_NEW_TOKENS:
        raise InvalidArgument(f"Token {index} lies beyond the longest reply.")
    return index
