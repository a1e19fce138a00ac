"""What breaks between edge and cloud, and what the device sees of it: nothing lost or doubled."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from segue_contract.errors import (
    EngineGone,
    ModelMismatch,
    ModelMissing,
    Overloaded,
    Unreachable,
)
from segue_contract.limits import OUTBOX_TURNS, EdgeTurnLimits
from segue_contract.sync.state import TurnState
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.config import EdgeConfig
from segue_edge.node import EdgeNode
from tests.support.edge_node import Device, Told, device_of, edge_node, serving, two_clouds
from tests.support.scripted_cloud import Script, scripted_cloud
from tests.support.tiny_edge import MANIFEST, TinyModel, reply_text


@pytest.mark.parametrize("shape", ["ship", "text"])
async def test_a_broken_stream_is_taken_up_again(shape: str) -> None:
    async with serving() as (cloud, _node, device):
        cloud.script.break_after_frames = 3
        told = await device.run(plan=shape, max_tokens=100)
    first, second = cloud.seen.specs
    assert (first.takeover, second.takeover) == (False, True)
    assert list(second.known_tokens)
    assert told.text == reply_text(first.prompt, 100)
    assert "rewound" not in told.kinds
    assert told.ended.reason == "length"


async def test_previews_that_the_log_never_got_are_rewound() -> None:
    async with serving() as (cloud, _node, device):
        script = cloud.script
        script.deaf = True
        script.ready.clear()
        script.salt = 1  # another decoder, another continuation
        told = Told()
        async for event in device.stream(plan="ship", max_tokens=60):
            told.take(event)
            if event.WhichOneof("kind") == "frame" and len(told.frames) == 4:
                script.ready.set()
                script.cut.set()
    assert told.kinds.count("rewound") == 1
    prompt = cloud.seen.specs[0].prompt
    assert told.frames[0].made_by == "edge"
    assert told.text == reply_text(prompt, 60, salt=1)
    assert told.text != reply_text(prompt, 60)


async def test_the_next_cloud_takes_a_turn_whose_cloud_died() -> None:
    async with two_clouds() as here:
        device, (first, other) = here.device, here.ranked()
        first.script.decode.clear()
        running = asyncio.create_task(device.run(plan="ship", max_tokens=60))
        await asyncio.wait_for(first.seen.handed.wait(), 10)
        await first.server.stop(0)
        told = await running
    assert told.text == reply_text(first.seen.specs[0].prompt, 60)
    again = other.seen.specs[0]
    assert again.takeover
    assert [block.id for block in other.seen.blocks] == list(again.blocks), "the KV came along"
    assert other.seen.hand_overs == [len(again.known_tokens)]
    assert told.ended.reason == "length"
    assert told.plan.instance == other.name


async def test_a_cloud_that_leaves_is_left_for_one_that_is_ready() -> None:
    async with two_clouds() as here:
        device, (first, other) = here.device, here.ranked()
        first.script.decode.clear()
        running = asyncio.create_task(device.run(plan="text", max_tokens=60))
        await asyncio.wait_for(first.seen.opened.wait(), 10)
        first.script.leaving.set()
        told = await running
        prompt = first.seen.specs[0].prompt
    assert [(one.leaving, bool(one.turn)) for one in other.seen.prepared] == [(True, True)]
    assert first.seen.prepared == []
    assert other.seen.specs[0].takeover
    assert told.text == reply_text(prompt, 60)
    assert told.plan.instance == other.name


async def test_a_cloud_that_came_back_with_other_weights_gets_no_turn() -> None:
    async with two_clouds() as here:
        clouds, device, (first, other) = here.node.clouds, here.device, here.ranked()
        first.script.weights = "f" * 32  # since the last probe
        told = await device.run(plan="ship")
        assert told.plan.instance == other.name
        assert first.seen.begins == []
        refused = clouds.clouds[first.address]
        assert not refused.healthy
        with pytest.raises(Unreachable, match="other weights"):
            await refused.reach()
        first.script.weights = MANIFEST.weights_digest
        await refused.reach()
        assert refused.healthy


async def test_a_node_starts_with_the_clouds_that_serve_its_weights() -> None:
    async with scripted_cloud("cloud-a") as a, scripted_cloud("cloud-b") as b:
        a.script.weights = "f" * 32
        async with edge_node(a.address, b.address) as node, device_of(node) as device:
            assert (await device.run()).plan.instance == b.name
        b.script.weights = "1" * 32
        with pytest.raises(ModelMismatch, match="other weights"):
            async with edge_node(a.address, b.address):
                pass


async def test_a_model_that_does_not_load_leaves_no_probes_behind() -> None:
    def fail(config: EdgeConfig) -> Any:
        raise ModelMissing("No such model.")

    before = asyncio.all_tasks()
    config = EdgeConfig(port=0, cloud="127.0.0.1:1")
    with pytest.raises(ModelMissing):
        async with EdgeNode(config, load=fail):
            pass
    assert asyncio.all_tasks() == before


async def test_offline_the_conversation_goes_on_and_reaches_the_log_later() -> None:
    async with serving() as (cloud, node, device):
        await device.open()
        first = await device.run("t1", "Hello", plan="ship")
        await cloud.server.stop(0)
        offline = await device.run("t2", "Still there?")
        assert (offline.plan.offline, offline.plan.shape) == (True, "edge")
        assert not offline.ended.durable
        assert len(offline.text) == 12
        assert len(node.outbox) == 1
        async with scripted_cloud(port=cloud.server.port) as back:
            back.sessions = cloud.sessions
            await asyncio.wait_for(back.seen.closed.wait(), 20)
    delivered = back.sessions["trip"][-1]
    assert delivered.turn == "t2"
    assert delivered.text == offline.text
    assert [turn.text for turn in back.sessions["trip"]] == [first.text, offline.text]


async def test_a_link_that_stays_down_mid_turn_ends_offline() -> None:
    async with serving(limits=EdgeTurnLimits(retry_s=0.3)) as (cloud, _node, device):
        cloud.script.decode.clear()
        running = asyncio.create_task(device.run(plan="ship", max_tokens=20))
        await asyncio.wait_for(cloud.seen.opened.wait(), 10)
        await cloud.server.stop(0)
        told = await running
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 20)
    assert not told.ended.durable
    assert told.plan.offline


async def test_an_offline_turn_can_be_stopped() -> None:
    async with serving() as (cloud, _node, device):
        await device.open()
        await cloud.server.stop(0)
        told = Told()
        async for event in device.stream("t1", max_tokens=1000):
            told.take(event)
            if event.WhichOneof("kind") == "frame" and len(told.frames) == 3:
                request = pb.StopTurnRequest(session="trip", device="phone")
                assert (await device.call("StopTurn", request)).turn == "t1"
    assert told.ended.reason == "cancelled"
    assert 3 <= len(told.text) < 1000


async def test_a_model_that_fails_leaves_the_turn_to_the_cloud() -> None:
    model = TinyModel()

    def fail(what: str) -> None:
        if what == "prefill" and node.server is not None:
            raise RuntimeError("out of memory")

    async with serving(model) as (cloud, node, device):
        model.pause = fail
        told = await device.run(plan="ship")
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 12)
    assert {frame.made_by for frame in told.frames} == {"cloud"}


async def test_a_node_that_stops_says_so_to_its_devices() -> None:
    told = Told()

    async def read(device: Device) -> None:
        async for event in device.stream(plan="text"):
            told.take(event)
            started.set()

    started = asyncio.Event()
    async with serving() as (cloud, node, device):
        cloud.script.decode.clear()
        reading = asyncio.create_task(read(device))
        await started.wait()
        await node.__aexit__(None, None, None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
    assert isinstance(error_from_rpc(caught.value), Unreachable)
    assert told.kinds == ["started"]


async def test_followers_do_not_hold_up_a_stop() -> None:
    async with serving() as (cloud, node, device):
        call = device.stub.Attach(pb.AttachRequest(session="trip", device="phone"))
        await asyncio.wait_for(anext(aiter(call)), 10)
        async with asyncio.timeout(5):
            await node.__aexit__(None, None, None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [event async for event in call]  # heartbeats from before
    assert isinstance(error_from_rpc(caught.value), Unreachable)
    assert not cloud.seen.specs


async def test_a_cloud_without_room_or_engine_sends_the_turn_to_the_next() -> None:
    refusals = (Overloaded("Full.", retry_after_s=5.0), EngineGone("The engine died."))
    async with two_clouds() as here:
        for number, refusal in enumerate(refusals):
            session = f"s{number}"
            first, other = here.ranked(session)
            first.script.begin_error, other.script.begin_error = refusal, None
            told = await here.device.run(f"t{number}", session=session, plan="text")
            assert told.plan.instance == other.name
        full = Overloaded("Full.", retry_after_s=5.0)
        here.a.script.begin_error = here.b.script.begin_error = full
        with pytest.raises(Overloaded):
            await here.device.run("t9", session="s9")


async def test_a_cloud_that_runs_the_turn_already_is_only_listened_to() -> None:
    model = TinyModel()
    async with serving(model) as (cloud, _node, device):
        cloud.script.attached = True
        cloud.script.salt = 1
        told = await device.run(plan="edge", max_tokens=60)
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 60, salt=1)
    assert {frame.made_by for frame in told.frames if frame.durable} == {"cloud"}
    assert told.kinds.count("rewound") <= 1


@pytest.mark.parametrize("how", ["closed", "not durable"])
async def test_an_end_that_the_log_has_not_is_taken_up_elsewhere(how: str) -> None:
    async with serving() as (cloud, _node, device):
        cloud.script.bad_end = how
        told = await device.run(plan="text")
        again = await device.run(plan="text")
    assert told.text == again.text == reply_text(cloud.seen.specs[0].prompt, 12)
    assert told.ended.durable
    assert [spec.takeover for spec in cloud.seen.specs] == [False, True]


async def test_a_turn_that_broke_here_is_joined_through_the_log_by_who_comes_back() -> None:
    limits = EdgeTurnLimits(retry_s=0.1, timeout_s=0.2)
    async with serving(limits=limits) as (cloud, node, device):
        for _ in range(OUTBOX_TURNS):
            node.outbox.reserve()  # no room for a turn that goes offline
        cloud.script.decode.clear()
        running = asyncio.create_task(device.run(plan="text"))
        await asyncio.wait_for(cloud.seen.opened.wait(), 10)
        await cloud.server.stop(0)
        with pytest.raises(Unreachable):
            await running
        async with scripted_cloud(port=cloud.server.port) as back:
            turn = TurnState(turn="t1", prompt="Hi", tokens=[104, 105], reason="stop")
            turn.pieces = ["h", "i"]
            back.known["t1"] = turn
            told = await device.run(plan="text")
    assert told.text == "hi"


async def test_offline_it_goes_on_looking_and_ends_with_the_logs_text() -> None:
    """A cloud that is back before the edge is done, with a log that went another way."""
    async with serving(limits=EdgeTurnLimits(retry_s=0.2)) as (cloud, node, device):
        await device.open()
        cloud.script.ready.clear()
        cloud.script.deaf = True
        told, back = Told(), None
        async with AsyncExitStack() as stack:
            async for event in device.stream(plan="ship", max_tokens=1500):
                told.take(event)
                if len(told.frames) == 3 and back is None:
                    await cloud.server.stop(0)
                    other = Script(deaf=True, salt=1)
                    again = scripted_cloud(port=cloud.server.port, script=other)
                    back = await stack.enter_async_context(again)
    prompt = cloud.seen.specs[0].prompt
    assert told.ended.durable
    assert told.text == reply_text(prompt, 1500, salt=1)
    assert told.kinds.count("rewound") == 1
    assert len(node.outbox) == 0


async def test_what_was_said_offline_comes_first_and_is_in_the_next_prompt() -> None:
    async with serving() as (cloud, _node, device):
        await device.open()
        await device.run("t1", "Hello", plan="text")
        await cloud.server.stop(0)
        await device.run("t2", "My name is Ada.")
        async with scripted_cloud(port=cloud.server.port) as back:
            back.sessions = cloud.sessions
            told = await device.run("t3", "What is my name?", plan="text")
            assert [turn.turn for turn in back.sessions["trip"]] == ["t1", "t2", "t3"]
            prompt = next(spec.prompt for spec in back.seen.specs if spec.turn == "t3")
            begins = {begin.turn.turn: begin for begin in back.seen.begins}
    assert (begins["t2"].offline, begins["t2"].follows) == (True, "t1")
    assert (begins["t3"].offline, begins["t3"].follows) == (False, "")
    assert b"My name is Ada." in bytes(token for token in prompt if token < 256)
    assert told.ended.durable


async def test_a_session_opened_offline_names_its_tenant() -> None:
    async with serving() as (cloud, _node, device):
        cloud.tenant = "acme"
        assert (await device.open()).tenant == "acme"
        await cloud.server.stop(0)
        assert (await device.open()).tenant == "acme"


async def test_a_restarted_edge_delivers_what_was_said_offline(tmp_path: Path) -> None:
    outbox = tmp_path / "outbox"
    async with serving(outbox=outbox) as (cloud, _node, device):
        await device.open()
        await cloud.server.stop(0)
        offline = await device.run("t1", "Still there?")
    async with scripted_cloud() as back:
        async with edge_node(back.address, outbox=outbox):
            await asyncio.wait_for(back.seen.closed.wait(), 20)
        (delivered,) = back.sessions["trip"]
    assert (delivered.turn, delivered.text) == ("t1", offline.text)
