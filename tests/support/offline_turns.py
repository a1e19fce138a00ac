"""Offline turns as tests say them."""

from __future__ import annotations

from segue_contract.ids import SessionName
from segue_contract.plan import PlanReport, encode_plan
from segue_contract.turn.events import Reason
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn

REQUEST = pb.RunTurnRequest(
    session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=50
)
TRIP, BUSY = SessionName("default", "trip"), SessionName("default", "busy")
SHOWN = (200, 201, 202)


def offline(
    tokens: tuple[int, ...] = SHOWN, *, begun: bool = False, request: pb.RunTurnRequest = REQUEST
) -> OfflineTurn:
    plan = encode_plan(PlanReport(shape="edge"))
    pieces = tuple("x" for _ in tokens)
    asked = Asked.of(request, TRIP.tenant)
    return OfflineTurn(asked, (10, 11, 12), tokens, pieces, Reason.STOP, plan, begun)


def said(turn: str, session: str = "trip") -> OfflineTurn:
    request = pb.RunTurnRequest(
        session=session, device="phone", turn=turn, prompt="Hello", max_tokens=50
    )
    return offline(request=request)


async def keep(outbox: Outbox, *turns: OfflineTurn) -> None:
    for turn in turns:
        await outbox.reserve().keep(turn)
