"""Attention of a step's rows over their turns' pages, made of tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from segue_cloud.engine.compiled import inline
from segue_cloud.engine.native.emit import LANES
from segue_cloud.engine.native.memory import HEAD_DIM, HEADS, KV_HEADS, SPANS, jit
from segue_cloud.engine.native.team import claim
from segue_cloud.engine.native.tiles import MIX_ROWS, MIX_WIDTH, TILE_ROWS, mix, mix_shape, score
from segue_cloud.engine.native.vectors import soften
from segue_contract.limits import KV_PAGE_TOKENS

_PAGE = KV_PAGE_TOKENS


@inline
def list_pages(
    m: Any, me: Any, layer: Any, head: Any, table: Any, shortest: Any, longest: Any
) -> Any:
    """The pages that some of the rows see: where keys and values begin, and the first token.

    The last page of values goes through a copy without the tokens that are not there yet: they
    have weight 0, but 0 times what was left there might be NaN.
    """
    listed, tails = m.listed, m.tails
    lit = shortest - m.window[0] if 0 < m.window[0] < shortest else 0
    dark = min(m.window[1], lit)  # tokens in [dark, lit) are out of every row's window
    kv_heads, head_dim = m.sizes[KV_HEADS], m.sizes[HEAD_DIM]
    size = _PAGE * head_dim
    pages = m.pages.shape[3]
    count = 0
    for page in range((longest + _PAGE - 1) // _PAGE):
        first = page * _PAGE
        if first >= dark and first + _PAGE <= lit:
            continue
        entry = np.int64(m.tables[table, page])
        listed[me, 0, count] = ((layer * 2 * kv_heads + head) * pages + entry) * size
        at = (((layer * 2 + 1) * kv_heads + head) * pages + entry) * size
        listed[me, 1, count] = m.flat_pages.ctypes.data + 2 * at
        listed[me, 2, count] = first
        count += 1
    there = longest - listed[me, 2, count - 1]
    if there < _PAGE:
        last = (listed[me, 1, count - 1] - m.flat_pages.ctypes.data) // 2
        for i in range(size):
            tails[me, i] = 0
        for i in range(there // 2 * 2 * head_dim):
            tails[me, i] = m.flat_pages[last + i]
        if there % 2:
            half = there // 2 * 2 * head_dim
            for i in range(0, 2 * head_dim, 2):
                tails[me, half + i] = m.flat_pages[last + half + i]
        listed[me, 1, count - 1] = tails.ctypes.data + 2 * me * tails.shape[1]
    return count


@inline
def score_lines(m: Any, me: Any, at: Any, apart: Any, lines: Any, count: Any) -> None:
    """Scores of `lines` queries, the first at `at`, `apart` from one to the next, in the pages."""
    scores, listed = m.scores, m.listed
    width, pairs = scores.shape[2], m.sizes[HEAD_DIM] // 2
    mine = me * scores.shape[1] * width
    for line in range(0, lines, TILE_ROWS):
        rows = min(TILE_ROWS, lines - line)
        q = at + line * apart
        for c in range(0, count, 2):
            k, other = listed[me, 0, c], listed[me, 0, min(c + 1, count - 1)]
            to = mine + line * width + c * _PAGE
            score(m.queries, q, apart, m.flat_pages, k, other, pairs, rows, scores, to, width)


@inline
def weigh_line(m: Any, me: Any, line: Any, length: Any, count: Any) -> Any:
    """Scores of a query that sees `length` tokens to weights; returns 1 / their sum."""
    at = (me * m.scores.shape[1] + line) * m.scores.shape[2]
    seen = count * _PAGE - (m.listed[me, 2, count - 1] + _PAGE - length)
    window = m.window[0]
    if 0 < window < length:
        lit = length - window
        dark = min(m.window[1], lit)
        for c in range(count):
            for t in range(_PAGE):
                if dark <= m.listed[me, 2, c] + t < lit:
                    m.scores[me, line, c * _PAGE + t] = np.float32(-3e38)
    return soften(m.scores, at, seen, count, m.reals[1], m.weigh, at)


@inline
def mix_lines(m: Any, me: Any, at: Any, apart: Any, lines: Any, count: Any) -> None:
    """Values by the weights and factors, into `attended`, where the queries lie in theirs."""
    weights, listed, head_dim = m.weigh, m.listed, m.sizes[HEAD_DIM]
    width = weights.shape[2]
    mine, places = me * weights.shape[1] * width, (me * 3 + 1) * listed.shape[2]
    factors, factors_at = m.factors, me * m.factors.shape[1]
    for line in range(0, lines, MIX_ROWS):
        rows = min(MIX_ROWS, lines - line)
        p = mine + line * width
        for base in range(0, head_dim, MIX_WIDTH):
            shape = mix_shape(rows, min(MIX_WIDTH, head_dim - base) // LANES)
            to = at + line * apart + base
            out = m.attended
            mix(
                weights,
                p,
                width,
                listed,
                places,
                base,
                head_dim,
                count,
                shape,
                factors,
                factors_at + line,
                out,
                to,
                apart,
            )


@jit
def attend(m: Any, me: Any, counter: Any, phase: Any, layer: Any) -> None:
    """All spans, each head by itself.

    In here no array is cut: numba counts the references of each part, hundreds of cycles a time.
    """
    kv_heads, head_dim, width = m.sizes[KV_HEADS], m.sizes[HEAD_DIM], m.queries.shape[1]
    group = m.sizes[HEADS] // kv_heads
    tasks = m.sizes[SPANS] * kv_heads
    while True:
        task = claim(counter, phase, 1)
        if task >= tasks:
            return
        span, head = task // kv_heads, task % kv_heads
        row, table = m.spans[span, 0], m.spans[span, 1]
        length, rows = m.spans[span, 2], m.spans[span, 3]
        count = list_pages(m, me, layer, head, table, length, length + rows - 1)
        # Queries that share their keys: of one row all in the group, of more rows one each.
        alone = rows == 1
        apart = head_dim if alone else width
        lines = group if alone else rows
        for g in range(1 if alone else group):
            at = row * width + (head * group + g) * head_dim
            score_lines(m, me, at, apart, lines, count)
            for line in range(lines):
                own = length if alone else length + line
                m.factors[me, line] = weigh_line(m, me, line, own, count)
            mix_lines(m, me, at, apart, lines, count)
