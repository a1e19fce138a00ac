"""Small words for writing LLVM code: kinds of vectors, addresses, functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

LANES = 16  # float32 in a register


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES = ir.IntType(8).as_pointer()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)  # bits of bfloat16
PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def integer(value: int) -> Any:
    return ir.Constant(I64, value)


def floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def spread(builder: Any, value: Any, kind: Any) -> Any:
    """One number in all lanes."""
    vector = ir.VectorType(kind, LANES)
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * LANES))


def pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, size: int) -> Any:
    """The address of the array's number `at`, each of `size` bytes."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(builder.bitcast(data, BYTES), [builder.mul(at, integer(size))])


def load(builder: Any, base: Any, index: Any, step: int, offset: int, kind: Any, align: int) -> Any:
    """The `kind` at base + index * step + offset bytes."""
    at = builder.add(builder.mul(index, integer(step)), integer(offset))
    return builder.load(builder.bitcast(builder.gep(base, [at]), kind.as_pointer()), align=align)


def define(module: Any, name: str, returns: Any, arguments: Sequence[Any]) -> tuple[Any, bool]:
    """The function of that name, and whether it is new and wants a body."""
    if name in module.globals:
        return module.globals[name], False
    function = ir.Function(module, ir.FunctionType(returns, arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function, True


def call(builder: Any, returns: Any, name: str, args: Sequence[Any], *, fast: bool = False) -> Any:
    """Call one of LLVM's own functions; `fast`: in any order of its sums."""
    module = builder.module
    function = module.globals.get(name) or ir.Function(
        module, ir.FunctionType(returns, [arg.type for arg in args]), name
    )
    return builder.call(function, args, fastmath=("reassoc",) if fast else ())


def narrow(builder: Any, x: Any) -> Any:
    """16 float32 as bfloat16, rounded to nearest even, as their bits."""
    bits = builder.bitcast(x, INTS)

    def all_of(value: int) -> Any:
        return ir.Constant(INTS, [value] * LANES)

    odd = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
    rounded = builder.add(builder.add(bits, all_of(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, all_of(16)), HALVES)
