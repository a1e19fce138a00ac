"""A turn that another node runs, followed at the cloud."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from segue_contract.errors import Overloaded, SegueError, UnknownTurn, Unreachable
from segue_contract.ids import SessionName
from segue_contract.limits import TURN_SILENCE_S, EdgeTurnLimits
from segue_contract.plan import Shape
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import Ended, Frame, TurnEvent
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked
from segue_edge.turns.cloud.begin import Begun
from segue_edge.turns.cloud.side import CloudSide
from segue_edge.turns.cloud.spec import TurnFacts
from segue_edge.turns.executor import TurnExecutor
from segue_edge.turns.measure import Measure
from segue_edge.turns.state import signals as s
from segue_edge.turns.state.turn import TurnState
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.fake_agent import Break, FakeAgent, FakeLog, Step, Wait, ended, frame, started

TRIP = SessionName("default", "trip")
ASKED = pb.RunTurnRequest(
    session="trip", device="phone", turn="t1", prompt="Where?", max_tokens=20, plan="ship"
)


async def followed(
    script: Callable[[pb.RunTurnRequest], Any], retry_s: float = 10.0, *, mute_runs: int = 0
) -> tuple[FakeAgent, list[TurnEvent]]:
    """Follow the turn at one cloud that plays `script`. Raises the error that readers get."""
    feed, nothing = TurnFeed(), None
    state = TurnState(
        "t1", 0, 0, Shape.TEXT, EdgeTurnLimits(retry_s=retry_s, pause_s=0.01, pause_max_s=0.02)
    )
    async with FakeAgent(FakeLog("trip"), script, role="cloud") as agent:
        agent.mute_runs = mute_runs
        clouds = CloudSet([agent.address], Pacer())
        tools: Any = nothing
        outbox: Any = nothing
        executor = TurnExecutor(
            state,
            TurnFacts(Asked.of(ASKED, "default"), Begun(clouds.best(TRIP), [], joined=True)),
            tools=tools,
            clouds=clouds,
            outbox=outbox,
            feed=feed,
            measure=Measure(),
        )
        try:
            await executor.run(state.join(time.monotonic()))
        finally:
            await clouds.close()
    return agent, [event async for event in feed.read()]


async def test_a_forced_plan_stays_with_the_node_that_began_the_turn() -> None:
    agent, _ = await followed(lambda _: [started("t1"), frame(0, "Paris"), ended(1)])
    assert [run.plan for run in agent.runs] == [""]
    assert ASKED.plan == "ship"


async def test_after_a_hiccup_it_goes_on_at_the_first_missing_token() -> None:
    def script(request: pb.RunTurnRequest) -> Iterator[Step]:
        yield started("t1")
        if not request.from_index:
            yield frame(0, "Paris")
            yield Break()
        yield frame(1, "is")
        yield ended(2)

    agent, events = await followed(script)
    assert [run.from_index for run in agent.runs] == [0, 1]
    assert [event.text for event in events if isinstance(event, Frame)] == ["Paris ", "is "]


async def test_a_cloud_that_falls_silent_is_left() -> None:
    """Its connection stands, but nothing comes over it, heartbeats included."""
    scripts: Iterator[list[Step]] = iter(
        [
            [started("t1"), frame(0, "Paris"), Wait(asyncio.Event())],
            [frame(1, "is"), ended(2)],
        ]
    )
    async with asyncio.timeout(10 * TURN_SILENCE_S):
        agent, events = await followed(lambda _: next(scripts), mute_runs=1)
    assert [run.from_index for run in agent.runs] == [0, 1]
    assert [event.text for event in events if isinstance(event, Frame)] == ["Paris ", "is "]


@pytest.mark.parametrize(
    "steps", [[Break()], [Overloaded("Full.")], [started("t1")], [started("t1"), ended(2)]]
)
async def test_patience_without_news_has_an_end(steps: Sequence[Step]) -> None:
    with pytest.raises((Unreachable, Overloaded)):
        await followed(lambda _: steps, retry_s=0.2)


async def test_a_cloud_without_room_is_asked_again() -> None:
    scripts: Iterator[list[Step]] = iter([[Overloaded("Full.")], [started("t1"), ended(0)]])
    agent, _ = await followed(lambda _: next(scripts))
    assert len(agent.runs) == 2


async def test_an_end_that_the_log_has_not_is_no_end() -> None:
    scripts: Iterator[list[Step]] = iter(
        [
            [started("t1"), frame(0, "Paris"), ended(1, reason="error", durable=False)],
            [started("t1"), frame(1, "is nice"), ended(3)],
        ]
    )
    _, events = await followed(lambda _: next(scripts))
    (end,) = [event for event in events if isinstance(event, Ended)]
    assert (end.reason, end.next_index, end.durable) == ("stop", 3, True)


async def test_what_a_cloud_says_for_good_is_told() -> None:
    refusal: SegueError = UnknownTurn("There is no such turn.")
    with pytest.raises(UnknownTurn):
        await followed(lambda _: [refusal])


def test_a_follower_whose_cloud_broke_reads_the_log_at_the_next_one() -> None:
    """The session's first cloud may be the one that lost the turn, and serve no reader of it."""
    first, other = SimpleNamespace(healthy=True), SimpleNamespace(healthy=True)
    facts: Any = SimpleNamespace(
        begun=SimpleNamespace(cloud=first), asked=SimpleNamespace(session="s")
    )
    clouds: Any = SimpleNamespace(ranked=lambda session: [first, other])
    side = CloudSide(facts, cast(Any, None), clouds, cast(Any, None), lambda signal: None)
    assert side._cloud_for(s.Follow(1, 0)) is first
    assert side._cloud_for(s.Follow(2, 0)) is other
    side.cloud = cast(Any, other)
    assert side._cloud_for(s.Follow(3, 0)) is first
