"""Compile the CPU kernels of a geometry ahead of the first start."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import torch

from segue_cloud.engine.attention import CompiledOps, Window
from segue_cloud.engine.kv_pages import KvPages
from segue_cloud.engine.options import choose_dtype
from segue_cloud.engine.weights import LayerTensors
from segue_contract.model.manifest import ModelGeometry


def prepare_kernels(geometry: ModelGeometry, dtype: str = "auto") -> bool:
    """Fill the kernel cache for what an engine with this dtype will ask for on this machine.

    Takes some seconds the first time. False where numba is not installed: nothing to prepare.
    """
    if find_spec("numba") is None:
        return False
    chosen = choose_dtype(dtype, "cpu")
    if chosen == torch.bfloat16 and _prepare_step(geometry):
        return True
    CompiledOps(geometry, KvPages(geometry.kv, 1, chosen, "cpu")).load_kernels()
    return True


def _prepare_step(geometry: ModelGeometry) -> bool:
    """The compiled step, whose code is the same for all sizes: of a model that is quickly made."""
    from segue_cloud.engine.native.model import NativeModel
    from segue_cloud.engine.native.pages import NativePages
    from segue_cloud.engine.native.runner import serves

    if not serves(geometry):
        return False
    small = ModelGeometry(
        layers=1,
        hidden=32,
        heads=1,
        kv_heads=1,
        head_dim=16,
        ffn=16,
        vocab=32,
        context=16,
        rope_base=10000.0,
        norm_eps=1e-5,
    )
    tables = np.zeros((1, 1), np.int32)
    pages = NativePages(small.kv, 1)
    model = NativeModel(small, _Zeros(small), pages, Window(), 1, tables, max_rows=1)
    model.start()
    model.close()
    return True


class _Zeros:
    """Implements `native.model.TensorSource`."""

    def __init__(self, geometry: ModelGeometry) -> None:
        self._geometry = geometry

    def layers(self) -> Iterator[LayerTensors]:
        g = self._geometry
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        for _ in range(g.layers):
            yield LayerTensors(
                input_norm=torch.ones(g.hidden),
                qkv=self._weight(q + 2 * kv, g.hidden),
                out=self._weight(g.hidden, q),
                ffn_norm=torch.ones(g.hidden),
                gate=self._weight(g.ffn, g.hidden),
                up=self._weight(g.ffn, g.hidden),
                down=self._weight(g.hidden, g.ffn),
            )

    def final_norm(self) -> torch.Tensor:
        return torch.ones(self._geometry.hidden)

    def embed(self) -> torch.Tensor:
        return self._weight(self._geometry.vocab, self._geometry.hidden)

    def head(self, embed: torch.Tensor) -> torch.Tensor:
        return embed

    def _weight(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)
