"""Turns through a whole edge node (tiny model) and a scripted cloud, over real gRPC."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from segue_contract.errors import (
    BadSampling,
    EmptyPrompt,
    InvalidArgument,
    Overloaded,
    PromptTooLong,
    SessionBusy,
    Unreachable,
)
from segue_contract.kv.layout import block_ids
from segue_contract.model.manifest import RecipeEntry
from segue_contract.plan import decode_plan
from segue_contract.sync.state import TurnState
from segue_contract.v1 import agent_pb2 as pb
from tests.support.edge_node import Told, device_of, edge_node, serving
from tests.support.scripted_cloud import scripted_cloud
from tests.support.tiny_edge import MANIFEST, RECIPE, TinyModel, reply_text


async def test_ship_first_token_from_the_edge_then_the_cloud() -> None:
    async with serving() as (cloud, _node, device):
        told = await device.run(plan="ship", max_tokens=100)
    spec = cloud.seen.specs[0]
    assert told.text == reply_text(spec.prompt, 100)
    first = told.frames[0]
    assert (first.index, first.made_by, first.durable) == (0, "edge", False)
    assert told.frames[-1].made_by == "cloud"
    assert told.frames[-1].durable
    assert told.kinds[0] == "started"
    assert told.ended.reason == "length"
    assert cloud.seen.hand_overs == [len(cloud.seen.edge_tokens)]


async def test_ship_sends_every_full_block_exactly_once_and_right() -> None:
    async with serving() as (cloud, node, device):
        told = await device.run(plan="ship", max_tokens=100)
    spec = cloud.seen.specs[0]
    ids = block_ids(node.tools.recipe, spec.prompt)
    assert len(ids) == 6
    assert list(spec.blocks) == ids
    assert [block.id for block in cloud.seen.blocks] == ids
    for index, block in enumerate(cloud.seen.blocks):
        tokens = np.asarray(spec.prompt[index * 64 : index * 64 + 64])
        assert np.abs(block.k[1, 0, :, 3] - tokens).max() < 2  # int8 of values up to 258
        assert np.abs(block.v[1, 0, :, 3] + tokens).max() < 2
    assert told.plan.shipped_blocks == 6
    assert told.plan.shape == "ship"
    assert told.plan.forced


async def test_ship_skips_blocks_that_the_cloud_has() -> None:
    async with serving() as (cloud, node, device):
        cloud.script.have_blocks = 4
        told = await device.run(plan="ship", max_tokens=100)
    ids = block_ids(node.tools.recipe, cloud.seen.specs[0].prompt)
    assert [block.id for block in cloud.seen.blocks] == ids[4:]
    assert told.plan.cloud_cached_blocks == 4
    assert told.plan.shipped_blocks == 2


async def test_a_turn_of_the_edge_alone_leaves_no_kv_in_the_cloud() -> None:
    async with serving() as (cloud, _node, device):
        await device.run("t1", plan="edge")
        cloud.script.have_blocks = 4
        alone = await device.run("t2", plan="edge")
        both = await device.run("t3", plan="ship")
        after = await device.run("t4", plan="ship")
    assert alone.plan.inputs["cloud_cached_tokens"] == 0
    assert both.plan.inputs["cloud_cached_tokens"] == 4 * 64, "it said so to the turn before"
    assert after.plan.inputs["cloud_cached_tokens"] > 4 * 64


async def test_the_bridge_speaks_until_the_cloud_is_ready() -> None:
    async with serving() as (cloud, _node, device):
        cloud.script.ready.clear()
        told = Told()
        async for event in device.stream(plan="ship", max_tokens=200):
            told.take(event)
            if len(told.frames) == 5:
                cloud.script.ready.set()
    bridged = len(cloud.seen.edge_tokens)
    assert 5 <= bridged < 200
    assert cloud.seen.hand_overs == [bridged]
    assert [frame.made_by for frame in told.frames[:bridged]] == ["edge"] * bridged
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 200)
    assert told.plan.bridge_tokens == bridged - 1
    assert "durable" in told.kinds


async def test_a_reply_that_ends_on_the_bridge_is_ended_by_the_edge() -> None:
    async with serving(TinyModel(3)) as (cloud, _node, device):
        cloud.script.ready.clear()
        told = await device.run(plan="ship")
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 3)
    assert told.ended.reason == "stop"
    assert [(end.reason, end.next_index) for end in cloud.seen.ended] == [("stop", 3)]


async def test_an_end_token_at_once_is_an_empty_reply() -> None:
    async with serving(TinyModel(0)) as (_cloud, _node, device):
        told = await device.run(plan="ship")
    assert told.text == ""
    assert told.ended.reason == "stop"


async def test_text_leaves_all_to_the_cloud() -> None:
    model = TinyModel()
    async with serving(model) as (cloud, _node, device):
        before = model.prefilled_tokens
        cloud.script.decode.clear()
        running = asyncio.create_task(device.run(plan="text"))
        await asyncio.wait_for(cloud.seen.opened.wait(), 10)
        assert model.prefilled_tokens == before
        cloud.script.decode.set()
        told = await running
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 12)
    assert {frame.made_by for frame in told.frames} == {"cloud"}
    assert cloud.seen.blocks == []
    assert cloud.seen.specs[0].ship_blocks == 0
    assert told.plan.first_token_by == "cloud"


async def test_edge_decodes_everything_here() -> None:
    async with serving() as (cloud, _node, device):
        told = await device.run(plan="edge")
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 12)
    assert {frame.made_by for frame in told.frames} == {"edge"}
    assert len(cloud.seen.edge_tokens) == 12
    assert cloud.seen.blocks == []
    assert [(end.reason, end.next_index) for end in cloud.seen.ended] == [("length", 12)]
    assert told.ended.durable


async def test_a_stop_string_ends_an_edge_reply_before_it() -> None:
    async with serving() as (_cloud, _node, device):
        whole = (await device.run("t1", plan="edge")).text
        told = await device.run("t2", session="other", plan="edge", stop=[whole[4:7]])
    assert told.text == whole[:4]
    assert told.ended.reason == "stop"


async def test_tokens_held_for_a_stop_string_are_not_handed_over() -> None:
    model, loop, gate = TinyModel(), asyncio.get_running_loop(), threading.Event()
    async with serving(model) as (cloud, _node, device):
        whole = (await device.run("t1", plan="edge")).text
        cloud.script.ready.clear()

        def pause(what: str) -> None:
            if what == "decode":  # the cloud is ready while the first token is held back
                loop.call_soon_threadsafe(cloud.script.ready.set)
                assert gate.wait(10)

        model.pause = pause
        told = await device.run("t2", session="other", plan="ship", stop=[whole[:6] + "#"])
        gate.set()
    assert cloud.seen.hand_overs == [0]
    assert told.text == whole
    assert {frame.made_by for frame in told.frames} == {"cloud"}


async def test_the_plan_goes_up_before_the_end() -> None:
    async with serving() as (cloud, _node, device):
        for index, shape in enumerate(("ship", "text", "edge")):
            await device.run(f"t{index}", session=f"s{index}", plan=shape)
    assert [decode_plan(plan).shape for plan in cloud.seen.plans] == ["ship", "text", "edge"]


async def test_the_second_turn_reuses_the_first_ones_kv() -> None:
    model = TinyModel()
    async with serving(model) as (cloud, node, device):
        await device.run("t1", plan="ship", max_tokens=80)
        await asyncio.wait_for(node.warmer.finished.wait(), 10)
        assert node.warmer.warmed_tokens >= 64  # the reply's blocks
        before = model.prefilled_tokens
        told = await device.run("t2", "And the shore?", plan="ship")
    prompt = cloud.seen.specs[1].prompt
    assert prompt[: len(cloud.seen.specs[0].prompt)] == cloud.seen.specs[0].prompt
    assert told.text == reply_text(prompt, 12)
    assert told.plan.edge_cached_blocks >= 7
    assert model.prefilled_tokens - before < 128 + 64


async def test_an_edge_asks_only_for_turns_it_lacks() -> None:
    async with serving() as (cloud, _node, device):
        for turn in ("t1", "t2", "t3"):
            await device.run(turn, "Hello there", plan="text")
    assert [begin.known_turns for begin in cloud.seen.begins] == [0, 0, 1]


async def test_the_prefill_does_not_wait_for_the_cloud_and_nothing_is_shown_before_it() -> None:
    model = TinyModel()
    prefilled = threading.Event()
    async with serving(model) as (cloud, _node, device):
        await device.open()  # created just now: the conversation is known to be empty
        cloud.script.begin.clear()
        before = model.prefilled_tokens
        model.pause = lambda what: prefilled.set()
        running = asyncio.create_task(device.run(plan="ship"))
        assert await asyncio.to_thread(prefilled.wait, 10)
        assert cloud.seen.specs == []
        cloud.script.begin.set()
        told = await running
    assert told.kinds[0] == "started"
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 12)
    assert model.prefilled_tokens - before == len(cloud.seen.specs[0].prompt), "computed once"
    assert told.plan.edge_cached_blocks == 0, "its own blocks are no cache hits"


async def test_an_early_prefill_of_an_old_conversation_is_not_used() -> None:
    async with serving() as (cloud, _node, device):
        await device.run("t1", "Hello", plan="ship")
        other = TurnState(turn="t0", prompt="From elsewhere", tokens=[104, 105], reason="stop")
        other.pieces = ["h", "i"]
        cloud.sessions["trip"].append(other)
        told = await device.run("t2", plan="ship")
    prompt = cloud.seen.specs[1].prompt
    assert bytes(token for token in prompt if token < 256).count(b"From elsewhere") == 1
    assert told.text == reply_text(prompt, 12)


async def test_a_disconnected_device_misses_nothing_when_it_is_back() -> None:
    async with scripted_cloud() as cloud, edge_node(cloud.address) as node:
        cloud.script.decode.clear()
        async with device_of(node) as phone:
            call = phone.stream(plan="ship")
            async for event in call:
                if event.WhichOneof("kind") == "frame":
                    break
            call.cancel()
        cloud.script.decode.set()
        async with device_of(node) as phone:
            whole = await phone.run(plan="ship")
            rest = await phone.run(plan="ship", from_index=5)
    assert len(cloud.seen.specs) == 1, "the turn ran once"
    assert whole.text == reply_text(cloud.seen.specs[0].prompt, 12)
    assert rest.frames[0].index == 5
    assert "".join("".join(frame.pieces) for frame in rest.frames) == whole.text[5:]


async def test_a_turn_that_the_cloud_knows_is_followed_not_run() -> None:
    async with scripted_cloud() as cloud:
        async with edge_node(cloud.address) as first, device_of(first) as device:
            whole = await device.run(plan="text")
        async with edge_node(cloud.address) as second, device_of(second) as device:
            again = await device.run(plan="text")
    assert again.text == whole.text
    assert len(cloud.seen.specs) == 1


async def test_replies_that_are_decoded_here_do_not_keep_a_new_prompt_waiting() -> None:
    model, both_speak = TinyModel(), asyncio.Event()
    loop = asyncio.get_running_loop()
    async with serving(model=model) as (cloud, node, device):

        def pause(what: str) -> None:
            if node.tools.compute.load().decoding == 2:
                loop.call_soon_threadsafe(both_speak.set)

        model.pause = pause
        cloud.script.ready.clear()  # a full cloud: both bridges go on and on
        busy = [
            asyncio.create_task(device.run(turn, session=turn, plan="ship", max_tokens=1500))
            for turn in ("t1", "t2")
        ]
        await asyncio.wait_for(both_speak.wait(), 10)
        told = await device.run("t3", session="t3", plan="edge", max_tokens=2)
        assert not any(task.done() for task in busy)
        cloud.script.ready.set()
        replies = await asyncio.gather(*busy)
    assert len(told.text) == 2
    assert [len(reply.text) for reply in replies] == [1500, 1500]


async def test_stop_from_any_device_ends_the_turn() -> None:
    async with serving() as (cloud, _node, device):
        cloud.script.ready.clear()
        told = Told()
        async for event in device.stream(plan="ship", max_tokens=500):
            told.take(event)
            if len(told.frames) == 3:
                request = pb.StopTurnRequest(session="trip", device="laptop", turn="t1")
                assert (await device.call("StopTurn", request)).stopping
    assert told.ended.reason == "cancelled"
    assert cloud.seen.hand_overs == []
    assert 3 <= len(told.text) < 500


@pytest.mark.parametrize(
    ("request_fields", "error"),
    [
        ({"prompt": "  "}, EmptyPrompt),
        ({"max_tokens": 0}, BadSampling),
        ({"max_tokens": -3}, BadSampling),
        ({"sampling": pb.Sampling(temperature=float("nan"))}, BadSampling),
        ({"plan": "fastest"}, InvalidArgument),
        ({"plan": "fáster" * 20_000}, InvalidArgument),
        ({"session": "no/such"}, InvalidArgument),
        ({"prompt": "x" * 3000}, PromptTooLong),
    ],
)
async def test_bad_requests_are_refused_before_the_log_is_touched(
    request_fields: dict[str, object], error: type[Exception]
) -> None:
    async with serving() as (cloud, _node, device):
        with pytest.raises(error):
            await device.run("t1", **{"prompt": "Hi", **request_fields})
    assert cloud.seen.begins == []


async def test_the_clouds_errors_keep_their_type() -> None:
    async with serving() as (cloud, _node, device):
        cloud.script.begin_error = SessionBusy("Busy.", hint="Wait.", turn="other")
        with pytest.raises(SessionBusy) as caught:
            await device.run()
        assert caught.value.fields == {"turn": "other"}
        cloud.script.begin_error = None
        assert (await device.run()).ended.reason == "length"  # the same id may be tried again


async def test_beyond_its_bound_a_node_refuses_with_a_hint() -> None:
    async with serving(max_turns=1) as (cloud, _node, device):
        cloud.script.decode.clear()
        first = asyncio.create_task(device.run("t1", plan="text"))
        await asyncio.wait_for(cloud.seen.opened.wait(), 10)
        with pytest.raises(Overloaded) as caught:
            await device.run("t2", session="other")
        assert caught.value.fields["retry_after_s"] > 0
        cloud.script.decode.set()
        assert (await first).ended.reason == "length"


async def test_a_refused_recipe_is_not_shipped() -> None:
    async with serving() as (cloud, _node, device):
        cloud.script.recipes = ("ab" * 16,)
        told = await device.run(plan="ship")
    assert told.plan.shape != "ship"
    assert "recipe" in told.plan.reason
    assert cloud.seen.blocks == []


def tiny_with(entry: RecipeEntry) -> TinyModel:
    """The tiny model under a manifest whose edge recipe is `entry`."""
    model = TinyModel()
    model.recipe = entry.recipe
    model.manifest = msgspec.structs.replace(MANIFEST, recipes={"edge": entry})
    return model


@pytest.mark.parametrize("codec", ["k8v4", "k4v4", "k4v4-sink4"])
async def test_the_node_encodes_as_its_recipe_says(codec: str) -> None:
    recipe = msgspec.structs.replace(RECIPE, codec=codec)
    async with serving(tiny_with(RecipeEntry(recipe=recipe))) as (cloud, _node, device):
        cloud.script.recipes, cloud.script.codec = (recipe.digest,), codec
        told = await device.run(plan="ship")
    assert told.plan.shape == "ship"
    assert len(cloud.seen.blocks) == told.plan.shipped_blocks > 1
    assert {block.recipe for block in cloud.seen.blocks} == {recipe.digest}


async def test_a_recipe_that_the_own_manifest_disallows_is_not_shipped() -> None:
    model = tiny_with(RecipeEntry(recipe=RECIPE, allowed=False))
    async with serving(model) as (cloud, _node, device):
        told = await device.run(plan="ship")
    assert told.plan.shape != "ship"
    assert "recipe" in told.plan.reason
    assert cloud.seen.blocks == []


async def test_the_ledger_has_one_line_per_turn(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    async with serving(ledger=ledger) as (_cloud, _node, device):
        await device.run("t1", plan="ship")
        await device.run("t2", "More.", plan="text")
    lines = [msgspec.json.decode(line) for line in ledger.read_bytes().splitlines()]
    assert [(line["turn"], line["shape"], line["end"]) for line in lines] == [
        ("t1", "ship", "length"),
        ("t2", "text", "length"),
    ]
    assert set(lines[0]["predicted"]) == {"edge", "ship", "text", "split"}
    assert lines[0]["actual"]["total_s"] >= lines[0]["actual"]["ttft_s"] > 0
    assert lines[0]["shipped_fp16_bytes"] > lines[0]["shipped_bytes"] > 0
    assert lines[0]["inputs"]["goodput_bytes_per_s"] > 0


async def test_the_model_is_called_from_its_own_thread_only() -> None:
    model = TinyModel()
    async with serving(model) as (_cloud, _node, device):
        await device.run(plan="edge")
    assert model.threads == {"segue-compute"}
    assert threading.current_thread().name not in model.threads


async def test_proxied_calls_say_they_come_from_an_edge() -> None:
    async with serving() as (_cloud, node, device):
        reply = await device.open()
    assert (reply.role, reply.instance, reply.created) == ("edge", node.instance, True)
    assert reply.max_context_tokens == 2048


async def test_a_node_without_its_cloud_says_so() -> None:
    async with scripted_cloud() as cloud:
        address = cloud.address
    async with edge_node(address) as node, device_of(node) as device:
        with pytest.raises(Unreachable):
            await device.open()
        with pytest.raises(Unreachable):
            await device.run()
