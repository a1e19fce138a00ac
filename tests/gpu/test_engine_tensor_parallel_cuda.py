"""One model over two CUDA devices and NCCL: the same tokens as Hugging Face on the CPU."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.errors import InvalidArgument
from tests.support.tiny_llama import HfReference, build_tiny_llama

OPTIONS = EngineOptions(dtype="fp32", device="cuda", pool_bytes=32 << 20, tensor_parallel=2)
SEED = 6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
async def test_two_devices_give_the_tokens_of_the_cpu(tmp_path: Path) -> None:
    manifest = build_tiny_llama(tmp_path)
    reference = HfReference(tmp_path, manifest)
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    prompts = [tuple(rng.randrange(4, 512) for _ in range(n)) for n in (1, 16, 64, 130, 300)]
    engine = await TorchEngine.load(tmp_path, manifest, OPTIONS)

    async def reply(index: int) -> list[int]:
        turn = EngineTurn(turn=f"t{index}", prompt=prompts[index], max_tokens=24)
        if index == 3:
            blocks = reference.blocks(prompts[index], manifest.edge_recipe)
            assert await engine.offer_blocks(blocks) == len(blocks)
            turn = replace(turn, prompt_blocks=tuple(block.id for block in blocks))
        return [token async for output in engine.submit(turn) for token in output.tokens]

    try:
        replies = await asyncio.gather(*(reply(i) for i in range(len(prompts))))
    finally:
        await engine.close()
    assert replies == [reference.greedy(prompt, 24, frozenset()) for prompt in prompts]


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="two CUDA devices are here")
async def test_too_few_devices_are_named(tmp_path: Path) -> None:
    manifest = build_tiny_llama(tmp_path)
    with pytest.raises(InvalidArgument, match="2 ranks need 2 CUDA devices"):
        await TorchEngine.load(tmp_path, manifest, OPTIONS)
