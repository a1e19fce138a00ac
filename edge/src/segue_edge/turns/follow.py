"""A turn that the cloud knows already: follow it there, whoever runs it."""

from __future__ import annotations

import asyncio
import time

import grpc

from segue_contract.errors import SegueError, Unreachable
from segue_contract.limits import UPLINK_RETRY_S
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked
from segue_edge.turns.feed import TurnFeed
from segue_edge.uplink.clouds import Cloud, CloudSet

_PAUSE_S = 0.2


class _Follower:
    """Passes events on; after a break it goes on at the first token that is missing."""

    def __init__(self, asked: Asked, feed: TurnFeed) -> None:
        self._asked = asked
        self._feed = feed
        self._next = 0
        self._started = False
        self.ended = False

    async def follow(self, cloud: Cloud) -> None:
        request = pb.RunTurnRequest()
        request.CopyFrom(self._asked.request)
        request.from_index = self._next
        try:
            async for event in cloud.agent.RunTurn(request):
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
        self._feed.publish(event)
        self.ended = self.ended or kind == "ended"


async def follow_cloud(clouds: CloudSet, asked: Asked, feed: TurnFeed) -> None:
    """Pass the turn's events on until its end.

    Raises:
        SegueError: no cloud served it for `UPLINK_RETRY_S`, or refused it.
    """
    follower = _Follower(asked, feed)
    deadline = time.monotonic() + UPLINK_RETRY_S
    while not follower.ended:
        cloud = clouds.best(asked.session)
        try:
            await follower.follow(cloud)
        except Unreachable as error:
            cloud.failed(error)
            _give_up_after(deadline, error)
            await asyncio.sleep(_PAUSE_S)
        else:
            if not follower.ended:
                _give_up_after(deadline, Unreachable("The cloud ended the stream early."))
                await asyncio.sleep(_PAUSE_S)


def _give_up_after(deadline: float, error: SegueError) -> None:
    if time.monotonic() > deadline:
        raise error
