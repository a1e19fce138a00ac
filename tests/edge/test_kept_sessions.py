"""Sessions as wholes, asked of an edge: it hands on what its cloud says."""

from __future__ import annotations

from pathlib import Path

import pytest

import segue
from segue.errors import BadExport, SessionDeleted, SessionNotEmpty
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.transport.server import start_server
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from segue_edge.api.agent import AgentService
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.offline.outbox import OfflineTurn, Outbox
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine


async def _deliver(turn: OfflineTurn) -> None:
    raise AssertionError("nothing was said offline")


async def test_an_edge_hands_on_exports_imports_and_deletions(
    valkey: Valkey, model_dir: Path, tmp_path: Path
) -> None:
    histories = HistoryCache()
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine([])) as cloud:
        clouds = CloudSet([cloud.address], Pacer())
        service = AgentService(
            None,  # type: ignore[arg-type]
            clouds,
            histories,
            Outbox(_deliver),
            instance="edge",
            model="m",
            context=1,
        )
        server = await start_server(
            "127.0.0.1",
            0,
            [
                (
                    "segue.v1.Agent",
                    lambda s: agent_pb2_grpc.add_AgentServicer_to_server(service, s),
                )
            ],
        )
        async with segue.Client(server.address, device="phone") as client:
            session = await client.session("trip")
            await session.set("theme", "dark" * 200_000)
            file = tmp_path / "trip.segue"
            await client.export_session("trip", file)
            made = await client.import_session(file, "again")
            assert made.session == "again"
            assert (await (await client.session("again")).state()).values == {
                "theme": b"dark" * 200_000
            }
            with pytest.raises(SessionNotEmpty):
                await client.import_session(file, "again")
            file.write_bytes(file.read_bytes()[:-1])
            with pytest.raises(BadExport):
                await client.import_session(file, "third")
            assert {one.session async for one in client.all_sessions(1)} == {"trip", "again"}
            assert histories.find(SessionName("default", "trip")) is not None
            assert await client.delete_session("trip")
            assert histories.find(SessionName("default", "trip")) is None
            with pytest.raises(SessionDeleted):
                await client.session("trip", must_exist=True)
            tails = await cloud.agent.Tails(pb.TailsRequest(device="phone", sessions=["trip"]))
            through = await client._nodes.unary(
                "Tails", pb.TailsRequest(device="phone", sessions=["trip"])
            )
            assert through.deleted == tails.deleted == ["trip"]
            assert await client.expire_sessions(3600) == []
        service.close()
        await server.stop(0)
        await clouds.close()
