"""What an edge lacks of a session's finished turns. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from segue_contract.ids import digest
from segue_contract.sync.state import TurnState


def known_digest(turns: Sequence[TurnState]) -> bytes:
    """Names a list of turns, so that an edge need not name each."""
    return digest(*(turn.turn.encode() for turn in turns))


def first_unknown(finished: Sequence[TurnState], known: int, named: bytes) -> int:
    """How many of the first finished turns the edge knows, if it says `known`.

    Turns are in order of their messages, but one may end after a later one: then the edge knows
    others than the first. `named`: the `known_digest` of those it knows; empty: not compared.
    """
    known = min(known, len(finished))
    return known if not named or named == known_digest(finished[:known]) else 0
