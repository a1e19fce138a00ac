"""What the store knows of a session besides its log: what makes a turn's id, asked for again, join
that turn, and what counts for quotas. Made of the folded log, for an import and where a store
evicted it."""

from __future__ import annotations

from collections.abc import Sequence

from segue_cloud.sessions.quota import taken
from segue_contract.limits import TITLE_CHARS, TURN_ID_MEMORY
from segue_contract.sync.ops import request_digest
from segue_contract.sync.state import SessionState, TurnState

Part = str | int | bytes


def known_fields(state: SessionState) -> list[Part]:
    """Names and values of the hash `meta`; see log.lua."""
    names, counts = taken(state)
    fields: list[Part] = ["n", len(state.turns)]
    for name, count in counts.items():
        fields += [name, count]
    for slot in names:
        fields += [f"q:{slot}", 1]
    for turn in state.turns:
        asked = request_digest(turn.prompt, turn.max_tokens, turn.sampling, turn.stop)
        fields += [f"d:{turn.turn}", asked]
    for turn in _remembered(state.turns):
        fields += [f"t:{turn.turn}", f"{turn.epoch}|0|", f"x:{turn.turn}", f"{int(turn.ended)}|"]
    return fields


def known_turns(state: SessionState) -> list[Part]:
    """Scores and members of the sorted set `turns`."""
    return [part for turn in _remembered(state.turns) for part in (turn.last_offset, turn.turn)]


def title_of(text: str) -> str:
    """What a session is about: the begin of its first message."""
    return " ".join(text.split())[:TITLE_CHARS]


def running_turn(state: SessionState) -> str:
    """The last turn, where it has no end; else ""."""
    return state.turns[-1].turn if state.turns and not state.turns[-1].ended else ""


def _remembered(turns: Sequence[TurnState]) -> Sequence[TurnState]:
    return turns[-TURN_ID_MEMORY:]
