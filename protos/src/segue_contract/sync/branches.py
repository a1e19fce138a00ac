"""What was said offline while others went on: a session's branches, read from its turns. Pure.

The log has one order, and the model sees all of it. A turn that was served out of reach of the log
names the turn that it was said after; where the log has others between the two, neither side had
seen the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segue_contract.sync.state import TurnState, heard


@dataclass(frozen=True)
class Branch:
    """Turns that were said offline beside others. Ids, in the log's order.

    Attributes:
        after: the last turn that both sides had seen; empty: the session's beginning.
        beside: what the log took from others meanwhile.
        turns: the branch itself, its first turn and those said offline right after it.
    """

    after: str
    beside: tuple[str, ...]
    turns: tuple[str, ...]


def branches(turns: Sequence[TurnState]) -> list[Branch]:
    """The branches among a session's turns, in order of their first turn.

    Questions that failed before a token are beside nothing: no prompt holds them. A turn that
    follows one that the log lost has no known place, and begins no branch.
    """
    places = {turn.turn: place for place, turn in enumerate(turns)}
    found: list[Branch] = []
    for place, turn in enumerate(turns):
        after = places.get(turn.follows, place) if turn.follows else -1
        if not turn.offline or after >= place:
            continue
        beside = tuple(other.turn for other in heard(turns[after + 1 : place]))
        last = found[-1] if found else None
        if beside:
            found.append(Branch(turn.follows, beside, (turn.turn,)))
        elif last is not None and last.turns[-1] == turn.follows:
            found[-1] = Branch(last.after, last.beside, (*last.turns, turn.turn))
    return found


def branch_of(turns: Sequence[TurnState], turn: str) -> Branch | None:
    """The branch that the turn is part of, if any."""
    return next((branch for branch in branches(turns) if turn in branch.turns), None)
