"""An append that an edge repeats at its next cloud."""

from __future__ import annotations

import grpc
import pytest

from segue_contract.errors import OutcomeUnknown, SegueError, StaleEpoch, Unreachable
from segue_contract.identity.principal import local
from segue_contract.ids import SessionName
from segue_contract.sync.ops import Set, encode_op
from segue_contract.transport.gate import acting_as
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.api.agent import AgentService
from segue_edge.turns.history import HistoryCache
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.fake_agent import FakeAgent, FakeLog


async def _append(service: AgentService) -> SegueError | None:
    op = encode_op(Set(id="a", device="phone", name="a", value=b""))
    request = pb.AppendRequest(
        session="trip", device="phone", producer="p", epoch=1, first_seq=1, ops=[op]
    )
    try:
        with acting_as(local("default")):
            await service.Append(request, None)
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    except SegueError as error:
        return error
    return None


@pytest.mark.parametrize("repeated", [False, True])
async def test_a_writer_that_was_forgotten_between_two_attempts(repeated: bool) -> None:
    log = FakeLog("trip")
    async with FakeAgent(log, role="cloud") as first, FakeAgent(log, role="cloud") as second:
        agents = {one.address: one for one in (first, second)}
        clouds = CloudSet(list(agents), Pacer())
        service = AgentService(
            None, clouds, HistoryCache(), None, instance="edge", model="m", context=1
        )  # type: ignore[arg-type]
        one, other = (
            agents[cloud.target] for cloud in clouds.ranked(SessionName("default", "trip"))
        )
        stale = StaleEpoch("No such epoch.", current=0)
        if repeated:
            one.fail_once["Append"] = Unreachable("It took the op, and died.")
            other.fail_once["Append"] = stale
        else:
            one.fail_once["Append"] = stale
        error = await _append(service)
        assert type(error) is (OutcomeUnknown if repeated else StaleEpoch)
        assert await _append(service) is None
        service.close()
        await clouds.close()
