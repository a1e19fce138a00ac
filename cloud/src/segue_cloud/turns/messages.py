"""Log ops as the events that readers of a turn get."""

from __future__ import annotations

from segue_contract.sync.ops import Frame, TurnEnded, TurnStarted, Usage
from segue_contract.sync.state import TurnState
from segue_contract.v1 import agent_pb2 as pb


def started_event(turn: str, epoch: int, offset: int) -> pb.TurnEvent:
    return pb.TurnEvent(started=pb.TurnStarted(turn=turn, epoch=epoch, offset=offset))


def frame_event(frame: Frame, offset: int) -> pb.TurnEvent:
    return pb.TurnEvent(
        frame=pb.TokenFrame(
            epoch=frame.epoch,
            index=frame.index,
            tokens=frame.tokens,
            pieces=frame.pieces,
            durable=True,
            offset=offset,
            made_by=frame.made_by,
        )
    )


def durable_tokens_event(turn: TurnState, from_index: int) -> pb.TurnEvent:
    """The tokens of a folded turn from `from_index` on, as one frame."""
    return pb.TurnEvent(
        frame=pb.TokenFrame(
            epoch=turn.epoch,
            index=from_index,
            tokens=turn.tokens[from_index:],
            pieces=turn.pieces[from_index:],
            durable=True,
            offset=turn.last_offset,
            made_by="cloud",
        )
    )


def ended_event(
    op: TurnEnded, next_index: int, offset: int, *, durable: bool = True
) -> pb.TurnEvent:
    return pb.TurnEvent(
        ended=pb.TurnEnded(
            epoch=op.epoch,
            reason=op.reason,
            usage=usage_message(op.usage),
            plan=op.plan,
            offset=offset,
            error_code=op.error_code,
            error_message=op.error_message,
            next_index=next_index,
            durable=durable,
        )
    )


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        edge_cached_tokens=usage.edge_cached_tokens,
        cloud_cached_tokens=usage.cloud_cached_tokens,
    )


def op_event(op: object, offset: int) -> pb.TurnEvent | None:
    """The event of a log op of a turn; None for ops that readers of a turn do not see."""
    if isinstance(op, TurnStarted):
        return started_event(op.turn, op.epoch, offset)
    if isinstance(op, Frame):
        return frame_event(op, offset)
    if isinstance(op, TurnEnded):
        return ended_event(op, op.usage.completion_tokens, offset)
    return None


def folded_events(turn: TurnState, from_index: int) -> list[pb.TurnEvent]:
    """A folded turn as its readers would have seen it, tokens before `from_index` left out."""
    events = [started_event(turn.turn, turn.epoch, turn.last_offset)]
    if from_index < len(turn.tokens):
        events.append(durable_tokens_event(turn, from_index))
    if turn.ended:
        op = TurnEnded(
            id=f"{turn.turn}.ended",
            turn=turn.turn,
            epoch=turn.epoch,
            reason=turn.reason,
            usage=turn.usage,
            plan=turn.plan,
            error_code=turn.error_code,
            error_message=turn.error_message,
        )
        events.append(ended_event(op, len(turn.tokens), turn.last_offset))
    return events
