"""A turn that the cloud knows already: follow it there, whoever runs it."""

from __future__ import annotations

import asyncio
import time

import grpc

from segue_contract.errors import Overloaded, SegueError, Unreachable
from segue_contract.limits import TURN_TIMEOUT_S, UPLINK_RETRY_S
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked
from segue_edge.turns.feed import TurnFeed
from segue_edge.uplink.clouds import Cloud, CloudSet

_PAUSE_S = 0.2


class _Follower:
    """Passes events on; after a break it goes on at the first token that is missing.

    Attributes:
        deadline: when to give up, unless news comes before.
    """

    def __init__(self, asked: Asked, feed: TurnFeed) -> None:
        self.deadline = time.monotonic() + UPLINK_RETRY_S
        self._asked = asked
        self._feed = feed
        self._next = 0
        self._started = False
        self.ended = False

    async def follow(self, cloud: Cloud) -> None:
        request = pb.RunTurnRequest()
        request.CopyFrom(self._asked.request)
        request.from_index = self._next
        request.plan = ""  # the turn was planned where it began; a cloud could not force a plan
        try:
            async for event in cloud.agent.RunTurn(request, timeout=TURN_TIMEOUT_S):
                self._take(event)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    def _take(self, event: pb.TurnEvent) -> None:
        kind = event.WhichOneof("kind")
        if kind == "started":
            if self._started:
                return
            self._started = True
        elif kind == "frame":
            self._next = max(self._next, event.frame.index + len(event.frame.tokens))
        elif kind == "rewound":
            self._next = event.rewound.index
        self.deadline = time.monotonic() + UPLINK_RETRY_S
        self._feed.publish(event)
        self.ended = self.ended or kind == "ended"


async def follow_cloud(clouds: CloudSet, asked: Asked, feed: TurnFeed) -> None:
    """Pass the turn's events on until its end.

    Raises:
        SegueError: no cloud said anything new of it for `UPLINK_RETRY_S`, or one refused it.
    """
    follower = _Follower(asked, feed)
    while not follower.ended:
        cloud = clouds.best(asked.session)
        try:
            await follower.follow(cloud)
        except (Unreachable, Overloaded) as error:
            if isinstance(error, Unreachable):
                cloud.failed(error)
            await _pause(follower, error)
        else:
            if not follower.ended:
                await _pause(follower, Unreachable("The cloud ended the stream early."))


async def _pause(follower: _Follower, error: SegueError) -> None:
    """Before another attempt. Raises `error` where there were too many."""
    if time.monotonic() > follower.deadline:
        raise error
    await asyncio.sleep(_PAUSE_S)
