"""Products of bfloat16 tiles with the CPU's dot-product instruction, written as LLVM code.

A weight `[outputs, inputs]` lies in memory as *panels* of 32 outputs (`panels.py`): for each pair
of inputs, the 32 outputs' two numbers each. A tile is up to 8 rows of activations times one panel:
16 accumulators of 16 float32 each, which is what the registers hold, so a weight is read once per 8
rows and a product runs at the rate of the multipliers (AVX512-BF16: 64 operations per instruction).
Pages of keys and values (`pages.py`) are panels too, so attention is made of the same tiles.

Every output is summed in the same order, whatever the number of rows. So a row's result does not
depend on what else is in its batch, nor on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from segue_cloud.engine.compiled import inline, intrinsic
from segue_cloud.engine.native.emit import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I32,
    I64,
    LANES,
    PAIRS,
    call,
    define,
    integer,
    load,
    narrow,
    pointer,
    spread,
)
from segue_contract.limits import KV_PAGE_TOKENS

PANEL = 32  # outputs of a panel
TILE_ROWS = 8
MIX_ROWS, MIX_WIDTH = 4, 64  # of a tile of values, at most
_MIX_VECTORS = MIX_WIDTH // 16
_PAGE_PAIRS = KV_PAGE_TOKENS // 2


_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"

# Given the pair's number, the registers of weights that it meets.
_Weights = Callable[[Any, Any], list[Any]]


@intrinsic
def tile(
    typingctx: Any,
    x: Any,
    x_at: Any,
    x_width: Any,
    w: Any,
    w_at: Any,
    pairs: Any,
    rows: Any,
    out: Any,
    at: Any,
    width: Any,
    add: Any,
) -> Any:
    """out[at + r * width + c] = (or +=, with `add`) sum over k of x[x_at + r * x_width + k] *
    panel[k, c], for `rows` rows, 1 to 8, and 32 c.

    `x`, `w`: uint16 arrays (bits of bfloat16), from whose start `x_at` and `w_at` count numbers;
    `pairs`: half the inputs; `out`: float32.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_at, x_width, w, w_at, pairs, rows, out, at, width, add = args
        x = pointer(context, builder, signature.args[0], x, x_at, 2)
        w = pointer(context, builder, signature.args[3], w, w_at, 2)
        out = pointer(context, builder, signature.args[7], out, at, 4)
        strides = (builder.mul(x_width, integer(2)), builder.mul(width, integer(4)))
        given = [x, strides[0], w, pairs, out, strides[1]]
        with builder.if_else(add) as (then, otherwise):
            for branch, adds in ((then, True), (otherwise, False)):
                with branch:
                    make = functools.partial(_tile_of, adds)
                    _switch(context, builder, rows, TILE_ROWS, make, given)
        return context.get_dummy_value()

    i64 = types.int64
    given = (x, i64, i64, w, i64, i64, i64, out, i64, i64, types.boolean)
    return types.none(*given), build


@intrinsic
def score(
    typingctx: Any,
    q: Any,
    q_at: Any,
    q_width: Any,
    pages: Any,
    one: Any,
    other: Any,
    pairs: Any,
    rows: Any,
    out: Any,
    at: Any,
    width: Any,
) -> Any:
    """out[at + r * width + t] = q[r] . k[t] for the 32 tokens of two pages of keys.

    `q`: uint16, rows from `q_at`, `q_width` apart; `pages`: uint16, the pages at `one` and `other`;
    `pairs`: half the head's width; `rows`: 1 to 8.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        q, q_at, q_width, pages, one, other, pairs, rows, out, at, width = args
        q = pointer(context, builder, signature.args[0], q, q_at, 2)
        first = pointer(context, builder, signature.args[3], pages, one, 2)
        second = pointer(context, builder, signature.args[3], pages, other, 2)
        out = pointer(context, builder, signature.args[8], out, at, 4)
        strides = (builder.mul(q_width, integer(2)), builder.mul(width, integer(4)))
        given = [q, strides[0], first, second, pairs, out, strides[1]]
        return _switch(context, builder, rows, TILE_ROWS, _score_of, given)

    i64 = types.int64
    return types.none(q, i64, i64, pages, i64, i64, i64, i64, out, i64, i64), build


@intrinsic
def mix(
    typingctx: Any,
    p: Any,
    p_at: Any,
    p_width: Any,
    places: Any,
    places_at: Any,
    offset: Any,
    head_dim: Any,
    pages: Any,
    shape: Any,
    factors: Any,
    factors_at: Any,
    out: Any,
    at: Any,
    width: Any,
) -> Any:
    """out[at + r * width + c] = factors[r] * sum over the tokens t of `pages` pages of
    p[r, t] * v[t, offset + c].

    `p`: uint16, rows from `p_at`, `p_width` apart; `places`: int64, from `places_at` the addresses
    of the pages of values; `shape`: `mix_shape` of the rows, 1 to 4, and the registers of c, 1 to
    4; `factors`: float32, from `factors_at`; `out`: uint16.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        p, p_at, p_width, places, places_at, offset, head_dim, *rest = args
        pages, shape, factors, factors_at, out, at, width = rest
        kinds = signature.args
        p = pointer(context, builder, kinds[0], p, p_at, 2)
        places = pointer(context, builder, kinds[3], places, places_at, 8)
        factors = pointer(context, builder, kinds[9], factors, factors_at, 4)
        out = pointer(context, builder, kinds[11], out, at, 2)
        strides = [builder.mul(n, integer(2)) for n in (p_width, width)]
        bytes_ = [builder.mul(n, integer(4)) for n in (offset, head_dim)]
        given = [p, strides[0], places, *bytes_, pages, factors, out, strides[1]]
        return _switch(context, builder, shape, MIX_ROWS * _MIX_VECTORS, _mix_of, given)

    i64 = types.int64
    given = (p, i64, i64, places, i64, i64, i64, i64, i64, factors, i64, out, i64, i64)
    return types.none(*given), build


@inline
def mix_shape(rows: Any, vectors: Any) -> Any:
    """Both in one number, from 1."""
    return (rows - 1) * _MIX_VECTORS + vectors


def _switch(
    context: Any,
    builder: Any,
    rows: Any,
    most: int,
    make: Callable[[Any, int], Any],
    given: Sequence[Any],
) -> Any:
    """Call the function that `make` makes for `rows` rows."""
    done = builder.append_basic_block("tile.done")
    switch = builder.switch(rows, done)
    for count in range(1, most + 1):
        block = builder.append_basic_block(f"tile.{count}")
        switch.add_case(integer(count), block)
        builder.position_at_end(block)
        builder.call(make(builder.module, count), given)
        builder.branch(done)
    builder.position_at_end(done)
    return context.get_dummy_value()


def _tile_of(adds: bool, module: Any, rows: int) -> Any:
    """A function (x, bytes from row to row, panel, pairs, out, bytes from row to row)."""
    name = f"segue.tile.{rows}.{'add' if adds else 'set'}"
    kinds = [BYTES, I64, BYTES, I64, BYTES, I64]
    function, new = define(module, name, ir.VoidType(), kinds)
    if not new:
        return function
    x, stride, panel, pairs, out, width = function.args
    builder = ir.IRBuilder(function.append_basic_block("enter"))

    def weights(builder: Any, pair: Any) -> list[Any]:
        return [load(builder, panel, pair, 4 * PANEL, 64 * half, PAIRS, 64) for half in range(2)]

    sums = _accumulate(function, builder, x, stride, rows, pairs, weights, 2)
    _store_all(builder, sums, out, width, adds)
    builder.ret_void()
    return function


def _score_of(module: Any, rows: int) -> Any:
    """A function (q, bytes from row to row, page, page, pairs, out, bytes from row to row)."""
    name = f"segue.score.{rows}"
    kinds = [BYTES, I64, BYTES, BYTES, I64, BYTES, I64]
    function, new = define(module, name, ir.VoidType(), kinds)
    if not new:
        return function
    q, stride, first, second, pairs, out, width = function.args
    builder = ir.IRBuilder(function.append_basic_block("enter"))

    def keys(builder: Any, pair: Any) -> list[Any]:
        return [load(builder, page, pair, 64, 0, PAIRS, 32) for page in (first, second)]

    sums = _accumulate(function, builder, q, stride, rows, pairs, keys, 2)
    _store_all(builder, sums, out, width)
    builder.ret_void()
    return function


def _mix_of(module: Any, shape: int) -> Any:
    """A function (p, bytes from row to row, addresses, offset in bytes, bytes from pair to pair,
    pages, factors, out, bytes from row to row)."""
    rows, vectors = (shape - 1) // _MIX_VECTORS + 1, (shape - 1) % _MIX_VECTORS + 1
    name = f"segue.mix.{rows}.{vectors}"
    kinds = [BYTES, I64, BYTES, I64, I64, I64, BYTES, BYTES, I64]
    function, new = define(module, name, ir.VoidType(), kinds)
    if not new:
        return function
    p, stride, places, offset, apart, pages, factors, out, width = function.args
    builder = ir.IRBuilder(function.append_basic_block("enter"))

    def values(builder: Any, pair: Any) -> list[Any]:
        page = builder.lshr(pair, integer(_PAGE_PAIRS.bit_length() - 1))
        address = load(builder, places, page, 8, 0, I64, 8)
        inside = builder.mul(builder.and_(pair, integer(_PAGE_PAIRS - 1)), apart)
        base = builder.gep(builder.inttoptr(address, BYTES), [builder.add(offset, inside)])
        return [load(builder, base, integer(part), 64, 0, PAIRS, 32) for part in range(vectors)]

    pairs = builder.mul(pages, integer(_PAGE_PAIRS))
    sums = _accumulate(function, builder, p, stride, rows, pairs, values, vectors)
    for row, line in enumerate(sums):
        factor = load(builder, factors, integer(row), 4, 0, F32, 4)
        for part, total in enumerate(line):
            at = builder.add(builder.mul(width, integer(row)), integer(2 * LANES * part))
            place = builder.bitcast(builder.gep(out, [at]), HALVES.as_pointer())
            value = builder.fmul(total, spread(builder, factor, F32))
            builder.store(narrow(builder, value), place, align=2)
    builder.ret_void()
    return function


def _accumulate(
    function: Any,
    builder: Any,
    x: Any,
    stride: Any,
    rows: int,
    pairs: Any,
    weights: _Weights,
    width: int,
) -> list[list[Any]]:
    """The loop over `pairs`: rows x width registers of sums; leaves the builder behind it."""
    lines = [builder.gep(x, [builder.mul(stride, integer(row))]) for row in range(rows)]
    enter = builder.block
    loop, leave = (function.append_basic_block(name) for name in ("loop", "leave"))
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(I64)
    sums = [[builder.phi(FLOATS) for _ in range(width)] for _ in range(rows)]
    met = weights(builder, pair)
    following = builder.add(pair, integer(1))
    for row, line in enumerate(lines):
        both = builder.bitcast(spread(builder, load(builder, line, pair, 4, 0, I32, 4), I32), PAIRS)
        for column, weight in enumerate(met):
            total = sums[row][column]
            summed = call(builder, FLOATS, _DOT, [total, both, weight])
            total.add_incoming(ir.Constant(FLOATS, [0.0] * LANES), enter)
            total.add_incoming(summed, loop)
            sums[row][column] = summed
    pair.add_incoming(integer(0), enter)
    pair.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, leave)
    builder.position_at_end(leave)
    return sums


def _store_all(
    builder: Any, sums: Sequence[Sequence[Any]], out: Any, stride: Any, adds: bool = False
) -> None:
    for row, line in enumerate(sums):
        for column, total in enumerate(line):
            at = builder.add(builder.mul(stride, integer(row)), integer(4 * LANES * column))
            place = builder.bitcast(builder.gep(out, [at]), FLOATS.as_pointer())
            value = builder.fadd(builder.load(place, align=4), total) if adds else total
            builder.store(value, place, align=4)
