"""A device that was revoked elsewhere gets nothing from an edge's memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from segue_contract.errors import Revoked
from segue_contract.identity.principal import Right
from segue_contract.ids import SessionName
from segue_contract.limits import WATERMARKS_TOLD
from segue_contract.servers import Valkey
from segue_contract.transport.gate import Gate
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.node import EdgeNode
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.edge_node import Device, device_of, edge_node
from tests.support.principals import EDGE, KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

WAIT_S = 20.0
TRIP = SessionName("acme", "trip")


@dataclass
class Place:
    gate: Gate
    cloud: CloudRpc
    edge: EdgeNode
    device: Device


@asynccontextmanager
async def serving(url: str, directory: Path, tokens: KnownTokens) -> AsyncIterator[Place]:
    gate = Gate("default", tokens, peer_name=lambda _: EDGE)
    engine = ScriptedEngine([*b"words"])
    async with (
        cloud_rpc(
            url, directory, engine, manifest=MANIFEST, tokenizer=tiny_tokenizer(), gate=gate
        ) as cloud,
        edge_node(cloud.address, tokens=tokens) as edge,
        device_of(edge, token=tokens.device("acme", "phone", issued_s=1.0)) as device,
    ):
        yield Place(gate, cloud, edge, device)


async def test_an_edge_hears_from_its_cloud_of_a_revocation_and_repeats_no_ended_turn(
    valkey: Valkey, tmp_path: Path
) -> None:
    async with serving(valkey.url, tmp_path, KnownTokens()) as here:
        await here.device.open()
        text = (await here.device.run()).text
        assert (await here.device.run()).text == text  # of its memory: no cloud is asked
        await here.cloud.log.revoke(TRIP, "phone")  # at another instance

        async def until_refused() -> None:
            while True:
                await here.device.run()

        with pytest.raises(Revoked):
            await asyncio.wait_for(until_refused(), WAIT_S)
        stop = pb.StopTurnRequest(session="trip", device="phone", turn="t1")
        with pytest.raises(Revoked):
            await here.device.call("StopTurn", stop)


async def test_a_probe_brings_what_is_new_in_parts_and_all_of_it_of_another_life(
    valkey: Valkey, tmp_path: Path
) -> None:
    async with serving(valkey.url, tmp_path, KnownTokens()) as here:
        for number in range(WATERMARKS_TOLD + 1):
            here.gate.revoke("acme", f"s{number}", "laptop", time.time())
        first = await here.cloud.decode.Probe(dpb.ProbeRequest(revoked_after=5))
        assert [one.sessions for one in first.revoked[:2]] == ["s0", "s1"]
        assert len(first.revoked) == WATERMARKS_TOLD
        at = first.revoked[-1].place
        again = dpb.ProbeRequest(revoked_of=first.revoked_of, revoked_after=at)
        rest = await here.cloud.decode.Probe(again)
        assert [one.sessions for one in rest.revoked] == [f"s{WATERMARKS_TOLD}"]
        laptop = pb.OpenSessionRequest(session=f"s{WATERMARKS_TOLD}", device="laptop")
        token = here.edge._tokens.device("acme", "laptop", issued_s=1.0)  # type: ignore[union-attr]
        async with device_of(here.edge, "laptop", token) as other, asyncio.timeout(WAIT_S):
            while len(here.edge._gate.watermarks) <= WATERMARKS_TOLD:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            with pytest.raises(Revoked):
                await other.call("OpenSession", laptop)


async def test_a_turn_that_runs_goes_on_under_the_token_that_its_device_renewed(
    valkey: Valkey, tmp_path: Path
) -> None:
    tokens = KnownTokens()
    now_s = time.time()

    def token(device: str, left_s: float, **more: Any) -> str:
        return tokens.device("acme", device, expires_s=now_s + left_s, **more)

    async with serving(valkey.url, tmp_path, tokens) as here:
        here.cloud.engine.hold()
        old = token("phone", 100)
        async with device_of(here.edge, token=old) as phone:
            await phone.open()
            stream = phone.stream(plan="text")
            async with asyncio.timeout(WAIT_S):
                while not here.cloud.engine.turns:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            run = here.edge.registry.running(TRIP, "t1")
            assert run is not None
            assert run.asked.token == old
            others = (
                token("laptop", 500),
                token("phone", 50),
                token("phone", 500, sessions=("other",)),
                token("phone", 500, rights=frozenset({Right.READ})),
            )
            for other in others:
                async with device_of(here.edge, token=other) as device:
                    await device.call("Renew", pb.RenewRequest())
                assert run.asked.token == old
            new = token("phone", 400)
            async with device_of(here.edge, token=new) as device:
                await device.call("Renew", pb.RenewRequest())
                assert run.asked.token == new
                newer = token("phone", 500)
            async with device_of(here.edge, token=newer) as device:
                again = device.stream(plan="text")  # who joins the turn shows a token as well
                await again.read()
                assert run.asked.token == newer
                again.cancel()
            here.cloud.engine.allow(100)
            assert [event.WhichOneof("kind") async for event in stream][-1] == "ended"
