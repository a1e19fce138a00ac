"""What the threads of a step share: weights, pages, the step's rows and room for its numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba

# Calling a function passes `Memory` as some 300 numbers: what is called per row is made `inline`.
# Sums in any order, but NaN stays NaN (no `nnan`): bad weights must show in the logits.
MATH = {"contract", "reassoc", "nsz", "arcp"}
jit = numba.njit(nogil=True, fastmath=MATH)


class Memory(NamedTuple):
    """All that the threads of a step share; u16 are the bits of bfloat16.

    weights u16 (panels) · places i64 [layers, 4]: where qkv, output, gate and up, down begin ·
    ends i64 [2]: where embedding and head begin · norms f32 [2 layers + 1, hidden] ·
    cos, sin f32 [context, head_dim / 2] · pages (`NativePages`), flat_pages the same in one row ·
    sizes i64: see below · tokens, positions, slots i64 [T] ·
    spans i32 [S, 4] (first row, table, tokens that it sees, rows: up to 8 tokens in a row) ·
    tables i32 [S, pages] · chosen i64 [N] · reals f32: epsilon of the norms, scale of attention ·
    window i64: tokens, sinks · residual f32 [T, hidden] · x u16 [T, hidden] · qkv f32 ·
    queries u16 [T, q] · attended u16 [T, q] · act u16 [T, ffn] · logits f32 [N, vocab] ·
    counters (`team.counters`) · and of each thread: factors f32 [rows] · scratch f32 [8, 32] ·
    scores f32, weigh u16 [rows, context] · listed i64 [3, pages] · tails u16 [16 * head_dim]
    """

    weights: Any
    places: Any
    ends: Any
    norms: Any
    cos: Any
    sin: Any
    pages: Any
    flat_pages: Any
    sizes: Any
    tokens: Any
    positions: Any
    slots: Any
    spans: Any
    tables: Any
    chosen: Any
    reals: Any
    window: Any
    residual: Any
    x: Any
    qkv: Any
    queries: Any
    attended: Any
    act: Any
    logits: Any
    counters: Any
    factors: Any
    scratch: Any
    scores: Any
    weigh: Any
    listed: Any
    tails: Any


# Numbers of `sizes`.
ROWS, SPANS, LOGIT_ROWS, HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = range(9)
