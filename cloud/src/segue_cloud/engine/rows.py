"""The rows of a step: the tokens of its works, one after another, and where their KV goes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segue_cloud.engine.kv_pages import slots_of
from segue_cloud.engine.scheduler import Work
from segue_contract.limits import KV_PAGE_TOKENS


@dataclass(frozen=True)
class Rows:
    """`tokens`, `positions`, `slots`: int64 `[T]`. `firsts`: the row where each work begins."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    firsts: list[int]


def rows_of(works: Seq[Work]) -> Rows:
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    firsts: list[int] = []
    for work in works:
        sequence, start, end = work.sequence, work.start, work.start + work.count
        firsts.append(len(tokens))
        if work.count == 1:  # the common case, kept short
            tokens.append(sequence.tokens[start])
            positions.append(start)
            page = sequence.pages[start // KV_PAGE_TOKENS]
            slots.append(page * KV_PAGE_TOKENS + start % KV_PAGE_TOKENS)
        else:
            tokens.extend(sequence.tokens[start:end])
            positions.extend(range(start, end))
            slots.extend(slots_of(sequence.pages)[start:end].tolist())
    return Rows(
        np.array(tokens, np.int64), np.array(positions, np.int64), np.array(slots, np.int64), firsts
    )


def logit_rows(works: Seq[Work], firsts: Seq[int]) -> list[int]:
    """The last row of each work that samples."""
    last = zip(works, firsts, strict=True)
    return [first + work.count - 1 for work, first in last if work.samples]
