"""Rows of the decode suite about KV memory: 200 sessions of 2,000 tokens in a pool that fits 60.

The sessions' KV is shipped (the same numbers under the right names: an engine does not look at
them), then a share of the sessions comes back with its next message. What is not in the pool any
more is brought back from the host tier or computed anew; both are timed in the same engine.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from segue_cloud.engine.options import EngineOptions, available_memory_bytes, choose_dtype
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.model.manifest import read_manifest
from tests.bench.harness import Report
from tests.bench.suites._prompts import random_prompts

SEED = 200
PAUSE_S = 0.05  # between two turns of anybody


async def memory_rows(report: Report, directory: Path, quick: bool) -> None:
    sessions, tokens, fitting, back = (20, 320, 6, 4) if quick else (200, 2000, 60, 40)
    manifest = read_manifest(directory)
    kv, options = manifest.geometry.kv, EngineOptions()
    itemsize = choose_dtype(options.dtype, options.device).itemsize
    token_bytes = 2 * kv.layers * kv.kv_heads * kv.head_dim * itemsize
    pool_bytes = fitting * (tokens + 64) * token_bytes
    host_bytes = min(6 << 30, max(0, available_memory_bytes() - 2 * pool_bytes) // 2)
    options = replace(options, pool_bytes=pool_bytes, host_bytes=host_bytes)
    prompts = random_prompts(sessions, tokens, manifest.geometry.vocab, seed=SEED)
    engine = await TorchEngine.load(directory, manifest, options)
    try:
        tier = engine.tier
        if tier is None:
            return  # the model's quality gate does not allow the code
        rng = np.random.default_rng(SEED)
        shape = (kv.layers, kv.kv_heads, 64, kv.head_dim)
        k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        recipe = manifest.edge_recipe.digest
        for prompt in prompts:
            blocks = [KvBlock(name, recipe, k, v) for name in block_ids(recipe, prompt)]
            await engine.offer_blocks(blocks)
        kept, reused, warm, used = tier.blocks_kept, [], [], []
        for number in random.Random(SEED).sample(range(sessions), back):
            began = time.perf_counter()
            cached = await _ask(engine, prompts[number])
            warm.append(time.perf_counter() - began)
            reused.append(cached / tokens)
            await asyncio.sleep(PAUSE_S)
            used.append(engine.pool.used_share)
        # The same length, never seen: what the others would cost without the tier.
        cold = []
        for prompt in random_prompts(1 if quick else 5, tokens, manifest.geometry.vocab, seed=1):
            began = time.perf_counter()
            await _ask(engine, prompt)
            cold.append(time.perf_counter() - began)
    finally:
        await engine.close()
    note = f"{sessions} sessions of {tokens} tokens, pool for {fitting}"
    report.row("memory_reuse_share", statistics.mean(reused), "", note=note)
    report.row(
        "memory_pool_used_share",
        statistics.mean(used),
        "",
        target=0.7,
        better="lower",
        note="mean, between turns",
    )
    report.row("memory_tier_blocks", float(kept), "blocks", note=f"{tier.bytes_kept >> 20} MiB")
    report.row("memory_keep_ms", tier.keep_s * 1000, "ms", note="a block of 64 tokens")
    report.row("memory_bring_ms", tier.bring_s * 1000, "ms", note="a block of 64 tokens")
    report.row("memory_first_token_warm_ms", statistics.median(warm) * 1000, "ms")
    report.row("memory_first_token_cold_ms", statistics.median(cold) * 1000, "ms")


async def _ask(engine: TorchEngine, prompt: tuple[int, ...]) -> int:
    turn = EngineTurn(turn="memory", prompt=prompt, max_tokens=1)
    return sum([output.cached_tokens async for output in engine.submit(turn)])
