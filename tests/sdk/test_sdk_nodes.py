"""The nodes of a client: who is asked first, and that refusals are obeyed."""

from __future__ import annotations

import pytest

import segue
from segue import errors
from segue._nodes import Nodes
from segue_contract.limits import ADDRESS_RETRY_S, RPC_TIMEOUT_S
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import FakeAgent, FakeLog, ended, frame, started

OPEN = pb.OpenSessionRequest(session="trip", device="phone")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _order(nodes: Nodes) -> list[str]:
    return [node.address.partition(".")[0] for node in nodes.order()]


async def test_a_node_without_room_comes_later_for_as_long_as_it_said() -> None:
    clock = Clock()
    nodes = Nodes(["a.test:1", "b.test:1", "c.test:1"], clock=clock)
    a, b, c = nodes.order()
    nodes.refused(a, errors.Overloaded("Full.", retry_after_s=3.0))
    assert _order(nodes) == ["b", "c", "a"]
    nodes.refused(b, errors.Overloaded("Full.", retry_after_s=1.0))
    assert nodes.full_s == 0.0
    await nodes.failed(c)
    assert _order(nodes) == ["b", "a", "c"], "one that may be gone comes after those that answer"
    nodes.refused(c, errors.EngineGone("The engine died."))
    assert nodes.full_s == 1.0
    clock.now += 1.5
    assert _order(nodes)[0] == "b"
    clock.now += 2.0
    assert _order(nodes)[:2] == ["a", "b"]
    clock.now += ADDRESS_RETRY_S
    assert _order(nodes) == ["a", "b", "c"]


@pytest.mark.parametrize("hint", [-1.0, float("nan"), float("inf"), 1e9, "soon"])
def test_no_hint_keeps_a_node_out_for_long(hint: object) -> None:
    clock = Clock()
    nodes = Nodes(["a.test:1"], clock=clock)
    nodes.refused(nodes.order()[0], errors.Overloaded("Full.", retry_after_s=hint))
    assert 0 < nodes.full_s <= RPC_TIMEOUT_S


async def test_a_call_goes_to_the_next_node_with_room() -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log) as first,
        FakeAgent(log, role="cloud") as second,
        segue.Client([first.address, second.address], device="phone") as client,
    ):
        first.fail_once["OpenSession"] = errors.Overloaded("Full.", retry_after_s=9.0)
        assert (await client.session("trip")).role == "cloud"
        asked = first.calls
        assert (await client.session("trip")).role == "cloud"
        assert first.calls == asked, "it said when to come back"
        second.fail_once["OpenSession"] = errors.Overloaded("Full.", retry_after_s=9.0)
        assert (await client.session("trip")).role == "edge", "but better than nobody"


async def test_a_refusal_is_repeated_where_there_is_patience_for_its_hint() -> None:
    async with FakeAgent(FakeLog("trip")) as agent:
        nodes = Nodes([agent.address])
        try:
            agent.fail_once["OpenSession"] = errors.Overloaded("Full.", retry_after_s=0.1)
            assert (await nodes.unary("OpenSession", OPEN, patience_s=8.0)).role == "edge"
            assert agent.calls == 2
            agent.fail_once["OpenSession"] = errors.Overloaded("Full.", retry_after_s=9.0)
            with pytest.raises(errors.Overloaded) as caught:
                await nodes.unary("OpenSession", OPEN, patience_s=8.0)
            assert caught.value.fields["retry_after_s"] == 9.0
            assert agent.calls == 3
        finally:
            await nodes.close()


async def test_a_turn_refused_by_one_node_leaves_it_alone_for_the_next_turns() -> None:
    def reply(request: pb.RunTurnRequest) -> list[object]:
        return [started(request.turn), frame(0, "Paris"), ended(1)]

    def full(_: pb.RunTurnRequest) -> list[object]:
        return [errors.Overloaded("Full.", retry_after_s=9.0)]

    log = FakeLog("trip")
    async with (
        FakeAgent(log, full) as first,
        FakeAgent(log, reply) as second,
        segue.Client([first.address, second.address], device="phone") as client,
    ):
        session = await client.session("trip")
        for _ in range(3):
            async with session.run("Where?") as turn:
                assert (await turn.result()).text == "Paris "
        assert (len(first.runs), len(second.runs)) == (1, 3)
