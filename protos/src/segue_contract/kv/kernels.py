"""The numpy passes of the KV codec, written so that each runs at memory speed.

Measured on SmolLM2's K (30 layers of [3, 64, 64] float32), milliseconds for all layers; tiles of
half a megabyte stay in the second-level cache:

    largest magnitude per row      float32 maximum 0.54   the same on int32 bits    0.16
    float16 -> float32             numpy's cast    0.34   integer shifts            0.12
    float32 -> float16             numpy's cast    0.67   integer shifts            0.20
    round and store as int8        multiply, rint, cast: 0.09 + 0.03 + 0.03; adding 1.5 * 2**23 and
                                   taking the low byte: 0.09 + 0.03 + 0.11
    pack two 4-bit numbers         as floats       0.39   as bytes, eight at once   0.12

Floats of one sign order as their bits do, and NaN orders above infinity: one integer maximum finds
the scale and the bad number.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segue_contract.errors import BadBlock

Floats: TypeAlias = NDArray[np.float32]
Array: TypeAlias = NDArray[Any]

TILE_BYTES = 512 * 1024  # of float32; two of them fit the second-level cache

# Scales as their 16 stored bits: exponents 2**-64 and 2**100, mantissa 0.
MIN_SCALE_BITS = (127 - 64) << 7
MAX_SCALE_BITS = (127 + 100) << 7
# Magnitudes that are refused, as float32 bits: 2**100, and 2**16 where float16 must hold them.
_LIMIT_FLOAT32 = (127 + 100) << 23
_LIMIT_FLOAT16 = (127 + 16) << 23
# From 2**-14 on, every non-zero product is a normal float16; below 2**8, none overflows.
_MIN_NORMAL_SCALE_BITS = (127 - 14) << 7
_MAX_HALF_SCALE_BITS = (127 + 8) << 7

_LOW_NIBBLES, _FOURTH_BITS = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0808080808080808)

_TO_HALF_EXPONENT = np.float32(2.0**-112)  # float32's exponent bias less float16's
_FROM_HALF_EXPONENT = np.float32(2.0**112)
_HALF_SIGN_FILL = np.int32(-0x70000001)  # all bits but the three that sign extension filled


def half_to_float(x: NDArray[np.float16], out: Floats) -> None:
    """`out[...] = x`, exactly; infinities and NaN become magnitudes of 2**16 and more."""
    bits = out.view(np.int32)
    np.copyto(bits, x.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _HALF_SIGN_FILL, out=bits)
    np.multiply(out, _FROM_HALF_EXPONENT, out=out)


def float_to_half(x: Floats, out: NDArray[np.float16], scratch: NDArray[np.uint32]) -> None:
    """`out[...] = x * 2**112`, rounded to nearest even; destroys `x`.

    Every number must be 0 or a normal float16 after rounding: the caller scales by 2**-112, so
    that float32's exponent field already counts as float16's does.
    """
    bits = x.view(np.uint32)
    np.right_shift(bits, 13, out=scratch)
    np.bitwise_and(scratch, 1, out=scratch)
    np.add(bits, scratch, out=bits)
    np.add(bits, 0x0FFF, out=bits)
    np.right_shift(bits, 13, out=bits)
    np.right_shift(bits, 3, out=scratch)
    np.bitwise_and(scratch, 0x8000, out=scratch)
    np.bitwise_or(bits, scratch, out=bits)
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def largest(x: Floats, axis: int, scratch: Floats, *, half: bool) -> Floats:
    """Largest magnitude along `axis` (kept with size 1).

    `half`: the numbers came from float16, so 2**16 and above stand for infinity and NaN.

    Raises:
        BadBlock: a number is NaN, infinite or too large to be a key or value.
    """
    np.absolute(x, out=scratch)
    found: NDArray[np.int32] = np.max(scratch.view(np.int32), axis=axis, keepdims=True)
    if int(found.max()) >= (_LIMIT_FLOAT16 if half else _LIMIT_FLOAT32):
        raise BadBlock(
            "The KV to encode has a NaN, an infinity or a number beyond all reason.",
            hint="The prefill that made it is broken: send token ids instead.",
        )
    return found.view(np.float32)


def scale_bits(magnitude: Floats, levels: int) -> NDArray[np.uint16]:
    """Stored bits of the smallest scale that keeps `magnitude / scale` within `levels`."""
    exact = magnitude * np.float32(1.0 / levels)
    bits = (exact.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
    stored: NDArray[np.uint16] = np.maximum(bits, MIN_SCALE_BITS).astype("<u2")
    return stored


def scales_of(bits: NDArray[np.uint16]) -> Floats:
    """The float32 scales that `bits` stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_scales(bits: NDArray[np.uint16]) -> None:
    """Raises BadBlock where a scale is not one that `scale_bits` can have made."""
    if int(bits.min()) < MIN_SCALE_BITS or int(bits.max()) > MAX_SCALE_BITS:
        raise BadBlock("A KV payload has a scale out of range.", hint="Recompute this block.")


def store(x: Floats, bits: int, out: Array) -> None:
    """Round `x` to integers and store them with 8 or 4 bits; destroys `x`.

    `out`: int8 like `x`, or uint8 with half the last axis. The low nibble is the first half of
    the axis plus 8, the high nibble the second half plus 8.
    """
    np.rint(x, out=x)
    if bits == 8:
        np.copyto(out, x, casting="unsafe")
        return
    dim = x.shape[-1]
    half = dim // 2
    if dim % 16:
        low, high = x[..., :half], x[..., half:]
        np.multiply(high, np.float32(16), out=high)
        np.add(high, low, out=high)
        np.add(high, np.float32(8 * 16 + 8), out=high)
        np.copyto(out, high, casting="unsafe")
        return
    # Eight numbers at a time. In two's complement, plus 8 is the other fourth bit.
    whole = np.empty(x.shape, np.int8)
    np.copyto(whole, x, casting="unsafe")
    words = whole.reshape(-1).view(np.uint64)
    np.bitwise_and(words, _LOW_NIBBLES, out=words)
    np.bitwise_xor(words, _FOURTH_BITS, out=words)
    pairs = words.reshape(-1, 2, dim // 16)
    packed = pairs[:, 1] << np.uint64(4)
    np.bitwise_or(packed, pairs[:, 0], out=packed)
    np.copyto(out, packed.view(np.uint8).reshape(out.shape))


def load(stored: Array, bits: int, out: Floats) -> None:
    """`out` = the integers in `stored` as floats; the reverse of `store`."""
    if bits == 8:
        np.copyto(out, stored)
        return
    half = out.shape[-1] // 2
    np.copyto(out[..., :half], stored & np.uint8(15))
    np.copyto(out[..., half:], stored >> np.uint8(4))
    np.subtract(out, np.float32(8), out=out)


def halves_directly(bits: NDArray[np.uint16]) -> bool:
    """Whether products under these scales may take the integer way to float16."""
    return int(bits.min()) >= _MIN_NORMAL_SCALE_BITS and int(bits.max()) < _MAX_HALF_SCALE_BITS


def half_scales(scales: Floats) -> Floats:
    """Scales such that products carry float16's exponent in float32's field."""
    return scales * _TO_HALF_EXPONENT
