"""The engine's plain form on a CUDA device: the same tokens as Hugging Face on the CPU."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.worker import TorchEngine
from tests.support.tiny_llama import HfReference, build_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SEED = 4


async def test_the_same_tokens_as_on_the_cpu(tmp_path: Path) -> None:
    manifest = build_tiny_llama(tmp_path)
    reference = HfReference(tmp_path, manifest)
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    prompts = [tuple(rng.randrange(4, 512) for _ in range(n)) for n in (1, 16, 64, 130, 300)]
    engine = await TorchEngine.load(
        tmp_path, manifest, EngineOptions(dtype="fp32", device="cuda", pool_bytes=32 << 20)
    )

    async def reply(index: int) -> list[int]:
        turn = EngineTurn(turn=f"t{index}", prompt=prompts[index], max_tokens=24)
        return [token async for output in engine.submit(turn) for token in output.tokens]

    try:
        replies = await asyncio.gather(*(reply(i) for i in range(len(prompts))))
    finally:
        await engine.close()
    assert replies == [reference.greedy(prompt, 24, frozenset()) for prompt in prompts]
