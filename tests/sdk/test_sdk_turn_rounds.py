"""How often which node is asked for a turn, and how often a timeout is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

import segue
from segue import errors
from segue.options import Timeout
from segue.testing import FakeNode, Wait
from segue_contract.errors import SegueError
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import Break, FakeAgent, FakeLog, Step


@pytest.mark.parametrize("down_first", [True, False])
@pytest.mark.parametrize("max_retries", [None, 0, 2])
@pytest.mark.parametrize(
    "answer",
    [errors.Overloaded("full", retry_after_s=0.01), errors.EngineGone("it died"), Break()],
    ids=["full", "engine", "lost"],
)
async def test_a_node_beside_one_that_is_down_is_asked_once_a_round(
    answer: SegueError | Break, max_retries: int | None, down_first: bool
) -> None:
    if isinstance(answer, Break) and max_retries is None:
        pytest.skip("repeated for some seconds")

    def script(request: pb.RunTurnRequest) -> Sequence[Step]:
        return [answer] if len(agent.runs) < 50 else [errors.Internal("asked without a pause")]

    log = FakeLog("trip")
    async with (
        asyncio.timeout(60),
        FakeAgent(log, script) as agent,
        FakeAgent(log, script) as other,
    ):
        both = [other.address, agent.address] if down_first else [agent.address, other.address]
        async with segue.Client(both, device="phone", max_retries=max_retries) as client:
            session = await client.session("trip")
            await other.kill()
            told = errors.Unreachable if isinstance(answer, Break) else type(answer)
            with pytest.raises(told):
                async with session.run("go"):
                    pass
            assert len(agent.runs) == 1 + (max_retries or 0)


async def test_a_turn_that_nobody_is_left_for_ends() -> None:
    async def dies() -> None:
        await first.kill()
        gone.set()

    def script(_: pb.RunTurnRequest) -> Sequence[Step]:
        dying.append(asyncio.create_task(dies()))
        return [Break()]

    gone, log = asyncio.Event(), FakeLog("trip")
    dying: list[asyncio.Task[None]] = []
    async with (
        asyncio.timeout(30),
        FakeAgent(log, script) as first,
        FakeAgent(log) as second,
        segue.Client([first.address, second.address], device="phone", max_retries=0) as client,
    ):
        session = await client.session("trip")
        await second.kill()
        with pytest.raises(errors.Unreachable):
            async with session.run("go"):
                pass
        await gone.wait()


@pytest.mark.parametrize("which", ["first_token", "total"])
async def test_a_timeout_of_the_whole_turn_is_told_once(which: str) -> None:
    go_on = asyncio.Event()
    async with (
        asyncio.timeout(30),
        FakeNode([[Wait(go_on), "two"]]) as node,
        node.client("phone") as client,
    ):
        session = await client.session("trip")
        turn = session.run("go", timeout=Timeout(**{which: 30.0}))
        async with turn:
            turn._begun_at -= 31.0
            with pytest.raises(errors.DeadlineExceeded) as caught:
                await turn.result()
            assert caught.value.fields["timeout"] == which
            go_on.set()
            assert (await turn.result()).text == "two"
