"""The codec keeps every number within half a step of its scale, and refuses what it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segue_contract.errors import BadBlock, BadLength, BadVersion
from segue_contract.kv.kernels import float_to_half, half_scales, half_to_float, load, store
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import STEPS, payload_bytes, step_of_code

SMOL = KvGeometry(layers=30, kv_heads=3, head_dim=64)
RECIPE = "00" * 16


def arrays(seed: int, geometry: KvGeometry, spread: float, dtype: str) -> tuple[NDArray, NDArray]:
    """Random K and V with channels and tokens of very different size, as models have them."""
    random = np.random.default_rng(seed)
    shape = (geometry.layers, geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
    k = random.standard_normal(shape) * 10 ** random.uniform(-spread, spread, shape[3])
    v = random.standard_normal(shape) * 10 ** random.uniform(-spread, spread, (shape[2], 1))
    return k.astype(dtype), v.astype(dtype)


geometries = st.builds(
    KvGeometry,
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16, 64]),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    geometry=geometries,
    spread=st.sampled_from([0.0, 1.0, 2.5]),
    dtype=st.sampled_from(["float16", "float32"]),
    step=st.sampled_from(sorted(STEPS)),
    sink=st.sampled_from([0, 1, 4]),
)
def test_round_trip_stays_within_half_a_step(
    seed: int, geometry: KvGeometry, spread: float, dtype: str, step: str, sink: int
) -> None:
    k, v = arrays(seed, geometry, spread, dtype)
    payload = encode_block(KvBlock(b"b" * 16, RECIPE, k, v), step, sink_tokens=sink)
    assert len(payload) == payload_bytes(STEPS[step], geometry, geometry.layers, sink)
    back = decode_block(payload, geometry, step, id=b"b" * 16, recipe=RECIPE, sink_tokens=sink)
    assert (back.id, back.recipe) == (b"b" * 16, RECIPE)
    for got, sent, axis, bits in (
        (back.k, k, 2, STEPS[step].k_bits),
        (back.v, v, 3, STEPS[step].v_bits),
    ):
        assert got.dtype == np.float32
        exact = sent.astype(np.float64)
        body = exact.copy()
        body[:, :, :sink] = 0
        levels = 2 ** (bits - 1) - 1
        # a scale is rounded up by at most 1/128; 1e-6 for float32's own rounding
        half_step = np.abs(body).max(axis=axis, keepdims=True) / levels * 0.5
        bound = half_step * (1 + 2**-7) * (1 + 1e-6) + 2.0**-65
        error = np.abs(got.astype(np.float64) - exact)
        assert (error[:, :, sink:] <= np.broadcast_to(bound, error.shape)[:, :, sink:]).all()
        assert (got[:, :, :sink] == sent[:, :, :sink].astype(np.float16)).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 1.0, 3.0, 4.0]),
    step=st.sampled_from(sorted(STEPS)),
)
def test_float16_output_is_the_rounded_float32_output(seed: int, spread: float, step: str) -> None:
    geometry = KvGeometry(layers=3, kv_heads=2, head_dim=16)
    k, v = arrays(seed, geometry, spread, "float32")
    k, v = k.clip(-60000, 60000), v.clip(-60000, 60000)
    payload = encode_block(KvBlock(b"b" * 16, RECIPE, k, v), step)
    wide = decode_block(payload, geometry, step)
    narrow = decode_block(payload, geometry, step, dtype=np.float16)
    assert narrow.k.dtype == np.float16
    assert narrow.k.tobytes() == wide.k.astype(np.float16).tobytes()
    assert narrow.v.tobytes() == wide.v.astype(np.float16).tobytes()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), dim=st.sampled_from([2, 6, 16, 24, 32, 64, 80]))
def test_every_pair_of_nibbles_is_the_first_half_and_the_second(seed: int, dim: int) -> None:
    random = np.random.default_rng(seed)
    numbers = random.integers(-7, 8, (3, 2, 5, dim))
    jitter = random.uniform(-0.49, 0.49, numbers.shape)
    out = np.empty((3, 2, 5, dim // 2), np.uint8)
    store((numbers + jitter).astype(np.float32), 4, out)
    np.testing.assert_array_equal(out & 15, numbers[..., : dim // 2] + 8)
    np.testing.assert_array_equal(out >> 4, numbers[..., dim // 2 :] + 8)
    back = np.empty(numbers.shape, np.float32)
    load(out, 4, back)
    np.testing.assert_array_equal(back, numbers)


def test_every_finite_half_converts_exactly_both_ways() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = every[np.isfinite(every)]
    floats = np.empty(halves.shape, np.float32)
    half_to_float(halves, floats)
    assert floats.tobytes() == halves.astype(np.float32).tobytes()
    normal = np.abs(halves) >= 2.0**-14
    back = np.empty(int(normal.sum()), np.float16)
    float_to_half(half_scales(floats[normal]), back, np.empty(back.shape, np.uint32))
    assert back.tobytes() == halves[normal].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_views_with_strides_encode_as_their_copies(dtype: str) -> None:
    random = np.random.default_rng(3)
    cache = random.standard_normal((4, 2, 200, 16)).astype(dtype)
    k, v = cache[:, :, 70:134], cache[::-1, :, 3:67]
    strided = encode_block(KvBlock(b"b" * 16, RECIPE, k, v))
    assert strided == encode_block(KvBlock(b"b" * 16, RECIPE, k.copy(), v.copy()))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("sink", [0, 2])
def test_numbers_that_are_none_are_refused_wherever_they_are(
    dtype: str, bad: float, sink: int
) -> None:
    geometry = KvGeometry(layers=2, kv_heads=1, head_dim=8)
    for array in (0, 1):
        for place in ((0, 0, 0, 0), (1, 0, 63, 7), (0, 0, 31, 4)):
            pair = arrays(1, geometry, 0.0, dtype)
            pair[array][place] = bad
            with pytest.raises(BadBlock, match=r"NaN|float16"):
                encode_block(KvBlock(b"b" * 16, RECIPE, *pair), sink_tokens=sink)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_extremes_survive(dtype: str) -> None:
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=4)
    shape = (1, 1, BLOCK_TOKENS, 4)
    zeros = np.zeros(shape, dtype)
    largest = np.full(shape, 65504, dtype)
    tiny = np.full(shape, 6e-8, dtype)  # the smallest float16
    for k in (zeros, largest, -largest, tiny):
        block = KvBlock(b"b" * 16, RECIPE, k, zeros)
        for out in (np.float16, np.float32):
            back = decode_block(encode_block(block), geometry, dtype=out)
            assert np.allclose(back.k.astype(float), k.astype(float), rtol=0.01, atol=0)
            assert not back.v.any()


def test_what_float16_cannot_hold_is_an_error_and_no_infinity() -> None:
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=4)
    k = np.full((1, 1, BLOCK_TOKENS, 4), 1e6, np.float32)
    payload = encode_block(KvBlock(b"b" * 16, RECIPE, k, k))
    assert np.allclose(decode_block(payload, geometry).k, k, rtol=0.01)
    with pytest.raises(BadBlock, match="float16"):
        decode_block(payload, geometry, dtype=np.float16)
    with pytest.raises(BadBlock, match="beyond all reason"):
        encode_block(KvBlock(b"b" * 16, RECIPE, k * 1e30, k))


def test_what_is_no_block_is_refused() -> None:
    good = np.zeros((2, 1, BLOCK_TOKENS, 8), np.float32)
    for k, v in (
        (good[:, :, :63], good[:, :, :63]),
        (good, good[:1]),
        (good[0], good[0]),
        (good.astype(np.float64), good),
        (good[..., :7], good[..., :7]),
        (good[:0], good[:0]),
    ):
        with pytest.raises(BadBlock):
            encode_block(KvBlock(b"b" * 16, RECIPE, k, v))
    with pytest.raises(BadVersion):
        encode_block(KvBlock(b"b" * 16, RECIPE, good, good), "k2v2")
    with pytest.raises(BadVersion):
        step_of_code(99)
    with pytest.raises(BadBlock):
        encode_block(KvBlock(b"b" * 16, RECIPE, good, good), sink_tokens=9)


def test_payloads_of_wrong_length_or_scale_are_refused() -> None:
    geometry = KvGeometry(layers=2, kv_heads=1, head_dim=8)
    payload = encode_block(KvBlock(b"b" * 16, RECIPE, *arrays(1, geometry, 0.0, "float32")))
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(BadLength):
            decode_block(wrong, geometry)
    for scale in (b"\x00\x00", b"\xff\xff", b"\x80\x7f", b"\x01\x80"):  # 0, NaN, inf, -subnormal
        with pytest.raises(BadBlock, match="scale"):
            decode_block(scale + payload[2:], geometry)


def test_int8_takes_at_most_55_percent_of_float16() -> None:
    k, v = arrays(5, SMOL, 1.0, "float32")
    payload = encode_block(KvBlock(b"b" * 16, RECIPE, k, v))
    assert len(payload) <= 0.55 * SMOL.fp16_bytes_per_block
