"""The ladder of KV codec steps, and where each part of a payload lies.

A payload holds layers [a, b) of one block, little-endian, sections in this order and without gaps:

    k_scales  uint16  [layers, kv_heads, 1, head_dim]    one per channel
    v_scales  uint16  [layers, kv_heads, 64, 1]          one per token
    k_sink    float16 [layers, kv_heads, sink, head_dim] the first `sink` tokens, not quantised
    v_sink    float16 [layers, kv_heads, sink, head_dim]
    k         int8    [layers, kv_heads, 64, head_dim], or two 4-bit values to a byte:
    v         uint8   [layers, kv_heads, 64, head_dim / 2]

A scale is the upper half of a float32 (bfloat16), rounded up: two bytes as float16 would take, the
range of float32, so it neither overflows nor goes subnormal, and since it is rounded up, no value
is ever clipped. Its coarse mantissa costs at most 1/128 of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.errors import BadBlock, BadVersion
from segue_contract.kv.layout import BLOCK_TOKENS, KvGeometry
from segue_contract.limits import (
    MAX_KV_BLOCK_BYTES,
    MAX_KV_HEAD_DIM,
    MAX_KV_HEADS,
    MAX_KV_LAYERS,
)

MAX_SINK_TOKENS = 8  # attention sinks are the first one to four tokens


@dataclass(frozen=True)
class Step:
    """One step of the ladder: bits per number of K and V. `code` is its name on the wire."""

    name: str
    code: int
    k_bits: int
    v_bits: int


STEPS = {
    step.name: step
    for step in (Step("k8v8", 1, 8, 8), Step("k8v4", 2, 8, 4), Step("k4v4", 3, 4, 4))
}
DEFAULT_STEP = "k8v8"
_SINK_COUNTS = {str(count) for count in range(1, MAX_SINK_TOKENS + 1)}
_BY_CODE = {step.code: step for step in STEPS.values()}


def step_named(name: str) -> Step:
    """Raises BadVersion where this version has no such step."""
    step = STEPS.get(name)
    if step is None:
        raise BadVersion(f"There is no KV codec step {name!r}.", hint=f"Use one of {list(STEPS)}.")
    return step


@dataclass(frozen=True)
class Codec:
    """What a recipe's `codec` says: a step, and how many of a prompt's first tokens stay float16.

    Written "k8v8", or "k4v4-sink4" with sinks: the first block of a prompt carries them.
    """

    step: Step
    sink_tokens: int = 0

    def sinks_of(self, block: int) -> int:
        """Sink tokens of the prompt's block number `block`."""
        return self.sink_tokens if block == 0 else 0


def codec_named(name: str) -> Codec:
    """Raises BadVersion where this version has no such codec."""
    step, mark, count = name.partition("-sink")
    if not mark:
        return Codec(step_named(name))
    if count not in _SINK_COUNTS:
        raise BadVersion(
            f"There is no KV codec {name!r}.", hint=f"1 to {MAX_SINK_TOKENS} tokens may be sinks."
        )
    return Codec(step_named(step), int(count))


def step_of_code(code: int) -> Step:
    """Raises BadVersion where this version has no such step."""
    step = _BY_CODE.get(code)
    if step is None:
        raise BadVersion(
            f"A KV frame uses codec step {code}, unknown here.",
            hint="Run the same version of Segue on both sides.",
        )
    return step


def check_geometry(geometry: KvGeometry) -> None:
    """Raises BadBlock where a size is outside the limits."""
    inside = (
        0 < geometry.layers <= MAX_KV_LAYERS
        and 0 < geometry.kv_heads <= MAX_KV_HEADS
        and 0 < geometry.head_dim <= MAX_KV_HEAD_DIM
        and geometry.head_dim % 2 == 0
        and geometry.fp16_bytes_per_block <= MAX_KV_BLOCK_BYTES
    )
    if not inside:
        raise BadBlock(f"A KV geometry of {geometry} is outside the limits.")


@dataclass(frozen=True)
class Sections:
    """Byte offsets of a payload's sections; each section ends where the next begins."""

    k_scales: int
    v_scales: int
    k_sink: int
    v_sink: int
    k: int
    v: int
    end: int


def sections(
    step: Step, layers: int, kv_heads: int, head_dim: int, sink_tokens: int = 0
) -> Sections:
    """Where the parts of a payload of `layers` layers lie; `end` is its size in bytes."""
    heads = layers * kv_heads
    numbers = heads * BLOCK_TOKENS * head_dim
    sink = 2 * heads * sink_tokens * head_dim
    v_scales = 2 * heads * head_dim
    k_sink = v_scales + 2 * heads * BLOCK_TOKENS
    v_sink = k_sink + sink
    k = v_sink + sink
    v = k + numbers * step.k_bits // 8
    return Sections(0, v_scales, k_sink, v_sink, k, v, v + numbers * step.v_bits // 8)


def payload_bytes(step: Step, geometry: KvGeometry, layers: int, sink_tokens: int = 0) -> int:
    """Size in bytes of a payload that holds `layers` layers."""
    return sections(step, layers, geometry.kv_heads, geometry.head_dim, sink_tokens).end
