"""Pages of keys and values in the order in which the tiles of attention read them.

A page is 16 tokens of one head in one layer. Keys: `[head_dim / 2, 16 tokens, 2]`, a panel whose
outputs are the tokens. Values: `[8 pairs of tokens, head_dim, 2]`, a panel whose inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.kv_pages import as_tensor
from segue_cloud.engine.native.panels import reserve
from segue_contract.kv.layout import KvBlock, KvGeometry
from segue_contract.limits import KV_PAGE_TOKENS


class NativePages:
    """`bits`: uint16 `[layers, 2, kv_heads, pages, 16 * head_dim]`, the bits of bfloat16."""

    def __init__(self, geometry: KvGeometry, pages: int) -> None:
        shape = (geometry.layers, 2, geometry.kv_heads, pages, KV_PAGE_TOKENS * geometry.head_dim)
        self.geometry = geometry
        # The system gives memory, and zeros, to pages as they are first used.
        self.bits = reserve(int(np.prod(shape)), huge=False).reshape(shape)
        self._all = torch.from_numpy(self.bits).view(torch.bfloat16)

    def write_block(self, pages: Sequence[int], block: KvBlock) -> None:
        """Put a 64-token block into its pages, rounded to bfloat16."""
        at = torch.tensor(list(pages))
        for part, values in ((0, block.k), (1, block.v)):
            tensor = as_tensor(values).to(torch.bfloat16).contiguous()
            paged = self._turned(tensor, part).flatten(3)
            self._all[:, part].index_copy_(2, at, paged)

    def read_block(self, pages: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of four pages, float32 `[layers, kv_heads, 64, head_dim]` each."""
        g = self.geometry
        at = torch.tensor(list(pages))
        k = self._all[:, 0].index_select(2, at).view(g.layers, g.kv_heads, len(pages), -1, 16, 2)
        v = self._all[:, 1].index_select(2, at).view(g.layers, g.kv_heads, len(pages), 8, -1, 2)
        back = (k.permute(0, 1, 2, 4, 3, 5), v.permute(0, 1, 2, 3, 5, 4))
        shape = (g.layers, g.kv_heads, len(pages) * KV_PAGE_TOKENS, g.head_dim)
        keys, values = (part.reshape(shape).float().numpy() for part in back)
        return keys, values

    def _turned(self, tensor: torch.Tensor, part: int) -> torch.Tensor:
        """`[layers, kv_heads, tokens, head_dim]` as pages."""
        layers, heads, tokens, head_dim = tensor.shape
        count = tokens // KV_PAGE_TOKENS
        if part == 0:
            cut = tensor.view(layers, heads, count, KV_PAGE_TOKENS, head_dim // 2, 2)
            return cut.permute(0, 1, 2, 4, 3, 5)
        cut = tensor.view(layers, heads, count, KV_PAGE_TOKENS // 2, 2, head_dim)
        return cut.permute(0, 1, 2, 3, 5, 4)
