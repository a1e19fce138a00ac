"""An offline turn on its way into the log, once a cloud is back."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from segue_contract.errors import UnknownTurn, Unreachable
from segue_contract.kv.layout import block_ids
from segue_contract.limits import RPC_TIMEOUT_S
from segue_contract.plan import Shape
from segue_contract.sync.state import decode_turns
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.begin import call_begin
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.outbox import OfflineTurn
from segue_edge.turns.reply import Reply
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.outbox")


async def deliver(deps: EdgeDeps, offline: OfflineTurn) -> None:
    """Append the turn: Begin with its own id, its tokens, its end.

    A turn that the log has without an end is taken over with its tokens. Where the log has other
    tokens, or an end, the log's text stands.

    Raises:
        SegueError: retryable ones leave the turn in the outbox.
    """
    try:
        async with asyncio.timeout(RPC_TIMEOUT_S):
            if offline.begun:
                with contextlib.suppress(UnknownTurn):  # the log has lost it, or has its end
                    await _take_over(deps, offline)
                    return
        await _begin_and_send(deps, offline)
    except TimeoutError as error:
        raise Unreachable("The cloud did not take an offline turn in time.") from error


async def _begin_and_send(deps: EdgeDeps, offline: OfflineTurn) -> None:
    """Begin may wait for the session's running turn; what follows has `RPC_TIMEOUT_S`."""
    asked = offline.asked
    cloud = deps.clouds.best(asked.session)
    history = deps.histories.of(asked.session)
    reply = await call_begin(cloud, asked, history)
    if not reply.joined:
        history.merge(reply.tail.generation, reply.first_turn, decode_turns(reply.turns))
    async with asyncio.timeout(RPC_TIMEOUT_S):
        if reply.joined:
            await _take_over(deps, offline)
        else:
            await _send(deps, cloud, offline, reply.epoch)


async def _send(deps: EdgeDeps, cloud: Cloud, offline: OfflineTurn, epoch: int) -> None:
    async with TurnStream(cloud, _spec(deps, offline, epoch), deps.clouds.pacer) as stream:
        tokens = dpb.EdgeTokens(index=0, tokens=offline.tokens, pieces=offline.pieces)
        stream.control(dpb.RunRequest(plan=dpb.PlanNote(plan=offline.plan)))
        if offline.tokens:
            stream.control(dpb.RunRequest(tokens=tokens))
        stream.control(_end_of(offline))
        async for message in stream.replies():
            if message.WhichOneof("kind") == "ended":
                log.info(
                    "offline_turn_appended", session=offline.asked.session, turn=offline.asked.turn
                )
                return
    raise Unreachable("The cloud closed the stream of an offline turn before its end.")


async def _take_over(deps: EdgeDeps, offline: OfflineTurn) -> None:
    """End a turn that the log knows: with our tokens, unless the log goes on otherwise."""
    asked = offline.asked
    cloud = deps.clouds.best(asked.session)
    spec = _spec(deps, offline, 0)
    spec.takeover = True
    spec.known_tokens.extend(offline.tokens)
    reply = Reply(epoch=0)
    reply.preview(offline.tokens, offline.pieces)
    in_log: int | None = None  # tokens that the log held as the cloud took the turn over
    answered = False
    async with TurnStream(cloud, spec, deps.clouds.pacer) as stream:
        stream.control(dpb.RunRequest(plan=dpb.PlanNote(plan=offline.plan)))
        async for message in stream.replies():
            kind = message.WhichOneof("kind")
            if kind == "opened":
                in_log = message.opened.next_index
            elif kind == "frame":
                reply.accept(message.frame)
            elif kind == "durable":
                reply.mark_durable(message.durable.next_index, message.durable.offset)
            elif kind == "ended":
                _say_whose_text_stands(offline, reply, message.ended)
                return
            if not answered and in_log is not None and reply.durable >= in_log:
                answered = True
                same = tuple(reply.tokens) == offline.tokens
                other = dpb.RunRequest(hand_over=dpb.HandOver(next_index=in_log))
                with contextlib.suppress(Unreachable):  # `replies` says why
                    stream.control(_end_of(offline) if same else other)
    raise Unreachable("The cloud closed the stream of an offline turn before its end.")


def _say_whose_text_stands(offline: OfflineTurn, reply: Reply, ended: pb.TurnEnded) -> None:
    asked = offline.asked
    ours = tuple(reply.tokens) == offline.tokens and ended.next_index == len(offline.tokens)
    if ours:
        log.info("offline_turn_appended", session=asked.session, turn=asked.turn)
        return
    log.warning(
        "offline_turn_differs",
        session=asked.session,
        turn=asked.turn,
        stands="the log's text, not the one that this edge showed",
        tokens_shown=len(offline.tokens),
        tokens_in_log=ended.next_index,
        end=ended.reason,
    )


def _end_of(offline: OfflineTurn) -> dpb.RunRequest:
    ended = dpb.EdgeEnded(reason=offline.reason, next_index=len(offline.tokens))
    return dpb.RunRequest(ended=ended)


def _spec(deps: EdgeDeps, offline: OfflineTurn, epoch: int) -> dpb.TurnSpec:
    request = offline.asked.request
    return dpb.TurnSpec(
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
