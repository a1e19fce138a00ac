"""How far two KV blocks of the same tokens are from each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segue_contract.kv.layout import KvBlock


def relative_error(block: KvBlock, exact: KvBlock) -> float:
    """Median over layers of |block - exact| / |exact|, Euclidean norms, the larger of keys and
    values. `k`, `v`: `[layers, kv_heads, 64, head_dim]`; uint16 holds the bits of bfloat16.

    The median, since a few layers of a model may have outliers that eight bits hold badly; KV of
    other tokens differs in all of them.
    """
    return max(_median(block.k, exact.k), _median(block.v, exact.v))


def _median(values: NDArray[np.generic], exact: NDArray[np.generic]) -> float:
    one, other = _float32(values).astype(np.float64), _float32(exact).astype(np.float64)
    axes = tuple(range(1, other.ndim))
    size = np.sqrt(np.sum(other * other, axis=axes))
    apart = np.sqrt(np.sum((one - other) ** 2, axis=axes))
    return float(np.median(apart / np.maximum(size, 1e-30)))


def _float32(values: NDArray[np.generic]) -> NDArray[np.float32]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
