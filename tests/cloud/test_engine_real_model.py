"""The built default model in float32: twenty prompts, token for token what Hugging Face makes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.chat.tokenizer import ChatTokenizer
from segue_contract.model.manifest import read_manifest
from tests.support.tiny_llama import HfReference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEW = 16
QUESTIONS = [
    "Plan a day in Paris.",
    "What is the capital of Peru?",
    "Write a haiku about rain.",
    "Explain recursion to a child.",
    "List five fruits.",
    "Why is the sky blue?",
    "Translate 'good morning' to French.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "Give me a name for a grey cat.",
    "Summarise the water cycle in two sentences.",
    "What is 17 times 3?",
    "Tell me a joke about bicycles.",
    "Describe the taste of a lemon.",
    "What should I pack for a week in Norway? " * 6,
    "Name three rivers in Africa. " * 12,
    "How does a refrigerator work? Be brief. " * 8,
    "I left my umbrella in the train. What can I do? " * 10,
    "Write one line of Python that reverses a list.",
    "Which planet is the largest, and how large is it?",
]


async def test_twenty_prompts_equal_hugging_face(model_dir: Path) -> None:
    manifest = read_manifest(model_dir)
    tokenizer = ChatTokenizer.load(model_dir, manifest)
    prompts = [tuple(tokenizer.encode_conversation([], question)) for question in QUESTIONS]
    ends = frozenset(manifest.end_tokens)
    reference = HfReference(model_dir, manifest)
    turns = [
        EngineTurn(turn=f"q{i}", prompt=prompt, max_tokens=NEW, end_tokens=ends)
        for i, prompt in enumerate(prompts)
    ]
    options = EngineOptions(dtype="fp32", pool_bytes=512 << 20, host_bytes=0)

    async def reply(engine: TorchEngine, turn: EngineTurn) -> tuple[list[int], int]:
        outputs = [output async for output in engine.submit(turn)]
        return [t for o in outputs for t in o.tokens], outputs[0].cached_tokens

    engine = await TorchEngine.load(model_dir, manifest, options)
    try:
        batched = await asyncio.gather(*(reply(engine, turn) for turn in turns))
    finally:
        await engine.close()
    expected = [tokens for tokens, _ in batched]
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert reference.confirms(prompt, tokens, NEW, ends)
    assert reference.greedy(prompts[0], 8, ends) == expected[0][:8]

    engine = await TorchEngine.load(model_dir, manifest, options)
    try:
        alone = [await reply(engine, turn) for turn in turns[::4]]
    finally:
        await engine.close()
    assert [tokens for tokens, _ in alone] == expected[::4]

    shipping, hits = [], []
    engine = await TorchEngine.load(model_dir, manifest, options)
    try:
        for turn in turns:
            blocks = reference.blocks(turn.prompt, manifest.edge_recipe)
            if blocks:
                assert await engine.offer_blocks(blocks) == len(blocks)
                ids = tuple(block.id for block in blocks)
                shipping.append(replace(turn, prompt_blocks=ids))
                hits.append((len(turn.prompt) - 1) // 64 * 64)
        shipped = await asyncio.gather(*(reply(engine, turn) for turn in shipping))
    finally:
        await engine.close()
    engine.check_integrity()
    assert len(shipping) > 3
    replies = {turn.turn: tokens for turn, tokens in zip(turns, expected, strict=True)}
    assert [tokens for tokens, _ in shipped] == [replies[turn.turn] for turn in shipping]
    assert [cached for _, cached in shipped] == hits
