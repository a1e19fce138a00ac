"""KV arrays to payload bytes and back: K with one scale per channel, V with one per token.

Keys have a few channels that are large for all tokens, values have tokens that are large in all
channels; a scale along that axis keeps the others precise (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray

from segue_contract.errors import BadBlock, BadLength
from segue_contract.kv import kernels
from segue_contract.kv.kernels import Array
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.kv.steps import (
    DEFAULT_STEP,
    MAX_SINK_TOKENS,
    Sections,
    Step,
    check_geometry,
    sections,
    step_named,
)

_K_AXIS, _V_AXIS = 2, 3  # the axis that a scale spans: tokens for K, channels for V
_HALF_MAX = 65504.0


def encode_block(block: KvBlock, step: str = DEFAULT_STEP, *, sink_tokens: int = 0) -> bytes:
    """The payload of all layers of `block`.

    Args:
        block: `k` and `v` float16 or float32 `[layers, kv_heads, 64, head_dim]`; views with any
            strides are read without a copy.
        step: a name of `segue_contract.kv.steps.STEPS`.
        sink_tokens: this many first tokens stay float16 (for the first block of a prompt).

    Raises:
        BadBlock: another shape or dtype, NaN, infinity, or `sink_tokens` out of range.
        BadVersion: no such step.
    """
    chosen = step_named(step)
    geometry = geometry_of(block.k, block.v)
    size = sections(chosen, geometry.layers, geometry.kv_heads, geometry.head_dim, sink_tokens).end
    out = np.empty(size, np.uint8)
    encode_layers(block.k, block.v, chosen, out, sink_tokens=sink_tokens)
    return out.tobytes()


def decode_block(
    payload: bytes | memoryview,
    geometry: KvGeometry,
    step: str = DEFAULT_STEP,
    *,
    id: bytes = bytes(16),
    recipe: str = "",
    dtype: DTypeLike = np.float32,
    sink_tokens: int = 0,
) -> KvBlock:
    """The block whose payload `encode_block` made; `dtype` is float16 or float32.

    Raises:
        BadLength: the payload has not the size that geometry and step ask for.
        BadBlock: a scale is out of range, or float16 cannot hold a number.
        BadVersion: no such step.
    """
    check_geometry(geometry)
    k, v = empty_block(geometry, dtype)
    decode_layers(payload, step_named(step), k, v, sink_tokens=sink_tokens)
    return KvBlock(id, recipe, k, v)


def geometry_of(k: Array, v: Array) -> KvGeometry:
    """Sizes of a block's arrays. Raises BadBlock where they are no block."""
    if k.ndim != 4 or k.shape != v.shape or k.shape[2] != BLOCK_TOKENS:
        raise BadBlock(
            f"K has shape {k.shape} and V {v.shape}; both must be "
            f"[layers, kv_heads, {BLOCK_TOKENS}, head_dim]."
        )
    if k.dtype not in (np.float16, np.float32) or v.dtype not in (np.float16, np.float32):
        raise BadBlock(f"K is {k.dtype} and V {v.dtype}; the codec takes float16 and float32.")
    geometry = KvGeometry(layers=k.shape[0], kv_heads=k.shape[1], head_dim=k.shape[3])
    check_geometry(geometry)
    return geometry


def empty_block(geometry: KvGeometry, dtype: DTypeLike) -> tuple[Array, Array]:
    """Uninitialised K and V of one block, float16 or float32."""
    kind = np.dtype(dtype)
    if kind not in (np.float16, np.float32):
        raise ValueError(f"KV decodes to float16 or float32, not {kind}")
    shape = (geometry.layers, geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
    return np.empty(shape, kind), np.empty(shape, kind)


def encode_layers(
    k: Array, v: Array, step: Step, out: NDArray[np.uint8], *, sink_tokens: int = 0
) -> None:
    """Write the payload of some layers into `out`, which has exactly its size.

    Raises:
        BadBlock: NaN, infinity, or `sink_tokens` out of range.
    """
    if not 0 <= sink_tokens <= MAX_SINK_TOKENS:
        raise BadBlock(f"{sink_tokens} sink tokens; at most {MAX_SINK_TOKENS} are allowed.")
    layers, kv_heads, _, head_dim = k.shape
    where = sections(step, layers, kv_heads, head_dim, sink_tokens)
    assert out.size == where.end
    assert out.dtype == np.uint8
    parts = _Parts(out, where, step, (layers, kv_heads, head_dim), sink_tokens)
    if sink_tokens:
        _keep_sink(k[:, :, :sink_tokens], parts.k_sink)
        _keep_sink(v[:, :, :sink_tokens], parts.v_sink)
    _quantise(k, _K_AXIS, step.k_bits, parts.k_scales, parts.k, sink_tokens)
    _quantise(v, _V_AXIS, step.v_bits, parts.v_scales, parts.v, sink_tokens)


def decode_layers(
    payload: bytes | memoryview | NDArray[np.uint8],
    step: Step,
    k: Array,
    v: Array,
    *,
    sink_tokens: int = 0,
) -> None:
    """Fill `k` and `v`, C-contiguous `[layers, kv_heads, 64, head_dim]`, from a payload.

    Raises:
        BadLength, BadBlock: as `decode_block`.
    """
    layers, kv_heads, _, head_dim = k.shape
    if not 0 <= sink_tokens <= MAX_SINK_TOKENS:
        raise BadBlock(f"{sink_tokens} sink tokens; at most {MAX_SINK_TOKENS} are allowed.")
    where = sections(step, layers, kv_heads, head_dim, sink_tokens)
    data = np.frombuffer(payload, np.uint8)
    if data.size != where.end:
        raise BadLength(f"A KV payload has {data.size} bytes where {where.end} belong.")
    parts = _Parts(data, where, step, (layers, kv_heads, head_dim), sink_tokens)
    _dequantise(parts.k, parts.k_scales, step.k_bits, k)
    _dequantise(parts.v, parts.v_scales, step.v_bits, v)
    if sink_tokens:
        k[:, :, :sink_tokens] = parts.k_sink
        v[:, :, :sink_tokens] = parts.v_sink


class _Parts:
    """A payload's sections as arrays over the same memory."""

    def __init__(
        self,
        data: NDArray[np.uint8],
        where: Sections,
        step: Step,
        sizes: tuple[int, int, int],
        sink: int,
    ) -> None:
        layers, heads, dim = sizes

        def part(start: int, stop: int, dtype: str, *shape: int) -> Array:
            return data[start:stop].view(dtype).reshape(layers, heads, *shape)

        def numbers(start: int, stop: int, bits: int) -> Array:
            dtype = "i1" if bits == 8 else "u1"
            return part(start, stop, dtype, BLOCK_TOKENS, dim * bits // 8)

        self.k_scales = part(where.k_scales, where.v_scales, "<u2", 1, dim)
        self.v_scales = part(where.v_scales, where.k_sink, "<u2", BLOCK_TOKENS, 1)
        self.k_sink = part(where.k_sink, where.v_sink, "<f2", sink, dim)
        self.v_sink = part(where.v_sink, where.k, "<f2", sink, dim)
        self.k = numbers(where.k, where.v, step.k_bits)
        self.v = numbers(where.v, where.end, step.v_bits)


def _tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs of layers whose float32 form stays in the cache."""
    step = max(1, kernels.TILE_BYTES // (4 * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _quantise(x: Array, axis: int, bits: int, scales: Array, out: Array, sink: int) -> None:
    """Fill `scales` and `out` from `x`; the first `sink` tokens count as zero."""
    levels = 2 ** (bits - 1) - 1
    half = x.dtype == np.float16
    first = next(_tiles(x.shape))
    shape = (first.stop, *x.shape[1:])
    values, scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for tile in _tiles(x.shape):
        source, count = x[tile], tile.stop - tile.start
        buffer = values[:count]
        if half:
            kernels.half_to_float(source, buffer)
            source = buffer
        if sink:
            np.copyto(buffer, source)
            buffer[:, :, :sink] = 0
            source = buffer
        magnitude = kernels.largest(source, axis, scratch[:count], half=half)
        stored = kernels.scale_bits(magnitude, levels)
        scales[tile] = stored
        np.multiply(source, np.float32(1) / kernels.scales_of(stored), out=buffer)
        kernels.store(buffer, bits, out[tile])


def _dequantise(stored: Array, scale_bits: Array, bits: int, out: Array) -> None:
    """Fill `out` (float16 or float32) with the numbers that `stored` stands for."""
    kernels.check_scales(scale_bits)
    scales = kernels.scales_of(scale_bits)
    if out.dtype == np.float32:
        for tile in _tiles(out.shape):
            kernels.load(stored[tile], bits, out[tile])
            np.multiply(out[tile], scales[tile], out=out[tile])
        return
    direct = kernels.halves_directly(scale_bits)
    if direct:
        scales = kernels.half_scales(scales)
    elif float(scales.max()) * (2 ** (bits - 1) - 1) > _HALF_MAX * (1 + 2**-6):
        raise BadBlock(
            "A KV payload has numbers that float16 cannot hold.", hint="Decode it to float32."
        )
    first = next(_tiles(out.shape))
    shape = (first.stop, *out.shape[1:])
    values, scratch = np.empty(shape, np.float32), np.empty(shape, np.uint32)
    for tile in _tiles(out.shape):
        count = tile.stop - tile.start
        buffer = values[:count]
        kernels.load(stored[tile], bits, buffer)
        np.multiply(buffer, scales[tile], out=buffer)
        if direct:
            kernels.float_to_half(buffer, out[tile], scratch[:count])
        else:
            # a scale was rounded up by at most 1/128: its largest number may pass float16's
            np.clip(buffer, -_HALF_MAX, _HALF_MAX, out=buffer)
            np.copyto(out[tile], buffer, casting="unsafe")


def _keep_sink(x: Array, out: Array) -> None:
    """Store the sink tokens as float16. Raises BadBlock where it cannot hold one."""
    if not bool((np.abs(x) <= _HALF_MAX).all()):
        raise BadBlock("A sink token has a number that float16 cannot hold.")
    np.copyto(out, x, casting="unsafe")
