"""The compiled step: near the exact model, and the same numbers in whatever company a row is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segue_cloud.engine.native.matrix_units import MatrixUnits
from segue_cloud.engine.native.pages import NativePages
from segue_cloud.engine.native.panels import interleaved, pack, pairs_of, reserve, size_of
from segue_cloud.engine.native.runner import NativeRunner, serves
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.step_input import NativeInput
from segue_cloud.engine.torch_engine import TorchEngine
from segue_cloud.engine.weights import open_tensors
from segue_contract.kv.layout import KvBlock, KvGeometry
from segue_contract.model.manifest import Manifest, ModelGeometry
from tests.support.tiny_llama import TINY, HfReference, build_tiny_llama

pytestmark = pytest.mark.skipif(not serves(TINY), reason="this CPU has no AVX512-BF16")

BF16 = EngineOptions(dtype="bf16", pool_bytes=32 << 20, threads=2, matrix_units=False)
SEED = 31
# Sizes that fill no panel, no tile and no page, in one group of 5.
ODD = ModelGeometry(
    layers=2,
    hidden=75,
    heads=5,
    kv_heads=1,
    head_dim=32,
    ffn=100,
    vocab=300,
    context=512,
    rope_base=10000.0,
    norm_eps=1e-5,
)
# Heads wider than a tile of values; a head of its own.
WIDE = ModelGeometry(
    layers=1,
    hidden=128,
    heads=2,
    kv_heads=2,
    head_dim=128,
    ffn=64,
    vocab=256,
    context=512,
    rope_base=10000.0,
    norm_eps=1e-5,
    tied_embeddings=False,
)
GEOMETRIES = {"tiny": TINY, "odd": ODD, "wide": WIDE}


def prompts_of(geometry: ModelGeometry, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    return [tuple(rng.randrange(4, geometry.vocab) for _ in range(size)) for size in sizes]


def logits_of(runner: NativeRunner, tokens: Sequence[int], cuts: Sequence[int]) -> np.ndarray:
    """Logits of all rows of one turn in pages 1, 2, ..., computed in chunks that end at `cuts`."""
    pages = 1 + np.arange(-(-len(tokens) // 16))
    runner._tables.array[0, : len(pages)] = pages
    made, start = [], 0
    for end in cuts:
        positions = np.arange(start, end, dtype=np.int64)
        spans, at = [], start
        while at < end:
            count = min(8 - at % 8, end - at)
            spans.append((at - start, 0, at + 1, count))
            at += count
        made.append(
            runner._model.step(
                NativeInput(
                    np.asarray(tokens[start:end], np.int64),
                    positions,
                    pages[positions // 16] * 16 + positions % 16,
                    np.array(spans, np.int32),
                    positions - start,
                )
            ).copy()
        )
        start = end
    return np.concatenate(made)


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_logits_are_near_the_exact_models_however_the_prompt_is_cut(
    name: str, tmp_path: Path
) -> None:
    geometry = GEOMETRIES[name]
    manifest = build_tiny_llama(tmp_path, geometry=geometry)
    (tokens,) = prompts_of(geometry, [90])
    with torch.inference_mode():
        exact = HfReference(tmp_path, manifest).model(torch.tensor([tokens])).logits[0].numpy()
    runner = NativeRunner(tmp_path, geometry, 16, BF16)
    try:
        runner.warm_up(2)
        whole = logits_of(runner, tokens, [90])
        # What an earlier turn left in the pages must not matter, not even NaN.
        runner.pages.bits[:] = 0x7FC0
        cut = logits_of(runner, tokens, [1, 2, 9, 40, 41, 73, 90])
    finally:
        runner.close()
    assert np.corrcoef(whole.ravel(), exact.ravel())[0, 1] > 0.999
    np.testing.assert_array_equal(whole, cut)


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_large_steps_through_matrix_units_say_the_same(name: str, tmp_path: Path) -> None:
    """The way that a CPU with AMX takes; oneDNN computes it on any other, too."""
    geometry = GEOMETRIES[name]
    build_tiny_llama(tmp_path, geometry=geometry)
    (tokens,) = prompts_of(geometry, [90])
    made = []
    for rows in (1000, 16):
        runner = NativeRunner(tmp_path, geometry, 16, BF16)
        with open_tensors(tmp_path, geometry, torch.bfloat16, "cpu") as tensors:
            runner._model._units = MatrixUnits(tensors.layers(), rows)
        try:
            runner.warm_up(2)
            made.append(logits_of(runner, tokens, [4, 60, 90]))
        finally:
            runner.close()
    tiles, units = made
    np.testing.assert_array_equal(units[:4], tiles[:4])  # few rows
    assert (units[4:] != tiles[4:]).any(), "both ways are the same one"
    assert np.corrcoef(units.ravel(), tiles.ravel())[0, 1] > 0.999


async def replies_of(
    directory: Path, manifest: Manifest, turns: Sequence[EngineTurn], options: EngineOptions
) -> tuple[list[list[int]], list[list[int]]]:
    """Of each turn alone, and of all at once in another engine."""

    async def reply(engine: TorchEngine, turn: EngineTurn) -> list[int]:
        return [token async for output in engine.submit(turn) for token in output.tokens]

    found = []
    for together in (False, True):
        engine = await TorchEngine.load(directory, manifest, options)
        try:
            if together:
                found.append(list(await asyncio.gather(*(reply(engine, turn) for turn in turns))))
            else:
                found.append([await reply(engine, turn) for turn in turns])
        finally:
            await engine.close()
        engine.check_integrity()
    return found[0], found[1]


def test_numbers_that_are_none_are_seen_in_the_logits(tmp_path: Path) -> None:
    """Bad weights or a bad shipped key must fail their turn, and no other."""
    build_tiny_llama(tmp_path)
    runner = NativeRunner(tmp_path, TINY, 16, BF16)
    good, bad = prompts_of(TINY, [40, 40])
    try:
        runner.warm_up(2)
        before = logits_of(runner, good, [40])
        runner.pages.bits[1, 0, 0, 1, 5] = 0x7FC0  # a key of the first page
        runner._tables.array[0, :3] = [1, 2, 3]
        one = np.array([32], np.int64)
        spans = np.array([[0, 0, 33, 1]], np.int32)
        step = NativeInput(np.array([bad[32]], np.int64), one, one + 16, spans, one * 0)
        assert np.isnan(runner._model.step(step)).any()
        np.testing.assert_array_equal(logits_of(runner, good, [40]), before)
    finally:
        runner.close()


@pytest.mark.parametrize("window", [0, 24])
async def test_a_reply_does_not_depend_on_its_company(tmp_path: Path, window: int) -> None:
    """bfloat16 rounds, but each row by itself: alone or among others, in one chunk or in many, by
    one thread or by three, a turn gets the same tokens."""
    manifest = build_tiny_llama(tmp_path)
    sizes = [1, 7, 16, 33, 64, 65, 130, 200, 300, 90]
    turns = [
        EngineTurn(turn=f"t{i}", prompt=prompt, max_tokens=40)
        for i, prompt in enumerate(prompts_of(TINY, sizes))
    ]
    options = replace(BF16, window=window, sinks=4)
    alone, together = await replies_of(tmp_path, manifest, turns, options)
    assert all(len(reply) == 40 for reply in alone)
    assert alone == together
    ahead, _ = await replies_of(tmp_path, manifest, turns, replace(options, ahead=True))
    assert ahead == alone
    small = replace(options, step_tokens=24, mixed_tokens=24, max_batch=4, threads=3)
    chunked, crowded = await replies_of(tmp_path, manifest, turns, small)
    assert chunked == alone
    assert crowded == alone


def test_blocks_come_out_as_they_went_in() -> None:
    geometry = KvGeometry(layers=2, kv_heads=3, head_dim=32)
    pages = NativePages(geometry, 8)
    rng = np.random.default_rng(SEED)
    shape = (2, 3, 64, 32)
    k, v = (
        torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).bfloat16().float().numpy()
        for _ in range(2)
    )
    pages.write_block([6, 1, 3, 0], KvBlock(bytes(16), "r", k, v))
    found_k, found_v = pages.read_block([6, 1, 3, 0])
    np.testing.assert_array_equal(found_k, k)
    np.testing.assert_array_equal(found_v, v)
    assert not pages.bits[:, :, :, [2, 4, 5, 7]].any()


def test_panels_hold_every_weight_once_and_zeros_beside() -> None:
    weight = torch.arange(1, 36 * 5 + 1).reshape(36, 5).bfloat16()
    numbers = reserve(size_of(36, 5), huge=True)
    pack(weight, numbers)
    panels = torch.from_numpy(numbers).view(torch.bfloat16).view(2, pairs_of(5), 32, 2)
    for output, line in enumerate(weight):
        found = panels[output // 32, :, output % 32].reshape(-1)
        assert torch.equal(found[:5], line)
        assert found[5] == 0
    assert torch.equal(panels[1, :, 4:], torch.zeros(3, 28, 2, dtype=torch.bfloat16))


def test_gate_and_up_lie_beside_each_other() -> None:
    gate, up = torch.full((20, 3), 1.0), torch.full((20, 3), 2.0)
    rows = interleaved(gate, up)[:, 0].tolist()
    assert rows == [1.0] * 16 + [2.0] * 16 + [1.0] * 4 + [0.0] * 12 + [2.0] * 4 + [0.0] * 12
