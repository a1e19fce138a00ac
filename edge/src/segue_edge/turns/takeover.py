"""A broken turn stream: the same turn at the next cloud, from the first token it lacks."""

from __future__ import annotations

import asyncio
import time

import structlog

from segue_contract.errors import NotFound, SegueError, Unreachable
from segue_contract.limits import UPLINK_RETRY_S
from segue_contract.plan import Shape
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.link import ShowAll, TurnLink
from segue_edge.turns.measure import Measure
from segue_edge.turns.reply import Reply
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.turn")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


async def take_over(
    deps: EdgeDeps,
    asked: Asked,
    spec: dpb.TurnSpec,
    reply: Reply,
    show: ShowAll,
    cause: SegueError,
) -> tuple[Cloud, pb.TurnEnded] | None:
    """The turn's end at some cloud, or None where none was reachable for `UPLINK_RETRY_S`.

    The edge makes no more tokens: the cloud adopts those the edge knows and decodes the rest.

    Raises:
        SegueError: a cloud was reached and refuses the turn for good.
    """
    deadline = time.monotonic() + UPLINK_RETRY_S
    pause_s = _FIRST_PAUSE_S
    while True:
        for cloud in deps.clouds.ranked(asked.session):
            again = _resumed(spec, reply)
            async with TurnStream(cloud, again, deps.clouds.pacer) as stream:
                link = TurnLink(cloud, stream, reply, show, Measure())
                try:
                    return cloud, await link.relay()
                except SegueError as error:
                    _consider(error, cause)
                    if isinstance(error, Unreachable):
                        cloud.failed(error)
                    log.info(
                        "takeover_failed", turn=asked.turn, cloud=cloud.target, error=str(error)
                    )
                    if link.progressed:
                        deadline = time.monotonic() + UPLINK_RETRY_S
                        pause_s = _FIRST_PAUSE_S
        if time.monotonic() + pause_s > deadline:
            return None
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _consider(error: SegueError, cause: SegueError) -> None:
    """Go on trying, or give up: what a cloud says of the turn itself will not change."""
    if isinstance(error, NotFound) or (not error.retryable and type(error) is type(cause)):
        raise error


def _resumed(spec: dpb.TurnSpec, reply: Reply) -> dpb.TurnSpec:
    again = dpb.TurnSpec()
    again.CopyFrom(spec)
    again.takeover = True
    again.shape = Shape.TEXT.value
    again.ship_blocks = 0
    del again.known_tokens[:]
    again.known_tokens.extend(reply.tokens)
    return again
