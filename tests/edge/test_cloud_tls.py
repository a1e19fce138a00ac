"""An edge's link to a cloud over TLS: believed clouds only, new certificates without a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from segue_contract.errors import Unreachable
from segue_contract.transport.server import RunningServer, start_server
from segue_contract.transport.tls import TlsFiles, peer_name
from segue_contract.v1 import decode_pb2 as dpb
from segue_contract.v1 import decode_pb2_grpc
from segue_edge.config import read_config
from segue_edge.uplink.clouds import Cloud, CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.certificates import Authority, replace


class Decode(decode_pb2_grpc.DecodeServicer):
    def __init__(self) -> None:
        self.callers: list[str] = []

    async def Probe(self, request: dpb.ProbeRequest, context: Any) -> dpb.ProbeReply:
        self.callers.append(peer_name(context))
        return dpb.ProbeReply(facts=dpb.CloudFacts(instance="cloud-1"))


async def serve(service: Decode, tls: TlsFiles, port: int = 0) -> RunningServer:
    return await start_server(
        "127.0.0.1",
        port,
        [("segue.v1.Decode", lambda s: decode_pb2_grpc.add_DecodeServicer_to_server(service, s))],
        tls=tls,
        clients="required",
    )


async def test_an_edge_takes_new_certificates_when_it_connects_again(tmp_path: Path) -> None:
    authority, service = Authority(tmp_path), Decode()
    server = await serve(service, authority.issue("cloud"))
    port = server.port
    edge = authority.issue("edge", name="edge/berlin/one")
    config = read_config(
        cloud=server.address, tls_cert=edge.certificate, tls_key=edge.key, tls_ca=edge.ca
    )
    clouds = CloudSet(config.cloud, Pacer(None), config.channel_tls)
    cloud = clouds.clouds[server.address]
    try:
        async with asyncio.timeout(60):
            await cloud.probe(clouds.pacer)
            assert service.callers[-1] == "edge/berlin/one"
            await server.stop(0)
            later = Authority(tmp_path, "later")
            server = await serve(service, later.issue("cloud"), port)
            with pytest.raises(Unreachable, match="none of the authorities"):
                await cloud.probe(clouds.pacer)
            cloud.failed(Unreachable("as the prober tells it"))
            new = later.issue("edge", name="edge/berlin/two")
            assert new.ca is not None
            replace(authority.file, new.ca.read_bytes())
            await cloud.reach()
            assert service.callers[-1] == "edge/berlin/two"
    finally:
        await clouds.close()
        await server.stop(0)


async def test_a_cloud_that_is_not_ours_gets_nothing(tmp_path: Path) -> None:
    service = Decode()
    server = await serve(service, Authority(tmp_path, "other").issue("cloud"))
    cloud = Cloud(server.address, Authority(tmp_path).issue("edge", name="edge/berlin/one"))
    try:
        with pytest.raises(Unreachable, match="none of the authorities"):
            await cloud.probe(Pacer(None))
        assert not service.callers
    finally:
        await cloud.close()
        await server.stop(0)
