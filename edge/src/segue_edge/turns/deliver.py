"""An offline turn on its way into the log, once a cloud is back."""

from __future__ import annotations

import asyncio

import structlog

from segue_contract.errors import Unreachable
from segue_contract.kv.layout import block_ids
from segue_contract.limits import RPC_TIMEOUT_S
from segue_contract.plan import Shape
from segue_contract.sync.state import decode_turns
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.begin import call_begin
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.outbox import OfflineTurn
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.outbox")


async def deliver(deps: EdgeDeps, offline: OfflineTurn) -> None:
    """Append the turn: Begin with its own id, its tokens, its end.

    A turn that the cloud knows already is left as the log has it: it began there, the link broke,
    and the cloud finished it.

    Raises:
        SegueError: retryable ones leave the turn in the outbox.
    """
    asked = offline.asked
    cloud = deps.clouds.best(asked.session)
    history = deps.histories.of(asked.session)
    reply = await call_begin(cloud, asked, history)
    if reply.joined:
        log.warning("offline_turn_known", session=asked.session, turn=asked.turn)
        return
    history.merge(reply.tail.generation, reply.first_turn, decode_turns(reply.turns))
    try:
        async with asyncio.timeout(RPC_TIMEOUT_S):
            await _send(deps, cloud, offline, reply.epoch)
    except TimeoutError as error:
        raise Unreachable("The cloud did not take an offline turn in time.") from error
    log.info("offline_turn_appended", session=asked.session, turn=asked.turn)


async def _send(deps: EdgeDeps, cloud: Cloud, offline: OfflineTurn, epoch: int) -> pb.TurnEnded:
    request = offline.asked.request
    spec = dpb.TurnSpec(
        session=request.session,
        device=request.device,
        turn=request.turn,
        epoch=epoch,
        prompt=offline.prompt,
        blocks=block_ids(deps.recipe, offline.prompt),
        recipe=deps.recipe,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        stop=request.stop,
        shape=Shape.EDGE.value,
    )
    async with TurnStream(cloud, spec, deps.clouds.pacer) as stream:
        tokens = dpb.EdgeTokens(index=0, tokens=offline.tokens, pieces=offline.pieces)
        stream.control(dpb.RunRequest(plan=dpb.PlanNote(plan=offline.plan)))
        if offline.tokens:
            stream.control(dpb.RunRequest(tokens=tokens))
        ended = dpb.EdgeEnded(reason=offline.reason, next_index=len(offline.tokens))
        stream.control(dpb.RunRequest(ended=ended))
        async for message in stream.replies():
            if message.WhichOneof("kind") == "ended":
                return message.ended
    raise Unreachable("The cloud closed the stream of an offline turn before its end.")
