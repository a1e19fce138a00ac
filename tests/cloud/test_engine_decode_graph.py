"""The engine's parts for a card, on the CPU: the same tokens as Hugging Face and the plain engine,
through the same static buffers and padding that a captured step is replayed on."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from segue_cloud.engine.attention import TorchOps, Window
from segue_cloud.engine.cuda.attention import GatherAttention, Rows
from segue_cloud.engine.cuda.decode_graph import Capture, pad
from segue_cloud.engine.cuda.flashinfer import page_index, why_not
from segue_cloud.engine.cuda.ops import DeviceOps
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.cuda.runner import DeviceRunner
from segue_cloud.engine.cuda.sampling import choose_tokens, pick
from segue_cloud.engine.cuda.shapes import Shape, row_buckets, smallest
from segue_cloud.engine.cuda.transfers import DirectTransfers
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.runner import Runner
from segue_cloud.engine.sampler import sample_rows
from segue_cloud.engine.step_input import StepInput
from segue_contract.sync.ops import Sampling
from tests.support.recorded_capture import RecordedCapture
from tests.support.tiny_engine import Tiny, engine_with, make_tiny, replies_of
from tests.support.tiny_llama import TINY

SEED = 31
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 130, 200, 410, 33]
FP32 = EngineOptions(dtype="fp32", max_batch=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), SIZES, new=30, seed=SEED)


@pytest.mark.parametrize("ahead", [False, True])
async def test_replayed_steps_give_the_same_tokens(tiny: Tiny, ahead: bool) -> None:
    async with engine_with(DeviceRunner, tiny, replace(FP32, ahead=ahead)) as (engine, runner):
        assert isinstance(runner, DeviceRunner)
        alone = [(await replies_of(engine, [turn]))[0] for turn in tiny.turns()]
        assert runner.replayed_steps > runner.eager_steps > 0
        batched = await replies_of(engine, tiny.turns())
    assert alone == tiny.replies
    assert batched == tiny.replies


class RecordedRunner(DeviceRunner):
    """What is captured is repeated operation by operation, as a card repeats a graph: nothing of
    the program runs again, so whatever a step's Python decided would stay as it was."""

    def _make_capture(self, options: EngineOptions) -> Capture:
        return RecordedCapture()


@pytest.mark.parametrize("window", [0, 50])
async def test_what_is_captured_depends_on_the_buffers_alone(tiny: Tiny, window: int) -> None:
    options = replace(FP32, window=window)
    async with engine_with(Runner, tiny, options) as (engine, _):
        expected = await replies_of(engine, tiny.turns())
    async with engine_with(RecordedRunner, tiny, options) as (engine, runner):
        assert isinstance(runner, RecordedRunner)
        assert await replies_of(engine, tiny.turns()) == expected
        assert runner.replayed_steps > 0


async def test_without_graphs_every_step_is_eager_and_the_same(tiny: Tiny) -> None:
    options = replace(FP32, graphs=False, step_tokens=64, mixed_tokens=64)
    async with engine_with(DeviceRunner, tiny, options) as (engine, runner):
        assert await replies_of(engine, tiny.turns()) == tiny.replies
        assert isinstance(runner, DeviceRunner)
        assert runner.replayed_steps == 0


async def test_preempted_and_cancelled_turns_leave_nothing_behind(tiny: Tiny) -> None:
    """Rows come and go, pages change hands: what a shape's buffers held before must not show."""
    turns = tiny.turns(max_tokens=100, end_tokens=frozenset())[4:]
    async with engine_with(DeviceRunner, tiny, FP32) as (engine, _):
        expected = await replies_of(engine, turns)
        assert engine.preemptions == 0
    async with engine_with(DeviceRunner, tiny, FP32, pages=64) as (engine, _):
        stream = engine.submit(replace(turns[0], turn="left"))
        await anext(aiter(stream))
        await stream.aclose()
        assert await replies_of(engine, turns) == expected
        assert engine.preemptions > 0


async def test_sampled_rows_draw_what_the_plain_engine_draws(tiny: Tiny) -> None:
    rule = Sampling(temperature=1.2, top_p=0.9, top_k=100, seed=5)
    mixed = [
        replace(turn, sampling=rule if index % 2 else Sampling())
        for index, turn in enumerate(tiny.turns())
    ]
    async with engine_with(Runner, tiny, FP32) as (engine, _):
        expected = await replies_of(engine, mixed)
    async with engine_with(DeviceRunner, tiny, FP32) as (engine, _):
        assert await replies_of(engine, mixed) == expected


@pytest.mark.parametrize("sinks", [0, 4])
async def test_a_window_sees_the_same_tokens(tiny: Tiny, sinks: int) -> None:
    options = replace(FP32, window=50, sinks=sinks)
    async with engine_with(Runner, tiny, options) as (engine, _):
        expected = await replies_of(engine, tiny.turns())
    async with engine_with(DeviceRunner, tiny, options) as (engine, _):
        assert await replies_of(engine, tiny.turns()) == expected
    assert expected != tiny.replies


async def test_bf16_stays_as_close_as_the_plain_form(tiny: Tiny) -> None:
    turns = tiny.turns(max_tokens=1, end_tokens=frozenset())
    async with engine_with(DeviceRunner, tiny, replace(FP32, dtype="bf16")) as (engine, _):
        firsts = await replies_of(engine, turns)
    agreeing = sum(a == b[:1] for a, b in zip(firsts, tiny.replies, strict=True))
    assert agreeing >= len(turns) - 3


def test_numbers_that_are_none_reach_no_other_row(tiny: Tiny) -> None:
    """Slots beyond a row's length may hold what another turn left there, be it NaN."""
    pages = DevicePages(TINY.kv, 8, torch.float32, "cpu", DirectTransfers())
    scratch = pages.scratch_page * 16
    print("kv seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    for cache in (*pages.k, *pages.v):
        cache.normal_(generator=generator)
        cache[:, :] = torch.where(torch.arange(cache.shape[1])[:, None] < 21, cache, torch.nan)
        cache[:, scratch:] = 0.0
    attention = GatherAttention(TINY, pages, scratch, Window())
    q = torch.randn(2, TINY.heads, TINY.head_dim, generator=generator)
    rows = Rows(np.array([[0, 1], [0, 1]], np.int32), np.array([21, 5]))
    plain = torch.empty_like(q)
    for shape in (None, Shape(2, 2)):
        out = torch.empty_like(q)
        attention.plan(rows, shape)
        attention.start()
        attention.attend(q, 1, out)
        assert bool(torch.isfinite(out).all())
        _one_by_one(pages, q, rows, 1, plain)
        assert torch.allclose(out, plain, atol=1e-6)


def _one_by_one(
    pages: DevicePages, q: torch.Tensor, rows: Rows, layer: int, out: torch.Tensor
) -> None:
    ops = TorchOps(TINY, pages, "cpu")
    width = TINY.heads * TINY.head_dim
    triples = [(row, row, length) for row, length in enumerate(rows.lengths.tolist())]
    step = _step(np.array(triples, np.int32), rows.tables)
    qkv = torch.cat([q.view(len(q), -1), torch.zeros(len(q), 2 * TINY.kv.kv_heads * 16)], dim=1)
    ops.attend_rows(qkv, step, layer, out.view(len(q), width))


def _step(rows: np.ndarray, tables: np.ndarray) -> StepInput:
    count = len(rows)
    return StepInput(
        tokens=torch.arange(count) + 7,
        positions_np=rows[:, 2].astype(np.int64) - 1,
        slots_np=np.arange(count, dtype=np.int64) + 100,
        rows=rows,
        tables=tables,
        segments=(),
        logit_rows=torch.arange(count),
    )


def test_many_rows_of_uneven_length_attend_in_groups() -> None:
    """Rows are taken in groups so that the copies stay small; each row finds its own result."""
    pages = DevicePages(TINY.kv, 40, torch.float32, "cpu", DirectTransfers())
    print("kv seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    for cache in (*pages.k, *pages.v):
        cache.normal_(generator=generator)
    attention = GatherAttention(TINY, pages, pages.scratch_page * 16, Window(), gather_tokens=64)
    lengths = np.array([1, 100, 16, 17, 64, 3, 33, 48], np.int64)
    tables = np.stack([rng.permutation(40)[:7] for _ in lengths]).astype(np.int32)
    q = torch.randn(len(lengths), TINY.heads, TINY.head_dim, generator=generator)
    out, plain = torch.empty_like(q), torch.empty_like(q)
    attention.plan(Rows(tables, lengths), None)
    attention.start()
    attention.attend(q, 0, out)
    _one_by_one(pages, q, Rows(tables, lengths), 0, plain)
    assert torch.allclose(out, plain, atol=1e-6)


def test_padding_writes_to_the_scratch_page_alone() -> None:
    rows = np.array([[0, 1, 40], [1, 0, 3]], np.int32)
    tables = np.arange(8, dtype=np.int32).reshape(2, 4)
    padded = pad(_step(rows, tables), Shape(4, 6), scratch_page=99)
    assert padded.numbers.tolist() == [
        [7, 8, 0, 0],
        [39, 2, 0, 0],
        [100, 101, 99 * 16, 99 * 16],
    ]
    assert padded.rows.lengths.tolist() == [40, 3, 1, 1]
    assert padded.rows.tables[:, :3].tolist() == [[4, 5, 6], [0, 1, 2], [99] * 3, [99] * 3]
    assert padded.rows.tables.shape == (4, 3)


def test_flashinfer_is_given_the_pages_that_each_row_sees() -> None:
    """Its form of a page table, read as its documentation says, names each row's slots in order."""
    print("table seed", SEED)
    rng = np.random.default_rng(SEED)
    lengths = np.array([1, 16, 17, 40, 64, 65], np.int64)
    tables = rng.integers(0, 1000, (len(lengths), 6)).astype(np.int32)
    indptr, indices, last = page_index(Rows(tables, lengths))
    assert indptr.dtype == indices.dtype == last.dtype == np.int32
    for row, length in enumerate(lengths.tolist()):
        pages = indices[indptr[row] : indptr[row + 1]]
        assert (len(pages) - 1) * 16 + last[row] == length
        assert pages.tolist() == tables[row, : len(pages)].tolist()


def test_flashinfer_is_left_out_for_what_it_does_not_serve() -> None:
    big = msgspec.structs.replace(TINY, head_dim=128)
    assert "CUDA" in why_not(big, torch.bfloat16, "cpu", Window())
    for geometry, dtype, window in (
        (big, torch.float32, Window()),
        (msgspec.structs.replace(TINY, head_dim=80), torch.bfloat16, Window()),
        (big, torch.bfloat16, Window(100, 4)),
    ):
        assert why_not(geometry, dtype, "cuda", window)


def test_buckets_cover_every_batch() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(128) == (1, 2, 4, 8, 16, 32, 64, 128)
    assert row_buckets(100)[-2:] == (64, 100)
    shapes = [Shape(rows, pages) for rows in row_buckets(8) for pages in (4, 16)]
    for rows in range(1, 9):
        for pages in range(1, 17):
            found = smallest(shapes, rows, pages)
            assert found is not None
            assert found.rows >= rows > found.rows // 2
            assert found.pages == (4 if pages <= 4 else 16)
    assert smallest(shapes, 9, 1) is None
    assert smallest(shapes, 1, 17) is None


def test_tokens_are_picked_on_the_device_as_on_the_host() -> None:
    print("logit seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.randn(6, 300, generator=generator)
    logits[1, [50, 20]] = 9.0  # equals: the first wins
    logits[2, 7] = torch.nan
    logits[3, 7] = torch.inf
    logits[4] = -torch.inf
    rules = [Sampling()] * 5 + [Sampling(temperature=1.0, seed=3)]
    indexes = list(range(6))
    expected = sample_rows(logits.numpy().copy(), rules, indexes)
    assert expected[1:5] == [20, -1, -1, -1]
    assert choose_tokens(logits, pick(logits), rules, indexes) == expected


def test_the_best_logits_are_computed_anew_in_float32() -> None:
    print("head seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    pages = DevicePages(TINY.kv, 1, torch.bfloat16, "cpu", DirectTransfers())
    attention = GatherAttention(TINY, pages, pages.scratch_page * 16, Window())
    head = torch.randn(512, 64, generator=generator).bfloat16()
    hidden = torch.randn(5, 64, generator=generator)
    rough = torch.nn.functional.linear(hidden.bfloat16(), head).float()
    exact = hidden @ head.float().T
    refined = rough.clone()
    DeviceOps(TINY, pages, "cpu", attention, Window()).refine(refined, hidden, head)
    plain = rough.clone()
    TorchOps(TINY, pages, "cpu").refine(plain, hidden, head)
    assert torch.equal(refined.argmax(1), exact.argmax(1))
    assert torch.allclose(refined, plain, atol=1e-4)
