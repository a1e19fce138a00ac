"""A sliding window with sinks gives the tokens that a masked reference gives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from segue_cloud.engine.attention import Window
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.runner import Runner
from segue_cloud.engine.torch_engine import TorchEngine, own_recipe
from segue_contract.errors import InvalidArgument, PromptTooLong
from segue_contract.model.manifest import Manifest
from tests.support.tiny_llama import TINY, HfReference, build_tiny_llama

SEED, NEW = 31, 24
SIZES = [3, 10, 39, 40, 41, 64, 100, 130, 300]
OPTIONS = EngineOptions(dtype="fp32", pool_bytes=8 << 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, build_tiny_llama(directory)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    return [tuple(rng.randrange(4, 512) for _ in range(size)) for size in SIZES]


async def replies(
    model: tuple[Path, Manifest], prompts: Sequence[tuple[int, ...]], options: EngineOptions
) -> list[list[int]]:
    engine = await TorchEngine.load(*model, options)

    async def one(index: int) -> list[int]:
        turn = EngineTurn(turn=f"t{index}", prompt=prompts[index], max_tokens=NEW)
        return [token async for output in engine.submit(turn) for token in output.tokens]

    try:
        return list(await asyncio.gather(*(one(index) for index in range(len(prompts)))))
    finally:
        await engine.close()
        engine.check_integrity()


async def engine_of_pages(
    model: tuple[Path, Manifest], options: EngineOptions, pages: int
) -> TorchEngine:
    """An engine with a pool smaller than operators may choose."""
    directory, manifest = model
    build = partial(Runner, directory, manifest.geometry, pages, options)
    engine = TorchEngine(manifest, options, pages, build)
    await engine.start()
    return engine


@torch.inference_mode()
def masked_greedy(model: Any, prompt: Sequence[int], window: int, sinks: int) -> list[int]:
    """Hugging Face's Llama over the whole text for every token, its mask written out."""
    tokens = list(prompt)
    for _ in range(NEW):
        size = len(tokens)
        mask = torch.full((1, 1, size, size), float("-inf"))
        for at in range(size):
            for key in range(at + 1):
                if key < sinks or at - key < window:
                    mask[0, 0, at, key] = 0.0
        tokens.append(
            int(model(torch.tensor([tokens]), attention_mask=mask).logits[0, -1].argmax())
        )
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("window", "sinks"), [(40, 4), (33, 20)])
async def test_window_and_sinks_equal_a_masked_reference(
    model: tuple[Path, Manifest], prompts: list[tuple[int, ...]], window: int, sinks: int
) -> None:
    reference = HfReference(*model).model
    short = [prompt for prompt in prompts if len(prompt) <= 130]
    expected = [masked_greedy(reference, prompt, window, sinks) for prompt in short]
    options = replace(OPTIONS, window=window, sinks=sinks)
    assert await replies(model, short, options) == expected
    assert await replies(model, short, replace(options, compiled=False)) == expected
    chunks = replace(options, step_tokens=64, mixed_tokens=64, max_batch=3)
    assert await replies(model, short, chunks) == expected
    assert await replies(model, short, OPTIONS) != expected, "the window has no effect"


async def test_a_window_without_sinks_is_that_of_mistral(
    model: tuple[Path, Manifest], prompts: list[tuple[int, ...]]
) -> None:
    llama = HfReference(*model).model
    values = llama.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    config = MistralConfig(
        **{name: values[name] for name in (*names, "rms_norm_eps", "rope_parameters")},
        tie_word_embeddings=True,
        sliding_window=50,
    )
    mistral = MistralForCausalLM(config).eval()
    mistral.load_state_dict(llama.state_dict())
    with torch.inference_mode():
        expected = []
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(NEW):
                logits = mistral(torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
            expected.append(tokens[len(prompt) :])
    assert await replies(model, prompts, replace(OPTIONS, window=50, sinks=0)) == expected
    # A model that says so itself gets the same, under the recipe that its edges have.
    directory, manifest = model
    geometry = msgspec.structs.replace(manifest.geometry, sliding_window=50)
    own = msgspec.structs.replace(manifest, geometry=geometry)
    assert await replies((directory, own), prompts, OPTIONS) == expected


async def test_a_long_windowed_turn_in_a_small_pool(model: tuple[Path, Manifest]) -> None:
    """What the window has passed is given back: 624 tokens in a pool that holds 240."""
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    prompt = tuple(rng.randrange(4, 512) for _ in range(600))
    options = replace(OPTIONS, window=64, sinks=4, step_tokens=32, mixed_tokens=32)
    expected = await replies(model, [prompt], options)
    engine = await engine_of_pages(model, options, 15)
    try:
        turn = EngineTurn(turn="long", prompt=prompt, max_tokens=NEW)
        reply = [token async for output in engine.submit(turn) for token in output.tokens]
        assert reply == expected[0]
    finally:
        await engine.close()
    engine.check_integrity()
    whole = await engine_of_pages(model, replace(options, window=0), 15)
    try:
        with pytest.raises(PromptTooLong, match="pool"):
            whole.submit(turn)
    finally:
        await whole.close()


def test_what_a_token_does_not_see() -> None:
    hidden = Window(3, 1).hidden(torch.tensor([5]), torch.arange(7))[0]
    assert hidden.tolist() == [False, True, True, False, False, False, True]
    assert Window(3, 1).keys(5, 7).tolist() == [0, 3, 4, 5, 6]
    assert Window(3, 3).keys(5, 7).tolist() == list(range(7))
    assert Window().hidden(torch.tensor([1]), torch.arange(3))[0].tolist() == [False, False, True]


def test_kv_under_a_window_has_a_recipe_of_its_own(model: tuple[Path, Manifest]) -> None:
    full = own_recipe(model[1], torch.float32)
    assert own_recipe(model[1], torch.float32, ",window=40+4").digest != full.digest


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="window"):
        EngineOptions(window=-1)
    assert TINY.context > max(SIZES) + NEW
