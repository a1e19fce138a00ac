"""A turn that another node runs, followed at the cloud."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import pytest

from segue_contract.errors import DeadlineExceeded, Overloaded, Unreachable
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns import follow
from segue_edge.turns.asked import Asked
from segue_edge.turns.feed import TurnFeed
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.fake_agent import Break, FakeAgent, FakeLog, Step, Wait, ended, frame, started

ASKED = pb.RunTurnRequest(
    session="trip", device="phone", turn="t1", prompt="Where?", max_tokens=20, plan="ship"
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(follow, "time", clock)
    monkeypatch.setattr(follow, "_PAUSE_S", 0.0)
    return clock


async def followed(script: Callable[[pb.RunTurnRequest], Sequence[Step]]) -> FakeAgent:
    async with FakeAgent(FakeLog("trip"), script, role="cloud") as agent:
        clouds = CloudSet([agent.address], Pacer())
        try:
            await follow.follow_cloud(clouds, Asked.of(ASKED), TurnFeed())
        finally:
            await clouds.close()
    return agent


async def test_a_forced_plan_stays_with_the_node_that_began_the_turn() -> None:
    agent = await followed(lambda _: [started("t1"), frame(0, "Paris"), ended(1)])
    assert [run.plan for run in agent.runs] == [""]
    assert ASKED.plan == "ship"


async def test_a_long_turn_outlives_a_hiccup(clock: Clock) -> None:
    def script(request: pb.RunTurnRequest) -> Iterator[Step]:
        yield started("t1")
        if not request.from_index:
            clock.now += 60  # longer than any patience, and then there is news
            yield frame(0, "Paris")
            yield Break()
        yield frame(1, "is")
        yield ended(2)

    agent = await followed(script)  # type: ignore[arg-type]
    assert [run.from_index for run in agent.runs] == [0, 1]


@pytest.mark.parametrize("failure", [Break(), Overloaded("Full.")])
async def test_patience_without_news_has_an_end(clock: Clock, failure: Step) -> None:
    def script(request: pb.RunTurnRequest) -> Iterator[Step]:
        clock.now += 4
        yield failure

    with pytest.raises((Unreachable, Overloaded)):
        await followed(script)  # type: ignore[arg-type]
    assert clock.now == 1012.0


async def test_a_cloud_without_room_is_asked_again(clock: Clock) -> None:
    scripts = iter([[Overloaded("Full.")], [started("t1"), ended(0)]])
    agent = await followed(lambda _: next(scripts))
    assert len(agent.runs) == 2


async def test_a_cloud_that_says_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow, "TURN_TIMEOUT_S", 0.2)
    with pytest.raises(DeadlineExceeded):
        await followed(lambda _: [Wait(asyncio.Event())])
