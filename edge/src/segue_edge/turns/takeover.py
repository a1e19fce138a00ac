"""A broken turn stream: the same turn at the next cloud, from the first token it lacks."""

from __future__ import annotations

import asyncio
import time

import structlog

from segue_contract.errors import NotFound, SegueError, Unreachable
from segue_contract.limits import RETRY_PAUSE_MAX_S, RETRY_PAUSE_S, UPLINK_RETRY_S
from segue_contract.plan import Shape
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.link import ShowAll, TurnLink
from segue_edge.turns.measure import Measure
from segue_edge.turns.reply import Reply
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.sender import KvSender
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.turn")


async def take_over(
    deps: EdgeDeps,
    asked: Asked,
    spec: dpb.TurnSpec,
    reply: Reply,
    show: ShowAll,
    cause: SegueError,
) -> tuple[Cloud, pb.TurnEnded] | None:
    """The turn's end at some cloud, or None where none was reachable for `UPLINK_RETRY_S`.

    The edge makes no more tokens: the cloud adopts those the edge knows and decodes the rest. An
    instance that lacks the prompt's KV gets it again, where the edge still has all of it.

    Raises:
        SegueError: a cloud was reached and refuses the turn for good.
    """
    deadline = time.monotonic() + UPLINK_RETRY_S
    pause_s = RETRY_PAUSE_S
    while True:
        for cloud in deps.clouds.ranked(asked.session):
            again = _resumed(deps, cloud, spec, reply)
            async with TurnStream(cloud, again, deps.clouds.pacer) as stream:
                link = TurnLink(cloud, stream, reply, show, Measure())
                shipping = asyncio.create_task(_ship_again(deps, again, link, reply))
                try:
                    return cloud, await link.relay(shipping)
                except SegueError as error:
                    _consider(error, cause)
                    if isinstance(error, Unreachable):
                        cloud.failed(error)
                    log.info(
                        "takeover_failed", turn=asked.turn, cloud=cloud.target, error=str(error)
                    )
                    if link.progressed:
                        deadline = time.monotonic() + UPLINK_RETRY_S
                        pause_s = RETRY_PAUSE_S
                finally:
                    shipping.cancel()
                    await asyncio.gather(shipping, return_exceptions=True)
        if time.monotonic() + pause_s > deadline:
            return None
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_PAUSE_MAX_S)


def _consider(error: SegueError, cause: SegueError) -> None:
    """Go on trying, or give up: what a cloud says of the turn itself will not change."""
    if isinstance(error, NotFound) or (not error.retryable and type(error) is type(cause)):
        raise error


def _resumed(deps: EdgeDeps, cloud: Cloud, spec: dpb.TurnSpec, reply: Reply) -> dpb.TurnSpec:
    again = dpb.TurnSpec()
    again.CopyFrom(spec)
    again.takeover = True
    blocks = list(spec.blocks)
    ships = bool(blocks) and deps.may_ship(cloud.recipes) and _cached(deps, blocks)
    again.shape = (Shape.SHIP if ships else Shape.TEXT).value
    again.ship_blocks = len(blocks) if ships else 0
    del again.known_tokens[:]
    again.known_tokens.extend(reply.tokens)
    return again


def _cached(deps: EdgeDeps, blocks: list[bytes]) -> bool:
    return deps.cache.lookup(blocks) == len(blocks)


async def _ship_again(deps: EdgeDeps, spec: dpb.TurnSpec, link: TurnLink, reply: Reply) -> None:
    """Send what the cloud lacks, and hand over when it is ready (or at once, if that fails)."""
    if spec.shape != Shape.SHIP.value:
        return
    opened = await asyncio.shield(link.opened)
    blocks = list(spec.blocks)
    sender = KvSender(deps.recipe, blocks, deps.encoder, deps.encode)
    for index, block in enumerate(blocks):
        kept = deps.cache.get(block)
        if kept is None:  # evicted since: the cloud computes the rest
            break
        sender.offer(index, *kept)
    else:
        await sender.run(link.stream, opened.have_blocks)
        await link.silence.wait()
    await link.wait_durable(opened.next_index)  # the log's own tokens may differ from the previews
    if not link.stopped:
        made = dpb.HandOver(next_index=reply.next_index)
        link.stream.control(dpb.RunRequest(hand_over=made))
