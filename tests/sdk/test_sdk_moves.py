"""What goes on at a node that is not preferred any more; what a client leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import segue
from segue import errors
from segue._mqtt import Broker
from segue.testing import FakeNode, Wait
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import FakeAgent, FakeLog, Step, ended, frame, started
from tests.support.fake_agent import Wait as Held


async def test_a_turn_goes_on_where_it_runs_and_its_token_is_renewed_there() -> None:
    go_on = asyncio.Event()

    def script(request: pb.RunTurnRequest) -> Sequence[Step]:
        return [started(request.turn), frame(0, "one"), Held(go_on), frame(1, "two"), ended(2)]

    log = FakeLog("trip")
    async with (
        asyncio.timeout(60),
        FakeAgent(log, script) as one,
        FakeAgent(log) as other,
        segue.Client(one.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("go") as turn:
            await client._nodes.prefer([other.address])
            await client._nodes.forget_spares()
            await client._nodes.connect()
            asked = one.calls, other.calls
            await client._nodes.everywhere("ListSessions", pb.ListSessionsRequest())
            assert (one.calls, other.calls) == (asked[0] + 1, asked[1] + 1)
            go_on.set()
            assert (await turn.result()).text == "one two "
        assert len(one.runs) == 1
        await client._nodes.forget_spares()
        assert not client._nodes._spare


async def test_a_client_that_is_cancelled_as_it_begins_leaves_nothing() -> None:
    looking = asyncio.Event()

    class Slow(FakeAgent):
        async def Nodes(self, request: pb.NodesRequest, _: Any) -> pb.NodesReply:
            looking.set()
            await asyncio.Event().wait()
            raise AssertionError

    async with asyncio.timeout(60), Slow(FakeLog("trip")) as agent:
        client = segue.Client(
            agent.address, device="phone", token=lambda: "a.eyJleHAiOjF9.b", find_edges=True
        )
        entering = asyncio.create_task(client.__aenter__())
        await looking.wait()
        entering.cancel()
        await asyncio.wait([entering])
        assert client._nodes.closed
        assert "token" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_a_copy_of_a_client_that_was_not_entered_says_so() -> None:
    with pytest.raises(errors.InvalidArgument, match="copy"):
        async with segue.Client("127.0.0.1:1", device="phone").with_options(timeout=2.0):
            pass


async def test_an_append_without_an_answer_is_not_repeated_blindly() -> None:
    held = asyncio.Event()

    class Mute(FakeAgent):
        async def Append(self, request: pb.AppendRequest, _: Any) -> pb.AppendReply:
            await super().Append(request, _)
            held.set()
            await asyncio.Event().wait()
            raise AssertionError

    async with (
        asyncio.timeout(60),
        Mute(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        with pytest.raises(errors.OutcomeUnknown) as caught:
            await session.with_options(timeout=0.5).set("a", "1")
        assert not caught.value.retryable
        assert len(agent.log.ops) == 1
        held.clear()
        setting = asyncio.create_task(session.with_options(max_retries=0).set("a", "2"))
        await held.wait()
        await agent.kill()
        with pytest.raises(errors.OutcomeUnknown, match="Read the log"):
            await setting
        with pytest.raises(errors.Unreachable):  # it never left
            await session.with_options(max_retries=0).set("a", "3")


class Quiet:
    def on_message(self, topic: str, payload: bytes) -> None: ...

    def on_link(self, up: bool) -> None: ...


async def test_a_session_that_is_followed_again_at_once_has_one_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live, most, begun = 0, 0, asyncio.Queue[None]()

    async def connect(broker: Broker, _: object, *stopping: asyncio.Event) -> None:
        nonlocal live, most
        live += 1
        most = max(most, live)
        begun.put_nowait(None)
        await (stopping or (broker._stopping,))[0].wait()
        for _ in range(5):
            await asyncio.sleep(0)
        live -= 1

    async def admit(user: str) -> pb.OpenSessionReply:
        raise AssertionError

    monkeypatch.setattr(Broker, "_connect", connect)
    broker, one, other = Broker("mqtt://127.0.0.1:1", admit=admit), Quiet(), Quiet()
    monkeypatch.setattr(broker, "_logged_in", lambda: asyncio.sleep(0, object()))
    async with asyncio.timeout(30):
        await broker.add(["t"], one)
        await begun.get()
        leaving = asyncio.create_task(broker.remove(["t"], one))
        await asyncio.sleep(0)
        await broker.add(["t"], other)
        await begun.get()
        await leaving
        assert (live, most) == (1, 1)
        await broker.close()
        assert live == 0


async def test_a_turn_whose_device_left_while_it_waited_begins_all_the_same() -> None:
    gate = asyncio.Event()
    async with (
        asyncio.timeout(30),
        FakeNode([[Wait(gate), "one"], "two", "three"]) as node,
        node.client("phone") as phone,
        node.client("laptop") as laptop,
    ):
        session, theirs = await phone.session("trip"), await laptop.session("trip")

        async def ask(session: segue.Session, prompt: str, turn: str = "") -> str:
            async with session.run(prompt, turn=turn) as asked:
                return (await asked.result()).text

        async with session.run("first"):
            left = asyncio.create_task(ask(session, "second"))
            await node.until(lambda: len(node.state("trip").waiting) == 1)
            left.cancel()
            twice = [asyncio.create_task(ask(theirs, "third", "t3")) for _ in range(2)]
            await node.until(lambda: len(node.state("trip").waiting) == 2)
            gate.set()
            assert await asyncio.gather(*twice) == ["three", "three"]
        assert node.prompts == ["first", "second", "third"]
