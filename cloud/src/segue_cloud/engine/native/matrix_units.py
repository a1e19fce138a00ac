"""Large steps on CPUs with matrix units (AMX): their linear layers through oneDNN.

The tiles use the vector units alone. A CPU with AMX multiplies several times faster than those,
once there are rows enough; oneDNN knows how. Such steps are computed with a second copy of the
linear layers, laid out for it, and their numbers are rounded a little differently.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.options import available_memory_bytes
from segue_cloud.engine.weights import Layer, LayerTensors
from segue_contract.model.manifest import ModelGeometry

# Below it a weight is read for so few rows that memory decides, not multiplying.
ROWS = 48
_COPY_SHARE = 0.25  # of the free memory, at most


class MatrixUnits:
    """The linear layers as torch computes them. `rows`: from how many on they are used."""

    def __init__(self, layers: Iterable[LayerTensors], rows: int = ROWS) -> None:
        self.rows = rows
        self.layers = [Layer.of(layer) for layer in layers]

    @staticmethod
    def view(bits: NDArray[np.uint16]) -> torch.Tensor:
        """The bits of bfloat16 as a tensor over the same memory."""
        return torch.from_numpy(bits).view(torch.bfloat16)


def pay_off(geometry: ModelGeometry, pool_bytes: int) -> bool:
    """Whether this CPU has AMX for bfloat16, lets us use it, and has room for the second copy."""
    g = geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    copy = 2 * g.layers * g.hidden * (2 * q + 2 * kv + 3 * g.ffn)
    panels = copy + 4 * g.vocab * g.hidden
    free = available_memory_bytes() - panels - pool_bytes
    return (
        copy <= free * _COPY_SHARE
        and bool(torch.cpu._is_amx_tile_supported())
        and bool(torch.cpu._init_amx())
    )
