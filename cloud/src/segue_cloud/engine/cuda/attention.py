"""Attention of single rows over paged KV on a device, without a loop over the rows.

`GatherAttention` is plain torch and works for every dtype, head size and window: it copies the
keys that a step needs and runs torch's fused attention on the copy. `flashinfer` does without it:
it reads the pages where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.attention import Window
from segue_cloud.engine.cuda.shapes import Shape
from segue_cloud.engine.kv_pages import KvPages
from segue_contract.limits import KV_PAGE_TOKENS, MIB
from segue_contract.model.manifest import ModelGeometry

# What one call of the fused attention may see copied, of one layer: 128 rows of 2,048 tokens of an
# 8B-shaped model in bfloat16. Layers copy one after another into the same memory.
_GATHER_BYTES = 1024 * MIB


@dataclass(frozen=True)
class Rows:
    """What the rows of a step see, on the host.

    `tables`: int32 `[rows, pages]`, the pages of each row in order; what lies behind a row's last
    page is never read. `lengths`: int64 `[rows]`, at least 1: tokens a row sees, itself included.
    """

    tables: NDArray[np.int32]
    lengths: NDArray[np.int64]

    @property
    def pages_used(self) -> NDArray[np.int64]:
        """Pages of each row, int64 `[rows]`."""
        used: NDArray[np.int64] = -(-self.lengths // KV_PAGE_TOKENS)
        return used


class PagedAttention(Protocol):
    """One step at a time: `plan`, then in each layer `attend`. With a `shape` everything that
    differs between steps goes into buffers that stay where they are, so that `start` and `attend`
    can be captured once and replayed after another `plan`."""

    def shapes(self, buckets: tuple[int, ...], pages: int) -> list[Shape]:
        """Sizes worth capturing, for these numbers of rows and tables of up to `pages` pages."""
        ...

    def plan(self, rows: Rows, shape: Shape | None) -> None:
        """Bring to the device what the step sees; with a shape, there are as many rows as it has,
        and their tables are no wider."""
        ...

    def start(self) -> None:
        """The first work of a step on the device; part of what is captured."""
        ...

    def attend(self, q: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        """`q` and `out`: `[rows, heads, head_dim]`, contiguous."""
        ...


@dataclass
class _Group:
    """Rows that attend in one call; `tables` int64 `[rows, pages]`, `lengths` int64 `[rows]`."""

    at: torch.Tensor | None
    tables: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class GatherAttention:
    """Implements `PagedAttention` with torch alone, on any device."""

    def __init__(
        self,
        geometry: ModelGeometry,
        pages: KvPages,
        scratch_slot: int,
        window: Window,
        gather_tokens: int = 0,
    ) -> None:
        """`scratch_slot`: a slot of finite numbers, read in place of whatever a row must not see:
        a masked NaN would still reach the sum, as 0 * NaN. `gather_tokens`: bounds one copy,
        rows times padded length; 0: what `_GATHER_BYTES` allows."""
        self._geometry = geometry
        self._pages = pages
        self._device = pages.k[0].device
        self._scratch_slot = scratch_slot
        self._window = window
        token_bytes = 2 * geometry.kv_heads * geometry.head_dim * pages.k[0].dtype.itemsize
        self._gather_tokens = gather_tokens or _GATHER_BYTES // token_bytes
        self._static: dict[Shape, _Group] = {}
        self._groups: list[_Group] = []

    def shapes(self, buckets: tuple[int, ...], pages: int) -> list[Shape]:
        widths = [pages]
        while widths[-1] > 8:
            widths.append(-(-widths[-1] // 4))
        bound = self._gather_tokens // KV_PAGE_TOKENS
        return [Shape(rows, w) for rows in buckets for w in widths if rows * w <= bound]

    def plan(self, rows: Rows, shape: Shape | None) -> None:
        if shape is not None:
            group = self._static_group(shape)
            # Columns behind stay as they were: no length reaches them.
            given = group.tables[:, : rows.tables.shape[1]]
            given.copy_(torch.from_numpy(rows.tables.astype(np.int64)))
            group.lengths.copy_(torch.from_numpy(rows.lengths))
            self._groups = [group]
            return
        self._groups = []
        used = rows.pages_used
        order = np.argsort(used, kind="stable")
        while len(order):
            # From the longest on: rows of like length, so that little is padding.
            longest = KV_PAGE_TOKENS * int(used[order[-1]])
            count = max(1, self._gather_tokens // longest)
            part, order = order[-count:], order[:-count]
            whole = len(part) == len(used)
            width = int(used[part].max())
            self._groups.append(
                _Group(
                    None if whole else torch.from_numpy(part).to(self._device),
                    self._to_device(rows.tables[slice(None) if whole else part, :width]),
                    self._to_device(rows.lengths if whole else rows.lengths[part]),
                )
            )

    def start(self) -> None:
        for group in self._groups:
            self._look_up(group)

    def attend(self, q: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        g = self._geometry
        for group in self._groups:
            assert group.slots is not None, "start comes before the first layer"
            queries = q if group.at is None else q.index_select(0, group.at)
            count = len(queries)
            shape = (g.kv_heads, count, -1, g.head_dim)
            k = self._pages.k[layer].index_select(1, group.slots).view(shape).transpose(0, 1)
            v = self._pages.v[layer].index_select(1, group.slots).view(shape).transpose(0, 1)
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries.view(count, g.kv_heads, g.heads // g.kv_heads, g.head_dim),
                k,
                v,
                attn_mask=group.mask,
            ).reshape(count, g.heads, g.head_dim)
            if group.at is None:
                out.copy_(attended)
            else:
                out.index_copy_(0, group.at, attended)

    def _look_up(self, group: _Group) -> None:
        """The slots that each row reads and what of them it does not see, once for all layers."""
        count, width = group.tables.shape
        position = torch.arange(width * KV_PAGE_TOKENS, device=self._device)
        slots = group.tables[:, position // KV_PAGE_TOKENS] * KV_PAGE_TOKENS
        slots = slots + position % KV_PAGE_TOKENS
        hidden = self._window.hidden(group.lengths - 1, position)
        group.slots = slots.masked_fill(hidden, self._scratch_slot).view(-1)
        mask = torch.zeros(hidden.shape, dtype=self._pages.k[0].dtype, device=self._device)
        group.mask = mask.masked_fill_(hidden, float("-inf")).view(count, 1, 1, -1)

    def _static_group(self, shape: Shape) -> _Group:
        if shape not in self._static:
            tables = torch.zeros(shape.rows, shape.pages, dtype=torch.int64, device=self._device)
            lengths = torch.ones(shape.rows, dtype=torch.int64, device=self._device)
            self._static[shape] = _Group(None, tables, lengths)
        return self._static[shape]

    def _to_device(self, values: NDArray[np.signedinteger]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)
