"""The fused CPU kernels say the same as plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segue_cloud.engine.attention import CompiledOps, TorchOps
from segue_cloud.engine.kv_pages import KvPages
from segue_cloud.engine.step_input import StepInput
from tests.support.tiny_llama import TINY

PAGES = 64
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def both(dtype: torch.dtype) -> tuple[tuple[CompiledOps, KvPages], tuple[TorchOps, KvPages]]:
    """Each form over its own pages, filled with the same random KV."""
    first, second = (KvPages(TINY.kv, PAGES, dtype, "cpu") for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for a, b in zip([*first.k, *first.v], [*second.k, *second.v], strict=True):
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(a)
    return (CompiledOps(TINY, first), first), (TorchOps(TINY, second, "cpu"), second)


def step_of(lengths: list[int]) -> StepInput:
    """One row per sequence, at the end of a context of `length` tokens in scattered pages."""
    rng = np.random.default_rng(2)
    tables = np.zeros((len(lengths), 16), np.int32)
    free = list(rng.permutation(PAGES))
    slots = []
    for row, length in enumerate(lengths):
        pages = [free.pop() for _ in range(-(-length // 16))]
        tables[row, : len(pages)] = pages
        slots.append(pages[-1] * 16 + (length - 1) % 16)
    rows = np.array([(i, i, n) for i, n in enumerate(lengths)], np.int32)
    return StepInput(
        tokens=torch.zeros(len(lengths), dtype=torch.int64),
        positions_np=np.array(lengths, np.int64) - 1,
        slots_np=np.array(slots, np.int64),
        rows=rows,
        tables=tables,
        segments=(),
        logit_rows=torch.zeros(0, dtype=torch.int64),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = TOLERANCE[a.dtype]
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def test_rope_store_and_attention(dtype: torch.dtype) -> None:
    (fused, fused_pages), (plain, plain_pages) = both(dtype)
    step = step_of([1, 2, 15, 16, 17, 31, 32, 33, 64, 130, 250])
    width = (TINY.heads + 2 * TINY.kv_heads) * TINY.head_dim
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(len(step.rows), width, generator=generator).to(dtype)
    mine, theirs = qkv.clone(), qkv.clone()
    out = torch.zeros(len(step.rows), TINY.heads * TINY.head_dim, dtype=dtype)
    expected = out.clone()
    fused.rope_store(mine, step, 1)
    plain.rope_store(theirs, step, 1)
    close(mine, theirs)
    close(fused_pages.k[1], plain_pages.k[1])
    close(fused_pages.v[1], plain_pages.v[1])
    fused.attend_rows(mine, step, 1, out)
    plain.attend_rows(theirs, step, 1, expected)
    close(out, expected)
    assert out.abs().min(dim=1).values.gt(0).all(), "a row was left out"


def test_attention_with_extreme_scores_stays_finite(dtype: torch.dtype) -> None:
    (fused, _), (plain, _) = both(dtype)
    step = step_of([100])
    width = (TINY.heads + 2 * TINY.kv_heads) * TINY.head_dim
    qkv = torch.full((1, width), 300.0, dtype=dtype)
    out = torch.zeros(1, TINY.heads * TINY.head_dim, dtype=dtype)
    expected = out.clone()
    fused.attend_rows(qkv, step, 0, out)
    plain.attend_rows(qkv, step, 0, expected)
    assert out.isfinite().all()
    close(out, expected)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_norms_and_gates(dtype: torch.dtype, rows: int) -> None:
    (fused, _), (plain, _) = both(dtype)
    generator = torch.Generator().manual_seed(rows)
    residual = torch.randn(rows, TINY.hidden, generator=generator) * 3
    delta = torch.randn(rows, TINY.hidden, generator=generator).to(dtype)
    weight = torch.rand(TINY.hidden, generator=generator)
    mine, theirs = residual.clone(), residual.clone()
    close(fused.add_norm(mine, delta, weight), plain.add_norm(theirs, delta, weight))
    torch.testing.assert_close(mine, theirs)
    close(fused.add_norm(mine, None, weight), plain.add_norm(theirs, None, weight))
    torch.testing.assert_close(mine, theirs)
    gate_up = (torch.randn(rows, 2 * TINY.ffn, generator=generator) * 20).to(dtype)
    close(fused.silu_mul(gate_up), plain.silu_mul(gate_up))


def test_refined_logits() -> None:
    dtype = torch.bfloat16  # float32 logits need none
    (fused, _), (plain, _) = both(dtype)
    generator = torch.Generator().manual_seed(9)
    head = torch.randn(300, TINY.hidden, generator=generator).to(dtype)
    hidden = torch.randn(5, TINY.hidden, generator=generator)
    coarse = torch.nn.functional.linear(hidden.to(dtype), head).float()
    exact = torch.nn.functional.linear(hidden, head.float())
    mine, theirs = coarse.clone(), coarse.clone()
    fused.refine(mine, hidden, head)
    plain.refine(theirs, hidden, head)
    torch.testing.assert_close(mine, theirs)
    assert (coarse != mine).any()
    best = exact.max(dim=1, keepdim=True).values
    near = exact >= best - 1
    torch.testing.assert_close(mine[near], exact[near])
    assert mine.argmax(dim=1).tolist() == exact.argmax(dim=1).tolist()
