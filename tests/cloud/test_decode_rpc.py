"""`Decode.Run` over real gRPC: KV in, hand-over, broken streams, bytes that are no KV."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import msgspec
import numpy as np
import pytest

from segue_contract.errors import (
    BadBlock,
    BadChecksum,
    BadMagic,
    BadRecipe,
    BadVersion,
    DeadlineExceeded,
    InvalidArgument,
    KvError,
    ModelMismatch,
    PromptTooLong,
    SegueError,
    Truncated,
)
from segue_contract.ids import SessionName
from segue_contract.kv.frame import encode_frames
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, block_ids
from segue_contract.kv.steps import codec_named
from segue_contract.limits import MAX_GRPC_MESSAGE_BYTES, MAX_PROMPT_BYTES, TurnLimits
from segue_contract.model.manifest import read_manifest
from segue_contract.servers import Valkey
from segue_contract.sync.ops import TurnEnded, TurnStarted, UserMessage
from segue_contract.sync.state import decode_turns, heard
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

WAIT_S = 20.0
PROMPT = tuple(range(10, 10 + 2 * BLOCK_TOKENS + 5))


UNOPENED = TurnLimits(open_timeout_s=0.05)  # for an edge that never opens its turn


@pytest.fixture
def limits() -> TurnLimits:
    return TurnLimits()


@pytest.fixture
async def cloud(valkey: Valkey, model_dir: Path, limits: TurnLimits) -> AsyncIterator[CloudRpc]:
    engine = ScriptedEngine(range(100, 110))
    async with cloud_rpc(valkey.url, model_dir, engine, limits=limits) as running:
        await running.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        yield running


async def begin(cloud: CloudRpc, turn: str = "t1") -> dpb.BeginReply:
    asked = pb.RunTurnRequest(
        session="trip", device="phone", turn=turn, prompt="Hello", max_tokens=50
    )
    reply: dpb.BeginReply = await cloud.decode.Begin(dpb.BeginRequest(turn=asked))
    return reply


async def test_edges_are_told_how_many_places_are_taken(cloud: CloudRpc) -> None:
    idle = (await cloud.decode.Probe(dpb.ProbeRequest())).facts
    assert (idle.held_turns, idle.places) == (0, 8)
    assert idle.total_pages == cloud.engine.stats().pages_total > 0
    assert (await begin(cloud)).facts.held_turns == 1, "it counts before an edge has opened it"


async def test_an_edge_with_other_weights_is_refused_before_anything_is_written(
    cloud: CloudRpc,
) -> None:
    asked = pb.RunTurnRequest(
        session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=50
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cloud.decode.Begin(dpb.BeginRequest(turn=asked, weights_digest="f" * 32))
    assert isinstance(error_from_rpc(caught.value), ModelMismatch)
    assert not (await begin(cloud)).joined, "the turn was not begun by the refused call"


async def test_messages_that_were_too_long_do_not_fill_the_reply_to_an_edge(
    cloud: CloudRpc,
) -> None:
    """Each may have MAX_PROMPT_BYTES; some forty of them are more than one message of gRPC."""
    session = SessionName("default", "trip")
    for number in range(MAX_GRPC_MESSAGE_BYTES // MAX_PROMPT_BYTES + 2):
        turn = f"long{number}"
        said = [
            UserMessage(id=f"{turn}.u", device="phone", turn=turn, text="x" * MAX_PROMPT_BYTES),
            TurnStarted(id=f"{turn}.s", device="phone", turn=turn, epoch=1),
        ]
        claim = await cloud.log.begin_turn(session, turn, said)
        end = TurnEnded(id=f"{turn}.e", turn=turn, epoch=1, reason="error",
                        error_code=PromptTooLong.code, error_message="Too long.")  # fmt: skip
        await cloud.log.append_turn(session, claim.hold(turn), 1, [end], ends=True)
    found = decode_turns((await begin(cloud)).turns)
    assert len(found) == number + 1, "an edge counts the turns that it knows"
    assert {turn.error_code for turn in found} == {PromptTooLong.code}
    assert heard(found) == []


def opening(cloud: CloudRpc, epoch: int, turn: str = "t1", **changes: object) -> dpb.RunRequest:
    recipe = cloud.manifest.edge_recipe.digest
    ids = block_ids(recipe, PROMPT)
    values: dict[str, object] = {
        "session": "trip", "device": "phone", "turn": turn, "epoch": epoch, "prompt": PROMPT,
        "blocks": ids, "recipe": recipe, "max_tokens": 50, "shape": "ship",
        "ship_blocks": len(ids),
    }  # fmt: skip
    return dpb.RunRequest(open=dpb.TurnSpec(**(values | changes)))


def kv_bytes(cloud: CloudRpc, ids: list[bytes] | None = None) -> list[bytes]:
    """The prompt's blocks as an edge sends them, under their own ids or others."""
    recipe = cloud.manifest.edge_recipe
    sizes = cloud.manifest.geometry.kv
    shape = (sizes.layers, sizes.kv_heads, BLOCK_TOKENS, sizes.head_dim)
    random = np.random.default_rng(7)
    codec = codec_named(recipe.codec)
    blocks = []
    for index, one in enumerate(ids or block_ids(recipe.digest, PROMPT)):
        k, v = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        block, sinks = KvBlock(one, recipe.digest, k, v), codec.sinks_of(index)
        blocks.append(encode_frames(block, codec.step.name, sink_tokens=sinks))
    return blocks


def kv(data: bytes) -> dpb.RunRequest:
    return dpb.RunRequest(kv=dpb.KvPart(data=data))


def tokens(index: int, ids: list[int]) -> dpb.RunRequest:
    return dpb.RunRequest(tokens=dpb.EdgeTokens(index=index, tokens=ids, pieces=["x" for _ in ids]))


async def until_ended(cloud: CloudRpc, turn: str = "t1") -> list[int]:
    """The reply's tokens in the log, once the turn is closed there."""
    asked = pb.RunTurnRequest(
        session="trip", device="phone", turn=turn, prompt="Hello", max_tokens=50
    )
    found: list[int] = []
    async with asyncio.timeout(WAIT_S):
        async for event in cloud.agent.RunTurn(asked):
            found.extend(event.frame.tokens)
    return found


async def next_reply(call: grpc.aio.StreamStreamCall) -> dpb.RunReply:
    """The next one that is no heartbeat: those come whenever the machine is slow."""
    while True:
        reply = await call.read()
        if reply is grpc.aio.EOF or reply.WhichOneof("kind") != "heartbeat":
            return reply


async def replies(call: grpc.aio.StreamStreamCall) -> AsyncIterator[dpb.RunReply]:
    """What is still to come on a stream."""
    async with asyncio.timeout(WAIT_S):
        while (reply := await next_reply(call)) is not grpc.aio.EOF:
            yield reply


async def drain(call: grpc.aio.StreamStreamCall) -> None:
    async for _ in replies(call):
        pass


async def failure(call: grpc.aio.StreamStreamCall) -> SegueError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await drain(call)
    return error_from_rpc(raised.value)


async def test_kv_then_first_token_then_the_cloud_goes_on(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch))
    opened = (await next_reply(call)).opened
    assert opened.have_blocks == 0
    for data in kv_bytes(cloud):
        for start in range(0, len(data), 100_000):
            await call.write(kv(data[start : start + 100_000]))
    ready = await next_reply(call)
    assert ready.ready.received_blocks == 2
    await call.write(tokens(0, [100]))
    assert (await next_reply(call)).durable.next_index == 1
    await call.write(dpb.RunRequest(hand_over=dpb.HandOver(next_index=1)))
    made: list[int] = []
    async for reply in replies(call):
        made.extend(reply.frame.tokens)
        if reply.WhichOneof("kind") == "ended":
            assert reply.ended.reason == "stop"
    assert made == list(range(101, 110))
    assert await until_ended(cloud) == list(range(100, 110))
    assert len(cloud.engine.blocks) == 2

    again = await begin(cloud, "t2")
    known = decode_turns(again.turns)
    assert [turn.turn for turn in known] == ["t1"]
    assert known[0].tokens == list(range(100, 110))
    call = cloud.decode.Run()
    await call.write(opening(cloud, again.epoch, "t2"))
    assert (await next_reply(call)).opened.have_blocks == 2
    assert (await next_reply(call)).WhichOneof("kind") == "ready"  # nothing to wait for
    call.cancel()


def _flip(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_flip(0), BadMagic),
        (_flip(4), BadVersion),
        (_flip(5000), BadChecksum),
        (lambda data: b"\x00" * len(data), BadMagic),
    ],
)
async def test_bytes_that_are_no_kv_fail_the_stream_and_never_the_turn(
    cloud: CloudRpc, spoil: Callable[[bytes], bytes], error: type[KvError]
) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch))
    first, _ = kv_bytes(cloud)
    await call.write(kv(spoil(first)))
    found = await failure(call)
    assert isinstance(found, (error, KvError))
    assert type(found) is error
    assert not cloud.engine.blocks
    assert await until_ended(cloud) == list(range(100, 110))


async def test_a_stream_that_ends_in_mid_block(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch))
    first, second = kv_bytes(cloud)
    await call.write(kv(first + second[:1000]))
    await call.done_writing()
    assert isinstance(await failure(call), Truncated)
    assert len(cloud.engine.blocks) == 1
    assert await until_ended(cloud) == list(range(100, 110))


async def test_a_connection_that_breaks(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch))
    await next_reply(call)
    await call.write(tokens(0, [100, 101]))
    assert (await next_reply(call)).durable.next_index == 2
    call.cancel()
    assert await until_ended(cloud) == list(range(100, 110))
    assert cloud.engine.turns[-1].made == (100, 101)


async def test_a_recipe_that_the_manifest_disallows_is_refused_with_its_blocks(
    valkey: Valkey, model_dir: Path
) -> None:
    built = read_manifest(model_dir)
    recipes = {
        name: msgspec.structs.replace(entry, allowed=name == "exact")
        for name, entry in built.recipes.items()
    }
    manifest = msgspec.structs.replace(built, recipes=recipes)
    engine = ScriptedEngine(range(100, 110))
    async with cloud_rpc(valkey.url, model_dir, engine, manifest=manifest) as cloud:
        await cloud.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        facts = (await begin(cloud)).facts
        assert list(facts.recipes) == [recipes["exact"].recipe.digest]
        call = cloud.decode.Run()
        await call.write(opening(cloud, 1))
        assert isinstance(await failure(call), BadRecipe)
        # and where a stream opens under an allowed recipe, and then sends blocks of the other
        call = cloud.decode.Run()
        digest = recipes["exact"].recipe.digest
        ids = block_ids(digest, PROMPT)
        await call.write(opening(cloud, 1, recipe=digest, blocks=ids))
        await call.write(kv(kv_bytes(cloud, ids)[0]))
        assert isinstance(await failure(call), BadRecipe)
        assert not engine.blocks
        assert await until_ended(cloud) == list(range(100, 110))


async def test_a_foreign_recipe_is_refused_by_name(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch, recipe="0" * 32))
    assert isinstance(await failure(call), BadRecipe)


async def test_an_edge_that_comes_back_attaches(cloud: CloudRpc) -> None:
    cloud.engine._free = False
    begun = await begin(cloud)
    first = cloud.decode.Run()
    await first.write(opening(cloud, begun.epoch, shape="text", ship_blocks=0))
    await first.read()
    cloud.engine.allow(4)
    async with asyncio.timeout(WAIT_S):
        while (reply := await first.read()).frame.index + len(reply.frame.tokens) < 4:
            pass
    first.cancel()
    second = cloud.decode.Run()
    await second.write(
        opening(cloud, begun.epoch, shape="text", takeover=True, known_tokens=[100, 101])
    )
    opened = (await second.read()).opened
    assert opened.epoch == begun.epoch  # nothing changed hands
    cloud.engine.allow(20)
    seen: list[int] = []
    async for reply in replies(second):
        seen.extend(reply.frame.tokens)
    assert seen == list(range(100, 110))
    third = cloud.decode.Run()
    await third.write(opening(cloud, begun.epoch, takeover=True))
    kinds = [reply.WhichOneof("kind") async for reply in replies(third)]
    assert kinds == ["opened", "frame", "ended"]


async def test_a_turn_that_is_taken_over_goes_on_as_soon_as_its_kv_is_there(
    cloud: CloudRpc, valkey: Valkey, model_dir: Path
) -> None:
    """Not behind other turns that wait for the engine, nor when the edge says so: it makes no more
    tokens, and readers wait for the next one."""
    cloud.engine._free = False
    begun = await begin(cloud)
    first = cloud.decode.Run()
    await first.write(opening(cloud, begun.epoch, shape="text", ship_blocks=0))
    cloud.engine.allow(2)
    async with asyncio.timeout(WAIT_S):
        while (reply := await next_reply(first)).frame.index + len(reply.frame.tokens) < 2:
            pass
    engine = ScriptedEngine(range(100, 110))
    engine.waiting = 1
    async with cloud_rpc(valkey.url, model_dir, engine) as other:
        call = other.decode.Run()
        taking = opening(other, begun.epoch, takeover=True, known_tokens=[100, 101, 102])
        await call.write(taking)
        assert (await next_reply(call)).WhichOneof("kind") == "opened"
        for data in kv_bytes(other):
            assert not engine.turns, "the engine would compute what comes"
            await call.write(kv(data))
        kinds = [reply.WhichOneof("kind") async for reply in replies(call)]
        assert kinds[-1] == "ended"
        assert await until_ended(other) == list(range(100, 110))
        assert [len(turn.made) for turn in engine.turns] == [3]
        assert len(engine.blocks) == 2


@pytest.mark.parametrize("limits", [UNOPENED])
async def test_a_turn_that_is_begun_and_never_opened_runs_by_itself(cloud: CloudRpc) -> None:
    await begin(cloud)
    assert await until_ended(cloud) == list(range(100, 110))


async def test_block_ids_that_are_not_the_prompts(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch, blocks=[b"x" * 16, b"y" * 16]))
    assert isinstance(await failure(call), BadBlock)


async def test_tokens_that_the_model_does_not_have(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch))
    await call.write(tokens(0, [10_000_000]))
    assert isinstance(await failure(call), InvalidArgument)
    assert await until_ended(cloud) == list(range(100, 110))


@pytest.mark.parametrize(
    ("limits", "beats"),
    [
        (TurnLimits(edge_look_s=0.02), True),
        (TurnLimits(edge_look_s=0.02, kv_first_byte_s=0.2), False),
    ],
)
async def test_an_edge_that_owes_tokens_and_says_nothing_is_not_waited_for(
    cloud: CloudRpc, beats: bool
) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch, shape="edge", ship_blocks=0))
    if beats:  # and then no more
        await call.write(dpb.RunRequest(heartbeat=pb.Heartbeat()))
    assert isinstance(await failure(call), DeadlineExceeded)
    assert await until_ended(cloud) == list(range(100, 110))


async def test_a_prompt_longer_than_any_is_refused_before_it_is_looked_at(cloud: CloudRpc) -> None:
    begun = await begin(cloud)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch, prompt=[1] * 1_000_000, blocks=[], ship_blocks=0))
    assert isinstance(await failure(call), InvalidArgument)
    call = cloud.decode.Run()
    await call.write(opening(cloud, begun.epoch, prompt=[1] * 10))
    assert isinstance(await failure(call), BadBlock)
    assert await until_ended(cloud) == list(range(100, 110))


@pytest.mark.parametrize("limits", [UNOPENED])
async def test_a_begin_whose_caller_left_runs_all_the_same(cloud: CloudRpc) -> None:
    asked = pb.RunTurnRequest(
        session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=50
    )
    call = cloud.decode.Begin(dpb.BeginRequest(turn=asked))
    await asyncio.sleep(0)
    call.cancel()
    assert await until_ended(cloud) == list(range(100, 110))
    assert cloud.manager.room == 8
