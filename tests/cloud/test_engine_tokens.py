"""The engine's tokens against Hugging Face's, however a turn reaches it: alone or batched, with
shipped KV, handed over in mid-reply, preempted, in small chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.sync.ops import Sampling
from tests.support.tiny_engine import ENDS, Tiny, make_tiny

POOL = 32 << 20
# Exact: what comes back from the host tier was coded in 8 bits.
FP32 = EngineOptions(dtype="fp32", pool_bytes=POOL, host_bytes=0)
NEW = 40
SEED = 20


SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 66, 100, 128, 129, 150, 192, 200, 250, 300, 70, 90, 410]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), SIZES, NEW, SEED)


@asynccontextmanager
async def engine_of(tiny: Tiny, options: EngineOptions) -> AsyncIterator[TorchEngine]:
    engine = await TorchEngine.load(tiny.directory, tiny.manifest, options)
    try:
        yield engine
    finally:
        await engine.close()
        engine.check_integrity()


async def collect(engine: TorchEngine, turn: EngineTurn) -> tuple[list[int], list[EngineOutput]]:
    """All tokens of a turn after `made`, and its outputs; checks that the indexes join up."""
    outputs = [output async for output in engine.submit(turn)]
    index = len(turn.made)
    tokens: list[int] = []
    for output in outputs:
        assert output.index == index
        index += len(output.tokens)
        tokens.extend(output.tokens)
    assert [bool(o.finished) for o in outputs] == [False] * (len(outputs) - 1) + [True]
    return tokens, outputs


async def all_replies(engine: TorchEngine, turns: Sequence[EngineTurn]) -> list[list[int]]:
    return [tokens for tokens, _ in await asyncio.gather(*(collect(engine, t) for t in turns))]


@pytest.mark.parametrize(
    ("compiled", "ahead"),
    [(True, False), (False, False), (True, True)],
    ids=["kernels", "torch", "ahead"],
)
async def test_alone_and_batched_equal_hugging_face(
    tiny: Tiny, compiled: bool, ahead: bool
) -> None:
    turns = tiny.turns()
    options = replace(FP32, compiled=compiled, ahead=ahead)
    async with engine_of(tiny, options) as engine:
        alone = [(await collect(engine, turn))[0] for turn in turns]
    async with engine_of(tiny, options) as engine:
        batched = await all_replies(engine, turns)
    assert alone == tiny.replies
    assert batched == tiny.replies


def test_the_quick_check_of_a_reply_agrees_with_the_slow_one(tiny: Tiny) -> None:
    """`confirms`, which the real model's test relies on, accepts the reply and nothing else."""
    prompt, reply = tiny.prompts[10], tiny.replies[10]
    confirms = tiny.reference.confirms
    assert confirms(prompt, reply, NEW, ENDS)
    for place in range(len(reply)):
        other = [*reply[:place], (reply[place] + 1) % 512, *reply[place + 1 :]]
        assert not confirms(prompt, other, NEW, ENDS)
    assert not confirms(prompt, reply[:-1], NEW, ENDS)


async def test_shipped_kv_gives_the_same_tokens(tiny: Tiny) -> None:
    recipe = tiny.manifest.edge_recipe
    async with engine_of(tiny, FP32) as engine:
        expected_hits = []
        turns = []
        for index, prompt in enumerate(tiny.prompts):
            blocks = tiny.reference.blocks(prompt, recipe)
            assert await engine.offer_blocks(blocks) == len(blocks)
            assert engine.have_blocks([block.id for block in blocks]) == len(blocks)
            turns.append(tiny.turn(index, prompt_blocks=tuple(block.id for block in blocks)))
            expected_hits.append((len(prompt) - 1) // 64 * 64)
        results = await asyncio.gather(*(collect(engine, turn) for turn in turns))
    assert [tokens for tokens, _ in results] == tiny.replies
    assert [outputs[0].cached_tokens for _, outputs in results] == expected_hits


async def test_a_reply_goes_on_where_another_stopped(tiny: Tiny) -> None:
    async with engine_of(tiny, FP32) as engine:
        for made in (1, 5, 17):
            turns = [
                tiny.turn(i, made=tuple(reply[:made]))
                for i, reply in enumerate(tiny.replies)
                if len(reply) > made
            ]
            assert turns
            rest = await all_replies(engine, turns)
            whole = [[*turn.made, *tokens] for turn, tokens in zip(turns, rest, strict=True)]
            assert whole == [reply for reply in tiny.replies if len(reply) > made]


@pytest.mark.parametrize("ahead", [False, True])
async def test_small_chunks_and_a_small_pool_change_nothing(tiny: Tiny, ahead: bool) -> None:
    options = replace(
        FP32,
        ahead=ahead,
        step_tokens=64,
        mixed_tokens=64,
        max_batch=6,
        pool_bytes=1100 * 512,
        compiled=True,
    )
    turns = tiny.turns()
    async with engine_of(tiny, options) as engine:
        assert await all_replies(engine, turns) == tiny.replies


@pytest.mark.parametrize("ahead", [False, True])
async def test_preempted_turns_give_the_same_tokens(tiny: Tiny, ahead: bool) -> None:
    # Six turns that each need up to 25 pages share 66: some must give theirs back in mid-reply.
    turns = [
        tiny.turn(i, turn=f"long{i}", max_tokens=300, end_tokens=frozenset()) for i in range(9, 15)
    ]
    async with engine_of(tiny, FP32) as engine:
        expected = await all_replies(engine, turns)
        assert engine.preemptions == 0
    async with engine_of(tiny, replace(FP32, ahead=ahead, pool_bytes=1056 * 512)) as engine:
        assert await all_replies(engine, turns) == expected
        assert engine.preemptions > 0


async def test_sampling_depends_on_seed_and_index_alone(tiny: Tiny) -> None:
    def sampled(index: int, seed: int) -> EngineTurn:
        rule = Sampling(temperature=1.3, top_p=0.95, top_k=200, min_p=0.001, seed=seed)
        return tiny.turn(index, turn=f"s{index}-{seed}", sampling=rule)

    turns = [sampled(i % 6, seed) for i in range(6) for seed in (1, 2)]
    async with engine_of(tiny, FP32) as engine:
        alone = [(await collect(engine, turn))[0] for turn in turns]
        assert await all_replies(engine, turns) == alone
        assert alone[0] != alone[1], "the seed has no effect"
        handed = [
            replace(turn, made=tuple(reply[:3]))
            for turn, reply in zip(turns, alone, strict=True)
            if len(reply) > 3
        ]
        assert handed
        rest = await all_replies(engine, handed)
    longer = [reply for reply in alone if len(reply) > 3]
    assert [[*t.made, *r] for t, r in zip(handed, rest, strict=True)] == longer


async def test_a_follow_up_reuses_prompt_and_reply(tiny: Tiny) -> None:
    prompt, reply = tiny.prompts[12], tiny.replies[12]
    follow_up = (*prompt, *reply, 9, 8, 7)
    expected = tiny.reference.greedy(follow_up, NEW, ENDS)
    async with engine_of(tiny, FP32) as engine:
        await collect(engine, tiny.turn(12))
        tokens, outputs = await collect(engine, tiny.turn(12, turn="next", prompt=follow_up))
    assert tokens == expected
    assert outputs[0].cached_tokens == (len(prompt) + len(reply) - 1) // 64 * 64
    assert outputs[0].cached_tokens > 0


async def test_many_turns_at_once_all_end(tiny: Tiny) -> None:
    turns = [tiny.turn(i % 20, turn=f"many{i}", max_tokens=10) for i in range(200)]
    async with engine_of(tiny, replace(FP32, max_batch=32)) as engine:
        replies = await all_replies(engine, turns)
    assert replies == [tiny.replies[i % 20][:10] for i in range(200)]


async def test_bf16_decodes_and_stays_close(tiny: Tiny) -> None:
    """bfloat16 rounds; most first tokens still agree, and every reply has its full form."""
    turns = [tiny.turn(i, max_tokens=1, end_tokens=frozenset()) for i in range(20)]
    async with engine_of(tiny, replace(FP32, dtype="bf16")) as engine:
        firsts = await all_replies(engine, turns)
    expected = [tiny.reference.greedy(prompt, 1, frozenset()) for prompt in tiny.prompts]
    agreeing = sum(a == b for a, b in zip(firsts, expected, strict=True))
    assert agreeing >= 15
