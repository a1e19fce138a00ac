"""What is neither a product nor worth a loop of numba's: softmax and SiLU, 16 numbers a time.

Written as LLVM code because numba's loops over parts of larger arrays often stay scalar: an index
that might be negative, or memory that might overlap, is enough.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from segue_cloud.engine.compiled import (
    EXP_FACTORS,
    EXP_LIMIT,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    intrinsic,
)
from segue_cloud.engine.native.emit import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I32,
    I64,
    INTS,
    LANES,
    call,
    define,
    floats,
    integer,
    narrow,
    pointer,
    spread,
)
from segue_cloud.engine.native.tiles import PANEL

_LEAST = -3e38


@intrinsic
def soften(
    typingctx: Any, scores: Any, at: Any, seen: Any, vectors: Any, scale: Any, weights: Any, to: Any
) -> Any:
    """weights[to + t] = exp(scale * (scores[at + t] - the largest)) for t < `seen`, else 0, up to
    16 * `vectors`; returns 1 / the sum. `scores` float32, `weights` uint16, `seen` at least 1."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, at, seen, vectors, scale, weights, to = args
        scores = pointer(context, builder, signature.args[0], scores, at, 4)
        weights = pointer(context, builder, signature.args[5], weights, to, 2)
        return builder.call(_soften(builder.module), [scores, seen, vectors, scale, weights])

    i64, f32 = types.int64, types.float32
    return f32(scores, i64, i64, i64, f32, weights, i64), build


@intrinsic
def gate(typingctx: Any, sums: Any, rows: Any, out: Any, at: Any, width: Any) -> Any:
    """out[at + r * width + c] = silu(sums[r, c]) * sums[r, 16 + c] for 16 c; `sums` float32
    `[8, 32]`, `out` uint16."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, rows, out, at, width = args
        sums = pointer(context, builder, signature.args[0], sums, integer(0), 4)
        out = pointer(context, builder, signature.args[2], out, at, 2)
        stride = builder.mul(width, integer(2))
        builder.call(_gate(builder.module), [sums, rows, out, stride])
        return context.get_dummy_value()

    i64 = types.int64
    return types.none(sums, i64, out, i64, i64), build


def _soften(module: Any) -> Any:
    kinds = [BYTES, I64, I64, F32, BYTES]
    function, new = define(module, "segue.soften", F32, kinds)
    if not new:
        return function
    scores, seen, vectors, scale, weights = function.args
    builder = ir.IRBuilder(function.append_basic_block("enter"))
    lanes = ir.Constant(INTS, list(range(LANES)))
    least = floats(_LEAST)

    def masked(builder: Any, index: Any) -> tuple[Any, Any]:
        """Vector `index` of the scores, the least where nothing is seen; and what is seen."""
        left = builder.trunc(builder.sub(seen, builder.mul(index, integer(LANES))), I32)
        inside = builder.icmp_signed("<", lanes, spread(builder, left, I32))
        at = builder.gep(scores, [builder.mul(index, integer(4 * LANES))])
        found = builder.load(builder.bitcast(at, FLOATS.as_pointer()), align=4)
        return builder.select(inside, found, least), inside

    def loop(name: str, body: Any) -> Any:
        """body(builder, index, vector) over all vectors; what it made of `start` in the end."""
        enter = builder.block
        block, leave = (function.append_basic_block(f"{name}.{n}") for n in ("loop", "leave"))
        builder.branch(block)
        builder.position_at_end(block)
        index, carried = builder.phi(I64), builder.phi(FLOATS)
        start, made = body(builder, index, carried)
        following = builder.add(index, integer(1))
        for phi, first, then in ((index, integer(0), following), (carried, start, made)):
            phi.add_incoming(first, enter)
            phi.add_incoming(then, block)
        builder.cbranch(builder.icmp_signed("<", following, vectors), block, leave)
        builder.position_at_end(leave)
        return made

    def larger(builder: Any, index: Any, most: Any) -> tuple[Any, Any]:
        found, _ = masked(builder, index)
        return least, builder.select(builder.fcmp_ordered(">", found, most), found, most)

    most = loop("most", larger)
    most = call(builder, F32, "llvm.vector.reduce.fmax.v16f32", [most], fast=True)
    largest, factor = spread(builder, most, F32), spread(builder, scale, F32)

    def weigh(builder: Any, index: Any, total: Any) -> tuple[Any, Any]:
        found, inside = masked(builder, index)
        weight = exp(builder, builder.fmul(builder.fsub(found, largest), factor))
        weight = builder.select(inside, weight, floats(0.0))
        at = builder.gep(weights, [builder.mul(index, integer(2 * LANES))])
        builder.store(narrow(builder, weight), builder.bitcast(at, HALVES.as_pointer()), align=2)
        return floats(0.0), builder.fadd(total, weight)

    total = loop("weigh", weigh)
    zero = ir.Constant(F32, 0.0)
    sum_ = call(builder, F32, "llvm.vector.reduce.fadd.v16f32", [zero, total], fast=True)
    builder.ret(builder.fdiv(ir.Constant(F32, 1.0), sum_))
    return function


def _gate(module: Any) -> Any:
    kinds = [BYTES, I64, BYTES, I64]
    function, new = define(module, "segue.gate", ir.VoidType(), kinds)
    if not new:
        return function
    sums, rows, out, stride = function.args
    enter, loop, leave = (function.append_basic_block(n) for n in ("enter", "loop", "leave"))
    builder = ir.IRBuilder(enter)
    builder.branch(loop)
    builder.position_at_end(loop)
    row = builder.phi(I64)
    line = builder.gep(sums, [builder.mul(row, integer(4 * PANEL))])
    gates, ups = (
        builder.load(
            builder.bitcast(builder.gep(line, [integer(at)]), FLOATS.as_pointer()), align=64
        )
        for at in (0, 4 * LANES)
    )
    turned = builder.fadd(floats(1.0), exp(builder, builder.fsub(floats(0.0), gates)))
    made = builder.fdiv(builder.fmul(gates, ups), turned)
    at = builder.bitcast(builder.gep(out, [builder.mul(row, stride)]), HALVES.as_pointer())
    builder.store(narrow(builder, made), at, align=2)
    following = builder.add(row, integer(1))
    row.add_incoming(integer(0), enter)
    row.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, rows), loop, leave)
    builder.position_at_end(leave)
    builder.ret_void()
    return function


def exp(builder: Any, x: Any) -> Any:
    """As `compiled.exp`, of 16 numbers."""
    least, most = floats(-EXP_LIMIT), floats(EXP_LIMIT)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
    scaled = builder.fmul(x, floats(LOG2_E))
    n = call(builder, FLOATS, "llvm.rint.v16f32", [scaled])

    def multiply_add(a: Any, b: Any, c: Any) -> Any:
        return call(builder, FLOATS, "llvm.fma.v16f32", [a, b, c])

    x = multiply_add(n, floats(-LN2_HIGH), x)
    x = multiply_add(n, floats(-LN2_LOW), x)
    y = floats(EXP_FACTORS[0])
    for factor in EXP_FACTORS[1:]:
        y = multiply_add(y, x, floats(factor))
    y = multiply_add(builder.fmul(y, x), x, builder.fadd(x, floats(1.0)))
    power = builder.add(builder.fptosi(n, INTS), ir.Constant(INTS, [127] * LANES))
    power = builder.shl(power, ir.Constant(INTS, [23] * LANES))
    return builder.fmul(y, builder.bitcast(power, FLOATS))
