"""Shape and identity of KV blocks.

A block is the KV of 64 consecutive tokens in all layers, keys after RoPE, as ONNX Runtime's
GroupQueryAttention and Llama-family models hold them: per layer `[kv_heads, tokens, head_dim]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from segue_contract.ids import digest
from segue_contract.limits import KV_BLOCK_TOKENS

BLOCK_TOKENS = KV_BLOCK_TOKENS
ROOT_PARENT = bytes(16)


class KvGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes that decide the bytes of a block."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def fp16_bytes_per_token(self) -> int:
        return 4 * self.layers * self.kv_heads * self.head_dim

    @property
    def fp16_bytes_per_block(self) -> int:
        return self.fp16_bytes_per_token * BLOCK_TOKENS


class KvRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """How a block's numbers came to be. Two sides may share blocks only under one recipe.

    `weights_digest` is that of the source weights; `weight_quant` how the computing side held
    them ("fp32", "bf16", "w8a8-smooth", ...); `rope` the base and scaling; `codec` the ladder step.
    """

    weights_digest: str
    weight_quant: str
    rope: str
    layout: str = "khtd-64-postrope"
    codec: str = "k8v8"

    @property
    def digest(self) -> str:
        """32 hex digits over the canonical MessagePack of all fields."""
        return digest(b"segue-recipe-1", msgspec.msgpack.encode(self)).hex()


@dataclass(frozen=True)
class KvBlock:
    """One block. `k`, `v`: `[layers, kv_heads, 64, head_dim]`, float16 or float32."""

    id: bytes
    recipe: str
    k: NDArray[np.generic]
    v: NDArray[np.generic]


def block_id(recipe: str, parent: bytes, tokens: Sequence[int]) -> bytes:
    """16 bytes naming the KV of `tokens` (64 of them) after the block `parent` under `recipe`."""
    if len(tokens) != BLOCK_TOKENS:
        raise ValueError(f"a block has {BLOCK_TOKENS} tokens, not {len(tokens)}")
    ids = np.asarray(tokens, dtype="<u4").tobytes()
    return digest(b"segue-block-1", recipe.encode(), parent, ids)


def block_ids(recipe: str, tokens: Sequence[int]) -> list[bytes]:
    """Ids of all full blocks of a prompt, in order; the tail under 64 tokens has none."""
    ids: list[bytes] = []
    parent = ROOT_PARENT
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = block_id(recipe, parent, tokens[start : start + BLOCK_TOKENS])
        ids.append(parent)
    return ids
