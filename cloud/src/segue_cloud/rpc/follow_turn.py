"""Events of a turn that another instance owns, seen through the log."""

from __future__ import annotations

from collections.abc import AsyncIterator

from segue_cloud.log.session_log import SessionLog
from segue_contract.ids import SessionName
from segue_contract.sync.ops import decode_op
from segue_contract.sync.state import find_turn
from segue_contract.turn.events import Ended, Frame, Rewound, TurnEvent
from segue_contract.turn.feed import trim
from segue_contract.turn.from_log import op_event, turn_events


async def follow_turn(
    log: SessionLog, session: SessionName, turn: str, from_index: int
) -> AsyncIterator[TurnEvent]:
    """The turn's frames from `from_index` on, then its end, as they reach the log."""
    position = from_index
    async with log.follow(session) as following:
        async for item in following:
            if item.snapshot is not None:
                known = find_turn(item.snapshot, turn)
                if known is None:
                    return  # the log lost the turn: whoever asks for it again begins it again
                if len(known.tokens) < position:
                    # The log lost tokens that its readers were shown; others may follow.
                    position = len(known.tokens)
                    yield Rewound(known.epoch, position)
                for event in turn_events(known, position):
                    yield event
                position = len(known.tokens)
                if known.ended:
                    return
            for entry in item.entries:
                op = decode_op(entry.op)
                if getattr(op, "turn", None) != turn:
                    continue
                found = op_event(op, entry.cursor.offset)
                found = trim(found, position) if found is not None else None
                if found is None:
                    continue
                if isinstance(found, Frame):
                    position = found.next_index
                yield found
                if isinstance(found, Ended):
                    return
