"""From a device over TLS with a token, through an edge with a certificate, to a cloud: the whole
way, with real certificates, real tokens, and keys from a file. Real log, the tiny model."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import segue
from segue_contract.errors import InvalidArgument, PermissionDenied, Unauthenticated, Unreachable
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.transport.gate import Gate
from segue_contract.transport.tenant_keys import TenantKeys
from segue_edge.config import read_config
from segue_edge.node import EdgeNode
from tests.support.certificates import Authority
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.edge_node import edge_node
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

NAME = "edge/here/one"
ACME = IssuerKey.new("acme", os.urandom)


@dataclass
class Place:
    cloud: CloudRpc
    edge: EdgeNode
    authority: Authority

    def client(self, device: str = "phone", **more: object) -> segue.Client:
        made = {"rights": ["read", "send"], "sessions": ["ann.*"], "device": device, **more}
        token = segue.tokens.issue(api_key=ACME.text(), **made)  # type: ignore[arg-type]
        return segue.Client(
            self.edge.server.address, device="phone", token=token, tls_ca=self.authority.file
        )


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    authority = Authority(tmp_path)
    keys = tmp_path / "tenants.json"
    keys.write_text(KeySet([ACME.public(time.time())]).text())
    mine = authority.issue("edge", name=NAME)
    async with (
        cloud_rpc(
            valkey.url,
            tmp_path,
            ScriptedEngine([*b"The cloud's words."]),
            manifest=MANIFEST,
            tokenizer=tiny_tokenizer(),
            gate=Gate("default", TenantKeys(keys)),
            tls=authority.issue("cloud", name="cloud/one"),
            clients="required",
        ) as cloud,
        edge_node(
            cloud.address,
            tls_cert=mine.certificate,
            tls_key=mine.key,
            tls_ca=mine.ca,
            tenant_keys=keys,
        ) as edge,
    ):
        yield Place(cloud, edge, authority)


@pytest.mark.parametrize("plan", ["text", "ship", "edge"])
async def test_a_turn_goes_all_the_way_in_the_tokens_tenant(here: Place, plan: str) -> None:
    async with here.client() as client:
        session = await client.session("ann.trip")
        async with session.run("Hello", turn="t1", max_tokens=8, plan=plan) as turn:
            async for _ in turn:
                pass
        assert turn.ended is not None
        assert not turn.ended.pending
        state = await here.cloud.log.state(SessionName("acme", "ann.trip"))
        (logged,) = state.turns
        assert (logged.device, logged.edge, logged.prompt) == ("phone", NAME, "Hello")
        assert "".join(logged.pieces) == turn.text


async def test_an_edge_that_knows_its_callers_uses_no_cloud_that_serves_everybody(
    valkey: Valkey, tmp_path: Path
) -> None:
    """All tenants would be one there."""
    keys = tmp_path / "tenants.json"
    keys.write_text(KeySet([ACME.public(time.time())]).text())
    engine = ScriptedEngine([*b"words"])
    async with (
        cloud_rpc(
            valkey.url, tmp_path, engine, manifest=MANIFEST, tokenizer=tiny_tokenizer()
        ) as cloud,
        edge_node(cloud.address, tenant_keys=keys) as edge,
        segue.Client(
            edge.server.address,
            device="phone",
            token=segue.tokens.issue(
                device="phone", sessions=["*"], rights=["read", "send"], api_key=ACME.text()
            ),
        ) as client,
    ):
        assert not edge.clouds.any_healthy
        with pytest.raises(Unreachable):
            await client.session("trip")
        assert await cloud.log.keeping.list_sessions("default", 10) == ([], "")


def test_an_edge_sends_tokens_off_this_machine_over_tls_alone(tmp_path: Path) -> None:
    keys = tmp_path / "tenants.json"
    with pytest.raises(InvalidArgument, match="clear text") as caught:
        read_config(tenant_keys=keys, cloud=("10.0.0.5:7412",))
    assert "--tls-ca" in caught.value.hint
    assert read_config(tenant_keys=keys, cloud=("127.0.0.1:7412",)).tenant_keys == keys


async def test_who_is_refused_and_how(here: Place) -> None:
    async with here.client() as client:
        with pytest.raises(PermissionDenied):
            await client.session("ben.trip")
        await client.session("ann.trip")
        with pytest.raises(PermissionDenied):
            await client.delete_session("ann.trip")
    async with here.client("laptop") as client:  # it calls itself phone
        with pytest.raises(PermissionDenied):
            await client.session("ann.trip")
    other = segue.tokens.issue(
        device="phone",
        sessions=["*"],
        rights=["read"],
        api_key=IssuerKey.new("acme", os.urandom).text(),
    )
    async with segue.Client(
        here.edge.server.address, device="phone", token=other, tls_ca=here.authority.file
    ) as client:
        with pytest.raises(Unauthenticated):
            await client.session("ann.trip")
    with pytest.raises(Unreachable):  # without TLS
        async with segue.Client(here.edge.server.address, device="phone") as client:
            pass
