"""KV memory: prefixes shared by sessions, blocks that leave the pool and come back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.host_tier import TARGET_SHARE, HostTier
from segue_cloud.engine.kv_pages import KvPages
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.errors import InvalidArgument
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.model.manifest import Manifest
from tests.support.tiny_llama import TINY, HfReference, build_tiny_llama

SEED = 8
PROMPT = 300  # tokens: four full blocks and a bit
OPTIONS = EngineOptions(dtype="fp32", pool_bytes=1100 * 512, host_bytes=64 << 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, build_tiny_llama(directory)


def prompts(count: int) -> list[tuple[int, ...]]:
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    return [tuple(rng.randrange(4, 512) for _ in range(PROMPT)) for _ in range(count)]


async def ask(engine: TorchEngine, prompt: Sequence[int], new: int = 8) -> tuple[list[int], int]:
    """The reply, and how many of the prompt's tokens were not computed."""
    tokens, cached = [], 0
    async for output in engine.submit(EngineTurn("t", tuple(prompt), max_tokens=new)):
        tokens += output.tokens
        cached += output.cached_tokens
    return tokens, cached


async def test_sessions_share_a_common_prefix(model: tuple[Path, Manifest]) -> None:
    common, *tails = prompts(4)
    reference = HfReference(*model)
    engine = await TorchEngine.load(*model, replace(OPTIONS, pool_bytes=8 << 20, host_bytes=0))
    try:
        for number, tail in enumerate(tails):
            prompt = common + tail[:20]
            tokens, cached = await ask(engine, prompt)
            assert tokens == reference.greedy(prompt, 8, frozenset())
            assert cached == (256 if number else 0)
        # The prefix lies in the pool once, whoever asked.
        assert engine.pool.blocks_cached == 4 + len(tails)
    finally:
        await engine.close()
    engine.check_integrity()


async def test_what_the_pool_gave_up_comes_back(model: tuple[Path, Manifest]) -> None:
    many = prompts(20)  # five times what the pool holds
    engine = await TorchEngine.load(*model, OPTIONS)
    try:
        first = [await ask(engine, prompt) for prompt in many]
        assert [cached for _, cached in first] == [0] * len(many)
        tier = engine.tier
        assert tier is not None
        assert engine.pool.evicted_blocks > 0
        assert tier.blocks_kept > 0
        # Whatever this machine measured: this is about what comes back, not about when it pays.
        tier.recompute_s = lambda: 0.0
        again = [await ask(engine, prompt) for prompt in many]
        assert tier.brought_blocks > 0
        assert all(cached == 256 for _, cached in again)
        same = sum(a[0] == b[0] for (a, _), (b, _) in zip(first, again, strict=True))
        assert same >= 0.8 * len(many), "8-bit KV changes few first tokens"
        assert engine.pool.used_share <= TARGET_SHARE + 0.1
    finally:
        await engine.close()
    engine.check_integrity()


async def test_blocks_that_the_tier_holds_need_not_be_shipped(
    model: tuple[Path, Manifest],
) -> None:
    many = prompts(20)
    engine = await TorchEngine.load(*model, OPTIONS)
    try:
        for prompt in many:
            await ask(engine, prompt)
        tier = engine.tier
        assert tier is not None
        tier.recompute_s = lambda: 0.0
        names = block_ids(model[1].edge_recipe.digest, many[0])
        assert engine.pool.resolve(names[0]) is None
        assert engine.have_blocks(names) == 4
    finally:
        await engine.close()


def tier_of(blocks: int, recompute_s: float, pages: int = 64) -> tuple[HostTier, BlockPool]:
    """A tier with room for `blocks` blocks, and the pool in front of it."""
    memory = KvPages(TINY.kv, pages, torch.float32, "cpu")
    for layer in range(TINY.layers):
        memory.k[layer].normal_()
        memory.v[layer].normal_()
    probe = HostTier(memory, 1 << 30, lambda: recompute_s)
    probe.keep(b"probe", range(PAGES_PER_BLOCK), 0)
    tier = HostTier(memory, probe.bytes_kept * blocks, lambda: recompute_s)
    return tier, BlockPool(pages, tier)


def cache(pool: BlockPool, name: bytes) -> tuple[int, ...]:
    pages = pool.allocate(PAGES_PER_BLOCK)
    assert pages is not None
    pool.enter(name, pages, refs=0, kept_as=name)
    return tuple(pages)


def test_a_block_comes_back_nearly_as_it_was() -> None:
    tier, pool = tier_of(8, 0.0)
    pages = cache(pool, b"a")
    before = tier.pages.read_block(pages)
    pool.target = 0.0
    assert pool.relieve(1) == 1
    assert pool.resolve(b"a") is None
    other = pool.allocate(PAGES_PER_BLOCK)
    assert other is not None
    blank = np.zeros((TINY.layers, TINY.kv_heads, 64, TINY.head_dim), np.float32)
    tier.pages.write_block(other, KvBlock(b"z", "", blank, blank))
    pool.bring(b"a", other)
    assert pool.resolve(b"a") == b"a"
    for was, now in zip(before, tier.pages.read_block(other), strict=True):
        assert 0 < np.abs(was - now).max() < 0.03 * np.abs(was).max()
    pool.check_integrity()


def test_the_budget_holds_and_used_blocks_outlive_others() -> None:
    tier, pool = tier_of(3, 0.0)
    cache(pool, b"used")
    pool.acquire(b"used")
    pool.release(b"used")
    for number in range(5):
        cache(pool, b"%d" % number)
    pool.target = 0.0
    pool.relieve(100)
    tier.check_integrity()
    assert tier.blocks_kept == 3
    assert tier.dropped_blocks == 3
    assert tier.offers(b"used")
    assert not tier.offers(b"0")


def test_what_takes_longer_than_computing_is_computed() -> None:
    tier, pool = tier_of(8, 1e-9)
    cache(pool, b"a")
    pool.target = 0.0
    pool.relieve(1)
    assert tier.offers(b"a"), "nothing is measured yet"
    pages = pool.allocate(PAGES_PER_BLOCK)
    assert pages is not None
    pool.bring(b"a", pages)
    answers = [tier.offers(b"a") for _ in range(300)]
    assert not any(answers[:200])
    assert any(answers), "it is measured again now and then"


def test_the_target_is_kept_by_small_steps() -> None:
    tier, pool = tier_of(64, 0.0, pages=40)
    for number in range(10):
        cache(pool, b"%d" % number)
    assert pool.used_share == 1.0
    pool.target = 0.7
    assert pool.relieve(2) == 2
    assert pool.relieve(100) == 1
    assert pool.used_share == pytest.approx(0.7)
    assert pool.relieve(100) == 0
    assert tier.blocks_kept == 3


def test_one_ahead_and_a_host_tier_exclude_each_other() -> None:
    with pytest.raises(InvalidArgument, match="exclude"):
        EngineOptions(ahead=True, host_bytes=1)
