"""One step of a Llama over paged KV, all layers in one call, by a team of threads.

    phases 8l to 8l + 7   norm | q, k, v | rotate, write k and v | attend | output | norm |
                          gate and up | down                                        of layer l
    phases 8L, 8L + 1     norm | head                                   of the chosen rows

The residual stream and all sums are float32; activations are rounded to bfloat16 where they are
multiplied with weights, keys and values where they are kept. Rows never touch each other except
through the KV pages, so a row's numbers do not depend on the batch.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from segue_cloud.engine.compiled import inline, load, store
from segue_cloud.engine.native.attend import attend
from segue_cloud.engine.native.memory import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LOGIT_ROWS,
    MATH,
    ROWS,
    SPANS,
    VOCAB,
    Memory,
    jit,
)
from segue_cloud.engine.native.team import (
    FIRST,
    GENERATION,
    LAST,
    PARITY,
    STOP,
    announce,
    claim,
    meet,
    park,
)
from segue_cloud.engine.native.tiles import PANEL, TILE_ROWS, tile
from segue_cloud.engine.native.vectors import gate
from segue_contract.limits import KV_PAGE_TOKENS

_PAGE = KV_PAGE_TOKENS
_HALF = PANEL // 2
_BLOCK_ROWS = 64  # of a task of a product; more would leave threads without work at the end
_GRAINS = 12  # tasks a thread takes on average, where there are so many
PHASES = 8  # of a layer
NORM, QKV, ROTATE, ATTEND, OUT, FFN_NORM, GATE_UP, DOWN = range(PHASES)


Enter = Callable[[Any, Any, Memory, int, int, int, int], None]


def _digest() -> int:
    """Of the sources that are compiled in: numba's cache looks at this file alone."""
    here = Path(__file__).parent
    files = sorted([here.parent / "compiled.py", *here.glob("*.py")])
    return zlib.crc32(b"".join(file.read_bytes() for file in files), KV_PAGE_TOKENS)


@jit
def product(
    m: Any,
    me: Any,
    threads: Any,
    counter: Any,
    phase: Any,
    gated: Any,
    add: Any,
    x: Any,
    place: Any,
    inputs: Any,
    outputs: Any,
    rows: Any,
    out: Any,
) -> None:
    """A linear layer: sets `out` or adds to it, or, `gated`, makes `act` from gate and up."""
    pairs = (inputs + 1) // 2
    panels = (outputs + PANEL - 1) // PANEL
    blocks = (rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS
    tasks = panels * blocks
    grain = max(1, tasks // (threads * _GRAINS))
    weights, sums, act = m.weights, m.scratch[me], m.act
    wide, out_wide, act_wide = x.shape[1], out.shape[1], act.shape[1]
    while True:
        begin = claim(counter, phase, grain)
        if begin >= tasks:
            return
        for task in range(begin, min(begin + grain, tasks)):
            panel, first = task // blocks, task % blocks * _BLOCK_ROWS
            w = place + panel * pairs * 2 * PANEL
            for row in range(first, min(rows, first + _BLOCK_ROWS), TILE_ROWS):
                count = min(TILE_ROWS, rows - row)
                at = row * wide
                if gated:
                    tile(x, at, wide, weights, w, pairs, count, sums, 0, PANEL, False)
                    gate(sums, count, act, row * act_wide + panel * _HALF, act_wide)
                else:
                    to = row * out_wide + panel * PANEL
                    tile(x, at, wide, weights, w, pairs, count, out, to, out_wide, add)


@jit
def norm(
    m: Any,
    threads: Any,
    counter: Any,
    phase: Any,
    weight: Any,
    rows: Any,
    embed: Any,
    pick: Any,
) -> None:
    """x = RMSNorm(residual) * weight; with `embed` the residual is first looked up, with
    `pick` it is that of the chosen rows."""
    width = m.sizes[HIDDEN]
    pairs = (width + 1) // 2
    epsilon = m.reals[0]
    factors = m.norms[weight]
    grain = max(1, rows // (threads * _GRAINS))
    while True:
        begin = claim(counter, phase, grain)
        if begin >= rows:
            return
        for row in range(begin, min(rows, begin + grain)):
            line = m.residual[m.chosen[row] if pick else row]
            x = m.x[row]
            if embed:
                token = m.tokens[row]
                at = m.ends[0] + (token // PANEL * pairs * PANEL + token % PANEL) * 2
                for i in range(width):
                    line[i] = load(m.weights[at + i // 2 * 2 * PANEL + i % 2])
            square = np.float32(0)
            for i in range(width):
                square += line[i] * line[i]
            scale = np.float32(1) / np.sqrt(square / np.float32(width) + epsilon)
            for i in range(width):
                x[i] = store(line[i] * scale * factors[i], x[0])


@inline
def rotate_row(m: Any, layer: Any, row: Any) -> None:
    k, v, line, queries = m.pages[layer, 0], m.pages[layer, 1], m.qkv[row], m.queries[row]
    heads, kv_heads, head_dim = m.sizes[HEADS], m.sizes[KV_HEADS], m.sizes[HEAD_DIM]
    half_dim, rotated = head_dim // 2, heads + kv_heads
    cos, sin = m.cos[m.positions[row]], m.sin[m.positions[row]]
    page, token = m.slots[row] // _PAGE, m.slots[row] % _PAGE
    for head in range(rotated):
        low = line[head * head_dim : head * head_dim + half_dim]
        high = line[head * head_dim + half_dim : (head + 1) * head_dim]
        for i in range(half_dim):
            a, b = low[i], high[i]
            low[i] = a * cos[i] - b * sin[i]
            high[i] = b * cos[i] + a * sin[i]
    for i in range(heads * head_dim):
        queries[i] = store(line[i], queries[0])
    for head in range(kv_heads):
        keys, values = k[head, page], v[head, page]
        new_key = line[(heads + head) * head_dim : (heads + head + 1) * head_dim]
        new_value = line[(rotated + head) * head_dim : (rotated + head + 1) * head_dim]
        for i in range(head_dim):
            keys[(i // 2 * _PAGE + token) * 2 + i % 2] = store(new_key[i], keys[0])
            values[(token // 2 * head_dim + i) * 2 + token % 2] = store(new_value[i], keys[0])


@jit
def rotate(m: Any, counter: Any, phase: Any, layer: Any) -> None:
    """Shared out by spans: tokens that lie side by side in a page share its cache lines."""
    while True:
        span = claim(counter, phase, 1)
        if span >= m.sizes[SPANS]:
            return
        for row in range(m.spans[span, 0], m.spans[span, 0] + m.spans[span, 3]):
            rotate_row(m, layer, row)


@jit
def linear(m: Any, me: Any, threads: Any, counter: Any, task: Any, layer: Any, kind: Any) -> None:
    """The linear layer of a phase: which weight, from where, to where."""
    rows, hidden, ffn = m.sizes[ROWS], m.sizes[HIDDEN], m.sizes[FFN]
    q = m.sizes[HEADS] * m.sizes[HEAD_DIM]
    x, place, inputs, outputs, out = m.x, m.ends[1], hidden, m.sizes[VOCAB], m.logits
    if layer == m.places.shape[0]:
        rows = m.sizes[LOGIT_ROWS]
    elif kind == QKV:
        outputs, out = q + 2 * m.sizes[KV_HEADS] * m.sizes[HEAD_DIM], m.qkv
        place = m.places[layer, 0]
    elif kind == OUT:
        x, place, inputs, outputs, out = m.attended, m.places[layer, 1], q, hidden, m.residual
    elif kind == GATE_UP:
        place, outputs, out = m.places[layer, 2], 2 * ffn, m.residual
    else:
        x, place, inputs, outputs, out = m.act, m.places[layer, 3], ffn, hidden, m.residual
    gated, add = kind == GATE_UP, kind in (OUT, DOWN)
    product(m, me, threads, counter, task, gated, add, x, place, inputs, outputs, rows, out)


@jit
def run(
    place: Any,
    control: Any,
    m: Any,
    me: Any,
    threads: Any,
    counter: Any,
    first: Any,
    last: Any,
) -> None:
    layers = m.places.shape[0]
    for phase in range(first, last):
        layer, kind, task = phase // PHASES, phase % PHASES, phase - first
        if kind == NORM and layer == layers:
            norm(m, threads, counter, task, 2 * layers, m.sizes[LOGIT_ROWS], False, True)
        elif kind == NORM:
            norm(m, threads, counter, task, 2 * layer, m.sizes[ROWS], phase == 0, False)
        elif kind == ROTATE:
            rotate(m, counter, task, layer)
        elif kind == ATTEND:
            attend(m, me, counter, task, layer)
        elif kind == FFN_NORM:
            norm(m, threads, counter, task, 2 * layer + 1, m.sizes[ROWS], False, False)
        else:
            linear(m, me, threads, counter, task, layer, kind)
        meet(place, control, counter, task, threads)


@functools.cache
def build_step() -> Enter:
    """`enter(place, control, memory, me, threads, first, last)`: thread 0 computes phases
    [first, last) with the others; for them it is their whole life.

    One function for both, for it is what numba's cache keeps, with all that it calls compiled in.
    The cache looks at this file alone, and at the numbers that a function closes over: so it closes
    over the sources'.
    """
    source = _digest()

    @numba.njit(nogil=True, fastmath=MATH, cache=True)
    def enter(
        place: Any, control: Any, m: Any, me: Any, threads: Any, first: Any, last: Any
    ) -> None:
        seen = source * 0
        if me == 0:
            parity = (control[GENERATION] + 1) % 2
            control[FIRST], control[LAST], control[PARITY] = first, last, parity
            m.counters[parity, :] = 0
            announce(place, control)
            run(place, control, m, 0, threads, m.counters[parity], first, last)
            return
        while True:
            seen = park(place, control, seen)
            if control[STOP]:
                return
            counter = m.counters[control[PARITY]]
            run(place, control, m, me, threads, counter, control[FIRST], control[LAST])

    return enter
