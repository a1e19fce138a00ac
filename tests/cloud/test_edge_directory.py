"""The edges that a cloud tells devices of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import segue
from segue_cloud.rpc.directory import EdgeDirectory
from segue_contract.errors import InvalidArgument
from segue_contract.limits import EDGE_UNHEARD_S, MAX_URL_CHARS
from segue_contract.servers import Valkey
from segue_contract.transport.server import start_server
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.api.agent import AgentService
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.offline.outbox import OfflineTurn, Outbox
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer


@pytest.fixture
async def cloud(valkey: Valkey, tmp_path: Path) -> AsyncIterator[CloudRpc]:
    async with (
        asyncio.timeout(60),
        cloud_rpc(
            valkey.url, tmp_path, ScriptedEngine([]), manifest=MANIFEST, tokenizer=tiny_tokenizer()
        ) as running,
    ):
        yield running


async def _told(cloud: CloudRpc) -> list[str]:
    reply: pb.NodesReply = await cloud.agent.Nodes(pb.NodesRequest(), timeout=20)
    return [one.url for one in reply.edges]


async def test_a_device_is_told_of_the_edges_that_want_it(cloud: CloudRpc) -> None:
    assert await _told(cloud) == []
    edges = [
        CloudSet([cloud.address], Pacer(None), public_url=url)
        for url in ("b.example:7411", "a.example:7411", "")
    ]
    for one in edges:
        one.start()
        await one.probed()
    assert await _told(cloud) == ["a.example:7411", "b.example:7411"]
    for one in edges:
        await one.close()


@pytest.mark.parametrize("url", ["nonsense", "host:", "host:99999", "h" * MAX_URL_CHARS + ":1"])
async def test_what_is_no_address_is_refused(cloud: CloudRpc, url: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cloud.decode.Probe(dpb.ProbeRequest(public_url=url), timeout=20)
    assert isinstance(error_from_rpc(caught.value), InvalidArgument)
    assert await _told(cloud) == []


async def test_an_edge_hands_on_what_its_cloud_tells(cloud: CloudRpc) -> None:
    clouds = CloudSet([cloud.address], Pacer(None), public_url="edge.example:7411")
    clouds.start()
    await clouds.probed()
    service = AgentService(
        None,  # type: ignore[arg-type]
        clouds, HistoryCache(), Outbox(_deliver), instance="edge", model="m", context=1,
    )  # fmt: skip
    edge = await start_server(
        "127.0.0.1",
        0,
        [("segue.v1.Agent", lambda s: agent_pb2_grpc.add_AgentServicer_to_server(service, s))],
    )
    try:
        async with segue.Client(edge.address, device="phone", find_edges=True) as client:
            known = await client._nodes.unary("Nodes", pb.NodesRequest())
            assert [one.url for one in known.edges] == ["edge.example:7411"]
            assert (await client.session("trip")).created
    finally:
        service.close()
        await edge.stop(0)
        await clouds.close()


async def _deliver(turn: OfflineTurn) -> None:
    raise AssertionError("nothing was said offline")


def test_a_certificate_stands_for_one_address() -> None:
    known = EdgeDirectory()
    known.heard("old.example:1", "edge/here/one", 0.0)
    known.heard("new.example:1", "edge/here/one", 1.0)
    known.heard("other.example:1", "edge/here/other", 1.0)
    assert [one.url for one in known.edges(1.0)] == ["new.example:1", "other.example:1"]
    known.heard("", "edge/here/one", 2.0)
    assert [one.url for one in known.edges(2.0)] == ["other.example:1"]
    assert known.edges(1.0 + EDGE_UNHEARD_S) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "u:1", "v:1", "w:1"]), st.sampled_from(["", "n", "m"]))
    ),
    st.integers(1, 3),
)
def test_it_has_a_bound_and_the_latest(said: list[tuple[str, str]], most: int) -> None:
    known = EdgeDirectory(most)
    for at, (url, name) in enumerate(said):
        known.heard(url, name, at / 1000)
    edges = known.edges(len(said) / 1000)
    assert len(edges) <= most
    if said and said[-1][0]:
        assert said[-1] in [(one.url, one.name) for one in edges]
