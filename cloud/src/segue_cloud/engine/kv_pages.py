"""The memory behind the block pool: keys and values of all pages, written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from segue_contract.kv.layout import KvBlock, KvGeometry
from segue_contract.limits import KV_PAGE_TOKENS

# Numbers up to which torch copies without its thread pool (at::internal::GRAIN_SIZE).
_ALONE = 32767


class BlockPages(Protocol):
    """Whole blocks in and out of pages, wherever their parts lie."""

    geometry: KvGeometry

    def write_block(self, pages: Sequence[int], block: KvBlock) -> None:
        """Put a 64-token block into four pages, converted to the pool's dtype."""
        ...

    def read_block(self, pages: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of four pages, float32 `[layers, kv_heads, 64, head_dim]` each."""
        ...


class KvPages:
    """`k[layer]`, `v[layer]`: `[kv_heads, pages * 16, head_dim]`; a page is 16 slots in a row."""

    def __init__(self, geometry: KvGeometry, pages: int, dtype: torch.dtype, device: str) -> None:
        slots = pages * KV_PAGE_TOKENS
        shape = (geometry.layers, 2, geometry.kv_heads, slots, geometry.head_dim)
        # empty, not zeros: the machine gives memory to pages as they are first used.
        self._all = torch.empty(shape, dtype=dtype, device=device)
        self.k = [self._all[layer, 0] for layer in range(geometry.layers)]
        self.v = [self._all[layer, 1] for layer in range(geometry.layers)]
        self.geometry = geometry

    def write_block(self, pages: Sequence[int], block: KvBlock) -> None:
        """Put a 64-token block into four pages, converted to the pool's dtype."""
        for part, values in ((0, block.k), (1, block.v)):
            tensor = as_tensor(values)
            if self._all.device.type != "cpu":
                at = torch.from_numpy(slots_of(pages)).to(self._all.device)
                tensor = tensor.to(device=self._all.device, dtype=self._all.dtype)
                self._all[:, part].index_copy_(2, at, tensor)
                continue
            for inside, mine in self._pieces(pages, part):
                mine.copy_(tensor[inside])

    def read_block(self, pages: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of four pages, float32 `[layers, kv_heads, 64, head_dim]` each."""
        if self._all.device.type != "cpu":
            at = torch.from_numpy(slots_of(pages)).to(self._all.device)
            k, v = (self._all[:, part].index_select(2, at).float().cpu().numpy() for part in (0, 1))
            return k, v
        g = self.geometry
        size = len(pages) * KV_PAGE_TOKENS
        both = torch.empty(2, g.layers, g.kv_heads, size, g.head_dim)
        for part in (0, 1):
            for inside, mine in self._pieces(pages, part):
                both[part][inside].copy_(mine)
        return both[0].numpy(), both[1].numpy()

    def _pieces(
        self, pages: Sequence[int], part: int
    ) -> Iterator[tuple[tuple[slice, slice, slice], torch.Tensor]]:
        """The parts of a block and where they lie, each so small that torch copies it alone.

        A copy of some 700,000 numbers takes 0.3 ms; waking a second thread for it takes a time
        slice, some 15 ms, where other programs want the cores.
        """
        g = self.geometry
        layers = max(1, _ALONE // (g.kv_heads * KV_PAGE_TOKENS * g.head_dim))
        for first in range(0, g.layers, layers):
            some = slice(first, first + layers)
            for index, page in enumerate(pages):
                inside = slice(index * KV_PAGE_TOKENS, (index + 1) * KV_PAGE_TOKENS)
                there = slice(page * KV_PAGE_TOKENS, (page + 1) * KV_PAGE_TOKENS)
                yield (some, slice(None), inside), self._all[some, part, :, there]


def slots_of(pages: Sequence[int]) -> NDArray[np.int64]:
    """Slot numbers of all tokens of `pages`, in order."""
    starts = np.asarray(pages, np.int64) * KV_PAGE_TOKENS
    return (starts[:, None] + np.arange(KV_PAGE_TOKENS, dtype=np.int64)).reshape(-1)


def as_tensor(values: NDArray[Any]) -> torch.Tensor:
    """float16 and float32 as they are; uint16 holds the bits of bfloat16."""
    if not values.flags.writeable or not values.flags.c_contiguous:
        values = np.array(values, order="C")
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
