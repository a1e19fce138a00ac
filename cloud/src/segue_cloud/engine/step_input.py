"""What one step computes, as arrays: rows are tokens of any turns, one after another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Segment:
    """Rows [first, first + count) are consecutive tokens of one turn, from `start` on.

    `slots`: where the KV of what these rows see lies, in order (all tokens [0, start + count), or
    less with a window); None where `start` is 0, since then all keys are among the rows
    themselves. `mask`: `[count, keys]`, added to scores; None: every token sees all before it.
    """

    first: int
    count: int
    start: int
    slots: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class StepInput:
    """One step over T rows.

    `tokens`, `positions_np`, `slots_np`: int64 `[T]`, one of each per row.
    `rows`: int32 `[R, 3]` (row, page table, length) for rows that attend through a page table;
    `tables`: int32 `[S, pages]`. `segments`: the rows that attend as a chunk.
    `logit_rows`: int64 `[N]`, the rows whose next token is sampled.
    """

    tokens: torch.Tensor
    positions_np: NDArray[np.int64]
    slots_np: NDArray[np.int64]
    rows: NDArray[np.int32]
    tables: NDArray[np.int32]
    segments: tuple[Segment, ...]
    logit_rows: torch.Tensor


@dataclass(frozen=True)
class NativeInput:
    """One step over T rows for the compiled step; its page tables are known to it.

    `tokens`, `positions`, `slots`: int64 `[T]`. `spans`: int32 `[S, 4]` (first row, page table,
    tokens that the first row sees, rows): up to 8 tokens of a turn at a time. `chosen`: int64
    `[N]`, the rows whose next token is sampled.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    spans: NDArray[np.int32]
    chosen: NDArray[np.int64]
