"""One model over several processes gives the tokens of one process, whatever it computes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.tensor_parallel.lead import LeadRunner
from segue_cloud.engine.tensor_parallel.ranks import Ranks
from segue_cloud.engine.tensor_parallel.split import split
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.chat.tokenizer import ChatTokenizer
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.limits import EngineLimits
from segue_contract.model.manifest import read_manifest
from segue_contract.sync.ops import Sampling
from tests.support.tiny_engine import ENDS, Tiny
from tests.support.tiny_llama import TINY, HfReference
from tests.support.tiny_ranks import (
    FP32,
    NEW,
    SEED,
    SIZES,
    UNEVEN,
    all_replies,
    collect,
    engine_of,
    tiny_with_replies,
)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_with_replies(tmp_path_factory.mktemp("uneven"), UNEVEN)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(uneven: Tiny) -> AsyncIterator[dict[int, TorchEngine]]:
    """By their number of ranks. A rank takes seconds to start, so tests share them: who looks at
    what is cached asks what nobody asked before."""
    async with engine_of(uneven, 2) as two, engine_of(uneven, 3) as three:
        yield {2: two, 3: three}


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_with_replies(tmp_path_factory.mktemp("even"), TINY)


# -- the same tokens ------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
async def test_alone_batched_and_sampled_equal_one_rank(
    uneven: Tiny, engines: dict[int, TorchEngine]
) -> None:
    rule = Sampling(temperature=1.3, top_p=0.95, top_k=200, seed=5)
    sampled = [uneven.turn(i, turn=f"s{i}", sampling=rule) for i in range(4)]
    async with engine_of(uneven, 1) as engine:
        assert await all_replies(engine, uneven.turns()) == uneven.replies
        expected = await all_replies(engine, sampled)
    for engine in engines.values():
        alone = [(await collect(engine, turn))[0] for turn in uneven.turns()[:4]]
        assert alone == uneven.replies[:4]
        assert await all_replies(engine, [*uneven.turns(), *sampled]) == [
            *uneven.replies,
            *expected,
        ]


@pytest.mark.parametrize(
    "changes",
    [{}, {"ahead": True, "step_tokens": 64, "mixed_tokens": 64, "max_batch": 4}],
    ids=["all", "ahead-in-small-chunks"],
)
async def test_plain_torch_over_an_even_split(even: Tiny, changes: dict[str, object]) -> None:
    async with engine_of(even, 2, compiled=False, **changes) as engine:
        assert await all_replies(engine, even.turns()) == even.replies


async def test_a_window_hides_the_same_tokens_on_every_rank(uneven: Tiny) -> None:
    replies = []
    for ranks in (1, 2):
        async with engine_of(uneven, ranks, window=48, sinks=2, step_tokens=96) as engine:
            replies.append(await all_replies(engine, uneven.turns()))
    assert replies[0] == replies[1]
    assert replies[0] != uneven.replies, "the window has no effect"


@pytest.mark.asyncio(loop_scope="module")
async def test_shipped_blocks_reach_every_rank(
    uneven: Tiny, engines: dict[int, TorchEngine]
) -> None:
    asked = uneven.asked(SIZES, SEED + 2)
    recipe = asked.manifest.edge_recipe
    turns, hits = [], []
    for index, prompt in enumerate(asked.prompts):
        blocks = asked.reference.blocks(prompt, recipe)
        assert await engines[2].offer_blocks(blocks) == len(blocks)
        turns.append(asked.turn(index, prompt_blocks=tuple(block.id for block in blocks)))
        hits.append((len(prompt) - 1) // 64 * 64)
    results = await asyncio.gather(*(collect(engines[2], turn) for turn in turns))
    assert [tokens for tokens, _ in results] == asked.replies
    assert [outputs[0].cached_tokens for _, outputs in results] == hits


@pytest.mark.asyncio(loop_scope="module")
async def test_wrong_shipped_numbers_are_really_used(
    uneven: Tiny, engines: dict[int, TorchEngine]
) -> None:
    """What the test above relies on: each rank attends over what was shipped to it."""
    asked = uneven.asked([200, 300, 410], SEED + 3)
    for head, prompt in enumerate(asked.prompts):
        blocks = asked.reference.blocks(prompt, asked.manifest.edge_recipe)
        for block in blocks:
            spoilt = block.v.copy()
            spoilt[:, head] *= -3.0
            await engines[3].offer_blocks([replace(block, v=spoilt)])
        turn = asked.turn(head, prompt_blocks=tuple(block.id for block in blocks))
        tokens, outputs = await collect(engines[3], turn)
        assert outputs[0].cached_tokens == (len(prompt) - 1) // 64 * 64
        assert tokens != asked.replies[head]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_follow_up_reuses_prompt_and_reply(
    uneven: Tiny, engines: dict[int, TorchEngine]
) -> None:
    prompt, reply = uneven.prompts[9], uneven.replies[9]
    follow_up = (*prompt, *reply, 9, 8, 7)
    expected = uneven.reference.greedy(follow_up, NEW, ENDS)
    await collect(engines[2], uneven.turn(9))
    tokens, outputs = await collect(engines[2], uneven.turn(9, turn="next", prompt=follow_up))
    assert tokens == expected
    assert outputs[0].cached_tokens == (len(prompt) + len(reply) - 1) // 64 * 64 > 0


async def test_blocks_come_back_from_the_host_tier(uneven: Tiny) -> None:
    rng = random.Random(SEED + 1)
    prompts = [tuple(rng.randrange(4, 512) for _ in range(300)) for _ in range(16)]
    turns = [EngineTurn(f"h{i}", prompt, max_tokens=8) for i, prompt in enumerate(prompts)]
    # A pool of some 1,200 tokens: a quarter of what is asked for. All that leaves it is kept,
    # however slow this machine is just now.
    limits = EngineLimits(coding_share=1e6, coding_saved_up_s=1e6)
    small = {"pool_bytes": 1200 * 768, "host_bytes": 32 << 20, "limits": limits}
    replies = []
    for ranks in (1, 2):
        async with engine_of(uneven, ranks, **small) as engine:
            first = await asyncio.gather(*(collect(engine, turn) for turn in turns))
            tier = engine.tier
            assert tier is not None
            tier.recompute_s = lambda: 0.0  # about what comes back, not about when it pays
            again = [await collect(engine, turn) for turn in turns]
            assert tier.brought_blocks > 0
            assert all(outputs[0].cached_tokens == 256 for _, outputs in again)
        replies.append([tokens for tokens, _ in [*first, *again]])
    assert replies[0] == replies[1]


async def test_a_block_is_read_as_it_was_written(uneven: Tiny) -> None:
    g = UNEVEN.kv
    numbers = np.random.default_rng(SEED)
    shape = (2, 2, g.layers, g.kv_heads, 64, g.head_dim)
    (k, v), (k2, v2) = numbers.standard_normal(shape, np.float32)
    options = replace(FP32, tensor_parallel=2, compiled=False)
    shards = split(UNEVEN, 2)
    ranks = await Ranks.start(2, "cpu")
    try:
        lead = LeadRunner(
            uneven.directory,
            UNEVEN,
            64,
            options,
            shards=shards,
            ranks=ranks,
        )
        lead.warm_up(1)
        lead.write_block([9, 3, 20, 7], KvBlock(b"a", "", k, v))
        lead.write_block([1, 2, 4, 40], KvBlock(b"b", "", k2, v2))
        for pages, expected in (([9, 3, 20, 7], (k, v)), ([1, 2, 4, 40], (k2, v2))):
            read = lead.pages.read_block(pages)
            assert np.array_equal(read[0], expected[0])
            assert np.array_equal(read[1], expected[1])
    finally:
        await ranks.stop()


# -- the default model ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_default_model_over_two_ranks(model_dir: Path) -> None:
    new = 8  # the model's shapes are what is new here: a step of it costs a tenth of a second
    manifest = read_manifest(model_dir)
    tokenizer = ChatTokenizer.load(model_dir, manifest)
    questions = ["Plan a day in Paris.", "Who wrote Hamlet?", "Name three rivers. " * 20]
    prompts = [tuple(tokenizer.encode_conversation([], question)) for question in questions]
    ends = frozenset(manifest.end_tokens)
    reference = HfReference(model_dir, manifest)
    blocks = reference.blocks(prompts[2], manifest.edge_recipe)
    assert [block.id for block in blocks] == block_ids(manifest.edge_recipe.digest, prompts[2])
    options = EngineOptions(dtype="fp32", pool_bytes=256 << 20, tensor_parallel=2)
    engine = await TorchEngine.load(model_dir, manifest, options)
    try:
        assert await engine.offer_blocks(blocks) == len(blocks) > 0
        shipped = tuple(block.id for block in blocks)
        turns = [
            EngineTurn(
                turn=f"q{i}",
                prompt=prompt,
                max_tokens=new,
                end_tokens=ends,
                prompt_blocks=shipped if i == 2 else (),
            )
            for i, prompt in enumerate(prompts)
        ]
        replies = await all_replies(engine, turns)
    finally:
        await engine.close()
    engine.check_integrity()
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reference.confirms(prompt, reply, new, ends)
