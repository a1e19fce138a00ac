"""What all compiled kernels share: numba with its cache in the user's folder, and bfloat16.

bfloat16 numbers travel as their bits in uint16 and are widened by a shift; sums are in float32.
Compiled code is cached in the user's cache folder, so only the first start pays (some seconds).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np


def _cache_folder() -> Path:
    """The user's cache folder; where it cannot be written, one for this process alone.

    Never a shared folder: what lies in it is run.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "segue" / "numba"
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # no home at all
        writable = False
    return folder if writable else Path(tempfile.mkdtemp(prefix="segue-numba-"))


# Read by numba when it is imported.
if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = str(_cache_folder())

import numba  # noqa: E402
from llvmlite import ir  # type: ignore[import-untyped]  # noqa: E402
from numba import types  # noqa: E402
from numba.extending import intrinsic as _intrinsic  # noqa: E402

Function: TypeAlias = Callable[..., Any]


def intrinsic(function: Function) -> Function:
    """numba's `intrinsic`, with a type."""
    known: Function = _intrinsic(function)
    return known


def inline(function: Function) -> Function:
    """A function that becomes part of each kernel that calls it."""
    compiled: Function = numba.njit(inline="always")(function)
    return compiled


# expf after Cephes: e^x = 2^n e^r with n = round(x / ln 2), ln 2 in two parts, and e^r is
# 1 + r + r^2 p(r) with these factors of p, highest power first.
EXP_LIMIT, LOG2_E, LN2_HIGH, LN2_LOW = 60.0, 1.4426950408889634, 0.693359375, -2.12194440e-4
EXP_FACTORS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LIMIT, _LOG2_E, _LN2_HIGH, _LN2_LOW = np.array([EXP_LIMIT, LOG2_E, LN2_HIGH, LN2_LOW], np.float32)
_F7, _F6, _F5, _F4, _F3, _F2 = np.array(EXP_FACTORS, np.float32)
_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def load(typingctx: Any, stored: Any) -> Any:
    """A stored number as float32: bfloat16 bits are its upper half, float32 is itself."""

    def widen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(bits, _F32)

    def keep(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.float32(stored), widen if stored == types.uint16 else keep


@intrinsic
def store(typingctx: Any, value: Any, like: Any) -> Any:
    """float32 in the form of `like`: bfloat16 bits rounded to nearest even, or float32."""

    def narrow(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    def keep(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return like(types.float32, like), narrow if like == types.uint16 else keep


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), build


@inline
def exp(x: Any) -> Any:
    """expf after Cephes, which unlike libm's vectorises: relative error under 2e-7.

    Clamped to `EXP_LIMIT`, so that no weight becomes a (slow) denormal number.
    """
    x = min(max(x, -_LIMIT), _LIMIT)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    x = x - n * _LN2_HIGH - n * _LN2_LOW
    y = _F7 * x + _F6
    y = y * x + _F5
    y = y * x + _F4
    y = y * x + _F3
    y = y * x + _F2
    y = y * x * x + x + np.float32(1.0)
    return y * _as_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
