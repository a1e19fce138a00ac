"""Attention over pages by FlashInfer: it reads keys and values where they lie in the pool.

FlashInfer calls our layout HND: `[pages, kv_heads, page_tokens, head_dim]`. Ours has the heads
outermost, which is the same memory seen with other strides, and its kernels take strides
(`paged_kv_t` in its `page.cuh`), so nothing is copied or laid out anew.
https://docs.flashinfer.ai/api/decode.html
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from segue_cloud.engine.attention import Window
from segue_cloud.engine.cuda.attention import GatherAttention, PagedAttention, Rows
from segue_cloud.engine.cuda.shapes import Shape
from segue_cloud.engine.kv_pages import KvPages
from segue_contract.limits import KV_PAGE_TOKENS, MIB
from segue_contract.model.manifest import ModelGeometry

log = structlog.get_logger(__name__)

_WORKSPACE_BYTES = 128 * MIB  # FlashInfer's own recommendation
_HEAD_DIMS = (64, 128, 256)
# From this many query heads per KV head on, its tensor-core kernels are the faster ones; the others
# are compiled for few group sizes only, which do not include 3.
_TENSOR_CORE_GROUP = 3


def choose_attention(
    geometry: ModelGeometry, pages: KvPages, scratch_slot: int, window: Window
) -> PagedAttention:
    """FlashInfer where it is installed and serves this model; else torch, and the log says why."""
    reason = why_not(geometry, pages.k[0].dtype, pages.k[0].device.type, window)
    if not reason:
        try:
            return FlashInferAttention(geometry, pages)
        except Exception as error:  # it compiles its kernels at the first use
            log.warning("flashinfer_failed", error=str(error)[:500])
            reason = "it does not start; a CUDA toolkit of torch's version lets it compile"
    log.info("attention_by_torch", flashinfer=reason)
    return GatherAttention(geometry, pages, scratch_slot, window)


def why_not(geometry: ModelGeometry, dtype: torch.dtype, device: str, window: Window) -> str:
    """Why FlashInfer is not used; empty where it can be."""
    if device != "cuda":
        return "it needs a CUDA device"
    if find_spec("flashinfer") is None:
        return "not installed; pip install 'segue[cloud-gpu]' makes decoding faster"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    if geometry.head_dim not in _HEAD_DIMS:
        return f"it has no kernels for heads of {geometry.head_dim}"
    if window.tokens:
        return "it has no window that keeps the first tokens"
    return ""


def page_index(rows: Rows) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """The rows' pages in FlashInfer's form: `indptr` int32 `[rows + 1]`, `indices` int32 (row r's
    pages are `indices[indptr[r]:indptr[r + 1]]`), `last_page_len` int32 `[rows]`, from 1 to 16."""
    used = rows.pages_used
    indptr = np.zeros(len(used) + 1, np.int32)
    np.cumsum(used, out=indptr[1:])
    inside = np.arange(rows.tables.shape[1])[None, :] < used[:, None]
    last = ((rows.lengths - 1) % KV_PAGE_TOKENS + 1).astype(np.int32)
    return indptr, np.ascontiguousarray(rows.tables[inside], np.int32), last


class FlashInferAttention:
    """Implements `PagedAttention`. Raises whatever FlashInfer raises where it cannot work here."""

    def __init__(self, geometry: ModelGeometry, pages: KvPages) -> None:
        self._library: Any = import_module("flashinfer")
        self._geometry = geometry
        self._dtype = pages.k[0].dtype
        self._device = pages.k[0].device
        self._caches = [(_by_page(k), _by_page(v)) for k, v in zip(pages.k, pages.v, strict=True)]
        # Zeros: some of its kernels count in it and leave it as they found it.
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._eager = self._wrapper()
        self._static: dict[Shape, Any] = {}
        self._indices: torch.Tensor | None = None
        self._now = self._eager
        self._try_out()

    def shapes(self, buckets: tuple[int, ...], pages: int) -> list[Shape]:
        if self._indices is None:  # one for all shapes: only one of them runs at a time
            size = max(buckets) * pages
            self._indices = torch.zeros(size, dtype=torch.int32, device=self._device)
        return [Shape(rows, pages) for rows in buckets]

    def plan(self, rows: Rows, shape: Shape | None) -> None:
        g = self._geometry
        self._now = self._eager if shape is None else self._static_wrapper(shape)
        indptr, indices, last = (torch.from_numpy(part) for part in page_index(rows))
        self._now.plan(
            indptr,
            indices,
            last,
            g.heads,
            g.kv_heads,
            g.head_dim,
            KV_PAGE_TOKENS,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            sm_scale=1.0 / math.sqrt(g.head_dim),
        )

    def start(self) -> None:
        """Nothing: the plan brought everything."""

    def attend(self, q: torch.Tensor, layer: int, out: torch.Tensor) -> None:
        self._now.run(q, self._caches[layer], out=out)

    def _wrapper(self, **static: Any) -> Any:
        group = self._geometry.heads // self._geometry.kv_heads
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_tensor_cores=group >= _TENSOR_CORE_GROUP,
            **static,
        )

    def _static_wrapper(self, shape: Shape) -> Any:
        if shape not in self._static:
            assert self._indices is not None, "shapes are asked for before they are used"
            self._static[shape] = self._wrapper(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=torch.zeros(
                    shape.rows + 1, dtype=torch.int32, device=self._device
                ),
                paged_kv_indices_buffer=self._indices,
                paged_kv_last_page_len_buffer=torch.ones(
                    shape.rows, dtype=torch.int32, device=self._device
                ),
            )
        return self._static[shape]

    def _try_out(self) -> None:
        """One row over one page: compiles what is not compiled yet, or raises."""
        g = self._geometry
        self.plan(Rows(np.zeros((1, 1), np.int32), np.ones(1, np.int64)), None)
        q = torch.zeros(1, g.heads, g.head_dim, dtype=self._dtype, device=self._device)
        self.attend(q, 0, torch.empty_like(q))
        torch.cuda.synchronize(self._device)


def _by_page(cache: torch.Tensor) -> torch.Tensor:
    """`[kv_heads, slots, head_dim]` seen as `[pages, kv_heads, 16, head_dim]`; the same memory."""
    heads, slots, width = cache.shape
    return cache.view(heads, slots // KV_PAGE_TOKENS, KV_PAGE_TOKENS, width).transpose(0, 1)
