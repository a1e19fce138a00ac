"""The engine on a CUDA card: the same tokens as Hugging Face on the CPU, by captured steps; KV
through pinned memory; FlashInfer against torch. The same parts run in tests/cloud on the CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.util import find_spec

import msgspec
import numpy as np
import pytest
import torch

from segue_cloud.engine.attention import Window
from segue_cloud.engine.cuda.attention import GatherAttention, Rows
from segue_cloud.engine.cuda.flashinfer import FlashInferAttention
from segue_cloud.engine.cuda.host_tier import PinnedTier
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.cuda.runner import DeviceRunner
from segue_cloud.engine.cuda.sampling import pick
from segue_cloud.engine.cuda.shapes import Shape
from segue_cloud.engine.cuda.transfers import CudaTransfers
from segue_cloud.engine.devices import count_pages
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.kv.layout import KvBlock
from segue_contract.limits import STAGED_BLOCKS
from tests.support.tiny_engine import Tiny, engine_with, make_tiny, replies_of
from tests.support.tiny_llama import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SEED = 4
SIZES = [1, 16, 64, 130, 300, 33]
FP32 = EngineOptions(dtype="fp32", device="cuda", max_batch=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), SIZES, new=24, seed=SEED)


@pytest.mark.parametrize("ahead", [False, True])
async def test_captured_steps_give_the_same_tokens(tiny: Tiny, ahead: bool) -> None:
    async with engine_with(DeviceRunner, tiny, replace(FP32, ahead=ahead)) as (engine, runner):
        alone = [(await replies_of(engine, [turn]))[0] for turn in tiny.turns()]
        assert runner.replayed_steps > runner.eager_steps > 0
        assert await replies_of(engine, tiny.turns()) == tiny.replies
    assert alone == tiny.replies


async def test_without_graphs_the_same(tiny: Tiny) -> None:
    options = replace(FP32, graphs=False, step_tokens=64, mixed_tokens=64)
    async with engine_with(DeviceRunner, tiny, options) as (engine, runner):
        assert await replies_of(engine, tiny.turns()) == tiny.replies
        assert runner.replayed_steps == 0


async def test_preempted_turns_give_the_same_tokens(tiny: Tiny) -> None:
    turns = tiny.turns(max_tokens=150, end_tokens=frozenset())
    async with engine_with(DeviceRunner, tiny, FP32) as (engine, _):
        expected = await replies_of(engine, turns)
    async with engine_with(DeviceRunner, tiny, FP32, pages=64) as (engine, _):
        assert await replies_of(engine, turns) == expected
        assert engine.preemptions > 0


async def test_load_finds_the_pages_that_the_card_has_room_for(tiny: Tiny) -> None:
    geometry = tiny.manifest.geometry
    assert count_pages(EngineOptions(device="cuda"), geometry) > 10_000
    engine = await TorchEngine.load(
        tiny.directory, tiny.manifest, replace(FP32, pool_bytes=8 << 20)
    )
    try:
        assert await replies_of(engine, tiny.turns()[:2]) == tiny.replies[:2]
    finally:
        await engine.close()


async def test_evicted_blocks_come_back_from_pinned_memory(tiny: Tiny) -> None:
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    prompts = [tuple(rng.randrange(4, 512) for _ in range(260)) for _ in range(12)]
    turns = [EngineTurn(turn=f"e{i}", prompt=p, max_tokens=4) for i, p in enumerate(prompts)]
    async with engine_with(DeviceRunner, tiny, replace(FP32, host_bytes=64 << 20), pages=80) as (
        engine,
        _,
    ):
        tier = engine.tier
        assert isinstance(tier, PinnedTier)
        tier.recompute_s = lambda: 0.0
        for turn in turns:
            await replies_of(engine, [turn])
        again = [replace(turn, turn=turn.turn + "again") for turn in turns]
        for turn in again:
            (reply,) = await replies_of(engine, [turn])
            assert len(reply) == 4
        assert tier.brought_blocks > 0


def test_blocks_go_to_the_host_and_back_bit_by_bit() -> None:
    memory = DevicePages(TINY.kv, 16, torch.float32, "cuda", CudaTransfers("cuda"))
    shape = (TINY.layers, TINY.kv_heads, 64, TINY.head_dim)
    rng = np.random.default_rng(SEED)
    print("kv seed", SEED)
    blocks = [rng.standard_normal((2, *shape)).astype(np.float32) for _ in range(40)]
    for number, block in enumerate(blocks):  # more than there are buffers
        pages = [4 * (number % 4) + i for i in range(4)]
        memory.write_block(pages, KvBlock(b"b", "", block[0], block[1]))
        pending = memory.start_read(pages)
        assert pending is not None
        zero = np.zeros(shape, np.float32)
        memory.write_block(pages, KvBlock(b"z", "", zero, zero))  # at once: the copy came first
        k, v = pending.arrays()
        assert np.array_equal(k, block[0])
        assert np.array_equal(v, block[1])
        memory.give_back(pending)
    assert len([memory.start_read([0, 1, 2, 3]) for _ in range(STAGED_BLOCKS)]) == STAGED_BLOCKS
    assert memory.start_read([0, 1, 2, 3]) is None


def test_the_first_of_equal_logits_wins_on_the_card_too() -> None:
    logits = torch.zeros(3, 128_256, device="cuda")
    logits[1, [90_000, 400]] = 1.0
    logits[2, 7] = torch.nan
    assert pick(logits).tolist() == [0, 400, -1]


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="pip install 'segue[cloud-gpu]'")
@pytest.mark.parametrize("kv_heads", [3, 8], ids=["group 3", "group 4"])
@pytest.mark.parametrize("static", [False, True])
def test_flashinfer_sees_our_pages_as_torch_does(kv_heads: int, static: bool) -> None:
    heads = kv_heads * (3 if kv_heads == 3 else 4)
    geometry = msgspec.structs.replace(TINY, heads=heads, kv_heads=kv_heads, head_dim=64)
    memory = DevicePages(geometry.kv, 300, torch.bfloat16, "cuda", CudaTransfers("cuda"))
    print("kv seed", SEED)
    torch.manual_seed(SEED)
    for cache in (*memory.k, *memory.v):
        cache.normal_()
    rng = np.random.default_rng(SEED)
    lengths = np.array([1, 16, 17, 100, 640, 33, 2, 512], np.int64)
    tables = np.stack([rng.permutation(300)[:40] for _ in lengths]).astype(np.int32)
    rows = Rows(tables, lengths)
    shape = Shape(8, 40) if static else None
    q = torch.randn(8, heads, 64, dtype=torch.bfloat16, device="cuda")
    found = []
    for attention in (
        FlashInferAttention(geometry, memory),
        GatherAttention(geometry, memory, memory.scratch_page * 16, Window()),
    ):
        attention.shapes((8,), 40)
        attention.plan(rows, shape)
        attention.start()
        out = torch.empty_like(q)
        attention.attend(q, 1, out)
        found.append(out.float())
    assert torch.allclose(found[0], found[1], atol=2e-2, rtol=2e-2)
