"""Who would go on with a turn if its cloud stopped or fell silent gets ready beforehand."""

from __future__ import annotations

import grpc

from segue_contract.errors import SegueError, Unreachable
from segue_contract.limits import TAKEOVER_PREPARE_S
from segue_contract.transport.bearer import bearer
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked
from segue_edge.uplink.clouds import Cloud, CloudSet

_TRIES = 2  # who has no room says so at once


async def prepare(clouds: CloudSet, serving: Cloud | None, asked: Asked, *, leaving: bool) -> Cloud:
    """Let another cloud compute the KV of a turn that `serving` decodes; returns that cloud.

    Raises:
        Unreachable: there is none, or none can.
    """
    request = pb.PrepareRequest(
        session=asked.session.session,
        device=asked.request.device,
        turn=asked.turn,
        leaving=leaving,
    )
    others = [one for one in clouds.ranked(asked.session) if one is not serving and one.healthy]
    error: SegueError = Unreachable("No other cloud can go on with the turn.")
    for cloud in others[:_TRIES]:
        try:
            reply: pb.PrepareReply = await cloud.agent.Prepare(
                request, timeout=TAKEOVER_PREPARE_S, metadata=bearer(asked.token)
            )
        except grpc.aio.AioRpcError as failed:
            error = error_from_rpc(failed)
            if isinstance(error, Unreachable):
                cloud.failed(error)
            else:
                cloud.refused(error)
        else:
            if reply.ready:
                return cloud
    raise error
