"""A turn's events from what the session log holds of it."""

from __future__ import annotations

from segue_contract.sync import ops
from segue_contract.sync.state import TurnState
from segue_contract.turn.events import Ended, Frame, MadeBy, Started, TurnEvent
from segue_contract.turn.wire import reason_of


def op_event(op: object, offset: int) -> TurnEvent | None:
    """The event of the op at `offset`; None for ops that readers of a turn do not see.

    Raises:
        InvalidArgument: a turn_ended without a reason that we know.
    """
    match op:
        case ops.TurnStarted():
            return Started(op.turn, op.epoch, offset)
        case ops.Frame():
            return op_frame(op, offset)
        case ops.TurnEnded():
            return op_ended(op, op.usage.completion_tokens, offset)
        case _:
            return None


def op_frame(op: ops.Frame, offset: int) -> Frame:
    return Frame(
        op.epoch, op.index, op.tokens, op.pieces, True, offset, MadeBy(op.made_by or MadeBy.CLOUD)
    )


def op_ended(op: ops.TurnEnded, next_index: int, offset: int) -> Ended:
    return Ended(
        epoch=op.epoch,
        reason=reason_of(op.reason),
        usage=op.usage,
        plan=op.plan,
        offset=offset,
        error_code=op.error_code,
        error_message=op.error_message,
        next_index=next_index,
    )


def turn_events(turn: TurnState, from_index: int = 0) -> list[TurnEvent]:
    """A folded turn as its readers would have seen it, tokens before `from_index` left out."""
    events: list[TurnEvent] = [Started(turn.turn, turn.epoch, turn.last_offset)]
    if from_index < len(turn.tokens):
        events.append(
            Frame(
                turn.epoch,
                from_index,
                tuple(turn.tokens[from_index:]),
                tuple(turn.pieces[from_index:]),
                True,
                turn.last_offset,
            )
        )
    if turn.ended:
        events.append(
            Ended(
                epoch=turn.epoch,
                reason=reason_of(turn.reason),
                usage=turn.usage,
                plan=turn.plan,
                offset=turn.last_offset,
                error_code=turn.error_code,
                error_message=turn.error_message,
                next_index=len(turn.tokens),
            )
        )
    return events
