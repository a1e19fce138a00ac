"""What a cloud is told of a turn: as its stream is opened, and on the way. Values to protobuf."""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import Shape
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.cloud.begin import Begun
from segue_edge.turns.planning import Planned
from segue_edge.turns.state import signals as s

Sent = s.SendTokens | s.SendPlan | s.HandOver | s.SendEnd


@dataclass(frozen=True)
class TurnFacts:
    """A turn as it begins. `planned`: None for one that is only followed; `max_tokens`: what the
    context leaves of those that were asked for."""

    asked: Asked
    begun: Begun
    planned: Planned | None = None
    max_tokens: int = 0


def turn_spec(
    facts: TurnFacts, shape: Shape, recipe: str, again: s.TakeOver | None = None
) -> dpb.TurnSpec:
    """The opening of a planned turn's stream; `again`: to take it over with what is known."""
    request, planned = facts.asked.request, facts.planned
    assert planned is not None
    return dpb.TurnSpec(
        session=request.session,
        device=request.device,
        turn=request.turn,
        epoch=facts.begun.epoch,
        prompt=facts.begun.prompt,
        blocks=planned.ids,
        recipe=recipe,
        max_tokens=facts.max_tokens,
        sampling=request.sampling,
        stop=request.stop,
        shape=shape.value,
        ship_blocks=len(planned.ids) if shape is Shape.SHIP else 0,
        edge_cached_tokens=planned.report.edge_cached_blocks * BLOCK_TOKENS,
        takeover=again is not None,
        known_tokens=again.known if again is not None else (),
    )


def run_request(wanted: Sent, plan: bytes) -> dpb.RunRequest:
    """`plan`: the report so far, for a SendPlan."""
    match wanted:
        case s.SendTokens(frame):
            made = dpb.EdgeTokens(index=frame.index, tokens=frame.tokens, pieces=frame.pieces)
            return dpb.RunRequest(tokens=made)
        case s.SendPlan():
            return dpb.RunRequest(plan=dpb.PlanNote(plan=plan))
        case s.HandOver():
            return dpb.RunRequest(hand_over=dpb.HandOver(next_index=wanted.next_index))
        case s.SendEnd():
            ended = dpb.EdgeEnded(reason=wanted.reason, next_index=wanted.next_index)
            return dpb.RunRequest(ended=ended)
