"""Offline turns on their way into the log of a real cloud (scripted engine, real store)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from segue_contract.errors import Overloaded
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync.branches import Branch, branches
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.offline.deliver import Delivery
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.offline_turns import REQUEST, SHOWN, TRIP, keep, offline, said
from tests.support.scripted_cloud import ScriptedCloud, scripted_cloud
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, RECIPE

MADE = tuple(range(100, 110))  # what the cloud's engine makes


@pytest.fixture
async def cloud(valkey: Valkey, model_dir: Path) -> AsyncIterator[CloudRpc]:
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine(MADE)) as running:
        await running.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        yield running


@dataclass
class Delivering:
    """A delivery, and what it told of each turn."""

    delivery: Delivery
    histories: HistoryCache
    told: list[tuple[str, bool]] = field(default_factory=list)

    async def __call__(self, turn: OfflineTurn) -> None:
        await self.delivery.deliver(turn)


@pytest.fixture
async def deliver(cloud: CloudRpc) -> AsyncIterator[Delivering]:
    clouds, histories = CloudSet([cloud.address], Pacer()), HistoryCache()
    recipe = cloud.manifest.edge_recipe.digest

    def told(turn: OfflineTurn, same: bool) -> None:
        delivering.told.append((turn.asked.turn, same))

    delivering = Delivering(Delivery(clouds, histories, recipe, told), histories)
    yield delivering
    await clouds.close()


async def in_log(cloud: CloudRpc, session: str = "trip") -> tuple[tuple[int, ...], str]:
    state = await cloud.log.state(SessionName("default", session))
    (turn,) = state.turns
    return tuple(turn.tokens), turn.reason


async def begin(cloud: CloudRpc) -> None:
    await cloud.decode.Begin(dpb.BeginRequest(turn=REQUEST))


@pytest.mark.parametrize("begun", [False, True])
async def test_a_turn_that_the_log_does_not_know_is_appended(
    cloud: CloudRpc, deliver: Delivering, begun: bool
) -> None:
    await deliver(offline(begun=begun))
    assert await in_log(cloud) == (SHOWN, "stop")


@pytest.mark.parametrize("begun", [False, True])
async def test_a_turn_that_began_in_the_log_ends_there_as_it_was_shown(
    cloud: CloudRpc, deliver: Delivering, begun: bool
) -> None:
    await begin(cloud)
    await deliver(offline(begun=begun))
    assert await in_log(cloud) == (SHOWN, "stop")
    assert not cloud.engine.turns


async def test_the_log_keeps_the_end_that_it_has(cloud: CloudRpc, deliver: Delivering) -> None:
    async for _ in cloud.agent.RunTurn(REQUEST):
        pass
    await deliver(offline(begun=True))
    assert (await in_log(cloud))[0] == MADE


async def test_a_cloud_that_finishes_the_turn_is_left_to_it(
    cloud: CloudRpc, deliver: Delivering
) -> None:
    cloud.engine._free = False
    running = cloud.agent.RunTurn(REQUEST)
    await running.read()
    delivering = asyncio.create_task(deliver(offline(begun=True)))
    cloud.engine.allow(len(MADE))
    await asyncio.wait_for(delivering, 10)
    assert (await in_log(cloud))[0] == MADE
    running.cancel()


async def test_a_device_and_a_session_that_the_log_does_not_know_are_opened_there(
    cloud: CloudRpc, deliver: Delivering
) -> None:
    other = pb.RunTurnRequest(
        session="trip", device="laptop", turn="t2", prompt="Me too", max_tokens=50
    )
    lost = pb.RunTurnRequest(
        session="lost", device="laptop", turn="t3", prompt="And here", max_tokens=50
    )
    await deliver(offline(request=other))
    await deliver(offline(request=lost, begun=True))
    assert await in_log(cloud) == (SHOWN, "stop")
    assert await in_log(cloud, "lost") == (SHOWN, "stop")
    assert deliver.told == [("t2", True), ("t3", True)]


async def test_what_was_said_offline_beside_others_is_a_branch_and_the_model_sees_both(
    cloud: CloudRpc, deliver: Delivering
) -> None:
    async def ask(turn: str) -> None:
        asked = pb.RunTurnRequest()
        asked.CopyFrom(REQUEST)
        asked.turn, asked.prompt = turn, f"I am {turn}"
        async for _ in cloud.agent.RunTurn(asked):
            pass

    await ask("t0")
    await deliver(replace(said("t1"), follows="t0"))
    await ask("elsewhere")
    await deliver(replace(said("t2"), follows="t1"))
    await deliver(replace(said("t3"), follows="t2"))
    await ask("t4")
    state = await cloud.log.state(TRIP)
    assert [turn.turn for turn in state.turns] == ["t0", "t1", "elsewhere", "t2", "t3", "t4"]
    assert [turn.offline for turn in state.turns] == [False, True, False, True, True, False]
    assert branches(state.turns) == [Branch("t1", ("elsewhere",), ("t2", "t3"))]
    prompt = cloud.tokenizer.decode(cloud.engine.turns[-1].prompt)
    assert prompt.count("Hello") == 3
    assert "I am elsewhere" in prompt


async def test_a_turn_that_differs_in_the_log_is_told(cloud: CloudRpc, deliver: Delivering) -> None:
    async for _ in cloud.agent.RunTurn(REQUEST):
        pass
    await deliver(offline(begun=True))
    assert deliver.told == [("t1", False)]


async def test_a_cloud_that_cannot_be_understood_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = ScriptedCloud.Begin

    async def garbled(self: ScriptedCloud, request: dpb.BeginRequest, context: Any) -> Any:
        reply = await begin(self, request, context)
        reply.turns = b"\xc1"  # no MessagePack
        return reply

    monkeypatch.setattr(ScriptedCloud, "Begin", garbled)
    async with scripted_cloud() as cloud:
        clouds = CloudSet([cloud.address], Pacer())
        for one in clouds.clouds.values():
            one.expected_weights = MANIFEST.weights_digest
        delivery = Delivery(clouds, HistoryCache(), RECIPE.digest, lambda *_: None)
        outbox = Outbox(delivery.deliver)
        await keep(outbox, said("t1"))
        with pytest.raises(Overloaded):
            await outbox.settle(TRIP)
        await clouds.close()
    assert cloud.seen.begins
    assert (len(outbox), len(outbox.refused)) == (1, 0)
