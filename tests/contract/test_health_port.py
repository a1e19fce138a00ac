"""The port that orchestrators' probes ask, beside a listener that wants tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from segue_contract.errors import Unauthenticated
from segue_contract.limits import HEALTH_MESSAGE_BYTES
from segue_contract.transport.channel import open_channel
from segue_contract.transport.gate import Gate
from segue_contract.transport.server import start_server
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from tests.support.principals import KnownTokens

WAIT_S = 20.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_it_says_whether_the_node_serves_and_nothing_else(host: str) -> None:
    services = [
        (
            "segue.v1.Agent",
            lambda s: agent_pb2_grpc.add_AgentServicer_to_server(agent_pb2_grpc.AgentServicer(), s),
        )
    ]
    gate = Gate("default", KnownTokens(), peer_name=lambda _: "")
    server = await start_server("127.0.0.1", 0, services, gate=gate, health=(host, 0))
    ask = health_pb2.HealthCheckRequest()
    channels = [open_channel(f"127.0.0.1:{port}") for port in (server.port, server.health_port)]
    guarded, open_ = [health_pb2_grpc.HealthStub(one) for one in channels]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await guarded.Check(ask, timeout=WAIT_S)
    assert isinstance(error_from_rpc(refused.value), Unauthenticated)

    assert (await open_.Check(ask, timeout=WAIT_S)).status == SERVING
    named = health_pb2.HealthCheckRequest(service="segue.v1.Agent")
    assert (await open_.Check(named, timeout=WAIT_S)).status == SERVING
    unknown = health_pb2.HealthCheckRequest(service="x")
    assert await code_of(open_.Check(unknown, timeout=WAIT_S)) is grpc.StatusCode.NOT_FOUND
    await server.set_serving(False)
    assert (await open_.Check(ask, timeout=WAIT_S)).status == NOT_SERVING

    large = health_pb2.HealthCheckRequest(service="x" * (HEALTH_MESSAGE_BYTES + 1))
    assert await code_of(open_.Check(large, timeout=WAIT_S)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    agent: Any = agent_pb2_grpc.AgentStub(channels[1])
    sessions = agent.ListSessions(pb.ListSessionsRequest(), timeout=WAIT_S)
    assert await code_of(sessions) is grpc.StatusCode.UNIMPLEMENTED
    watch = open_.Watch(ask, timeout=WAIT_S)
    assert await code_of(watch.read()) is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(0)
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", server.health_port)
    for channel in channels:
        await channel.close()
