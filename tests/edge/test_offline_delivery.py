"""Offline turns on their way into the log of a real cloud (scripted engine, real store)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segue_contract.errors import Overloaded
from segue_contract.ids import SessionName
from segue_contract.plan import PlanReport, encode_plan
from segue_contract.servers import Valkey
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.deliver import deliver
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.outbox import OfflineTurn, Outbox
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

REQUEST = pb.RunTurnRequest(
    session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=50
)
SHOWN = (200, 201, 202)
MADE = tuple(range(100, 110))  # what the cloud's engine makes


def offline(tokens: tuple[int, ...] = SHOWN, *, begun: bool = False) -> OfflineTurn:
    plan = encode_plan(PlanReport(shape="edge"))
    pieces = tuple("x" for _ in tokens)
    return OfflineTurn(Asked.of(REQUEST), (10, 11, 12), tokens, pieces, "stop", plan, begun)


@pytest.fixture
async def cloud(valkey: Valkey, model_dir: Path) -> AsyncIterator[CloudRpc]:
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine(MADE)) as running:
        await running.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        yield running


@pytest.fixture
async def deps(cloud: CloudRpc) -> AsyncIterator[Any]:
    clouds = CloudSet([cloud.address], Pacer())
    recipe = cloud.manifest.edge_recipe.digest
    yield SimpleNamespace(clouds=clouds, histories=HistoryCache(), recipe=recipe)
    await clouds.close()


async def in_log(cloud: CloudRpc) -> tuple[tuple[int, ...], str]:
    state = await cloud.log.state(SessionName("default", "trip"))
    (turn,) = state.turns
    return tuple(turn.tokens), turn.reason


async def begin(cloud: CloudRpc) -> None:
    await cloud.decode.Begin(dpb.BeginRequest(turn=REQUEST))


@pytest.mark.parametrize("begun", [False, True])
async def test_a_turn_that_the_log_does_not_know_is_appended(
    cloud: CloudRpc, deps: Any, begun: bool
) -> None:
    await deliver(deps, offline(begun=begun))
    assert await in_log(cloud) == (SHOWN, "stop")


@pytest.mark.parametrize("begun", [False, True])
async def test_a_turn_that_began_in_the_log_ends_there_as_it_was_shown(
    cloud: CloudRpc, deps: Any, begun: bool
) -> None:
    await begin(cloud)
    await deliver(deps, offline(begun=begun))
    assert await in_log(cloud) == (SHOWN, "stop")
    assert not cloud.engine.turns


async def test_the_log_keeps_the_end_that_it_has(cloud: CloudRpc, deps: Any) -> None:
    async for _ in cloud.agent.RunTurn(REQUEST):
        pass
    await deliver(deps, offline(begun=True))
    assert (await in_log(cloud))[0] == MADE


async def test_a_cloud_that_finishes_the_turn_is_left_to_it(cloud: CloudRpc, deps: Any) -> None:
    cloud.engine._free = False
    running = cloud.agent.RunTurn(REQUEST)
    await running.read()
    delivering = asyncio.create_task(deliver(deps, offline(begun=True)))
    cloud.engine.allow(len(MADE))
    await asyncio.wait_for(delivering, 10)
    assert (await in_log(cloud))[0] == MADE
    running.cancel()


async def test_a_fault_in_a_delivery_keeps_the_turn() -> None:
    outbox, faults = Outbox(), iter([ValueError("a fault of ours"), Overloaded("Full."), None])

    async def fail(_: OfflineTurn) -> None:
        error = next(faults)
        if error is not None:
            raise error

    outbox.add(offline())
    assert not await outbox.flush(fail)
    assert not await outbox.flush(fail)
    assert len(outbox) == 1
    assert await outbox.flush(fail)
    assert len(outbox) == 0


async def test_what_could_not_be_delivered_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segue_edge.turns.outbox.PROBE_INTERVAL_S", 0.01)
    outbox, done, tries = Outbox(), asyncio.Event(), []

    async def second_time(turn: OfflineTurn) -> None:
        tries.append(turn)
        if len(tries) == 1:
            raise ValueError("a fault of ours")
        done.set()

    async def never() -> None:
        await asyncio.Event().wait()

    outbox.add(offline())
    outbox.start(never, second_time)
    await asyncio.wait_for(done.wait(), 10)
    await outbox.close()
    assert len(tries) == 2
