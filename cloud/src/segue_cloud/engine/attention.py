"""The operations between two matrix products, in two forms with one meaning.

`CompiledOps` runs the fused CPU kernels; `TorchOps` says the same in plain torch, for other devices
and as the reference in tests. A long chunk of a prompt goes through torch's own attention in both
(`attend_segment`): there the matrix units count, and the keys are gathered once per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.bias import causal_lower_right

from segue_cloud.engine.kv_pages import KvPages, slots_of
from segue_cloud.engine.step_input import Segment, StepInput
from segue_contract.model.manifest import ModelGeometry

# What lies further below the best has under 2 % of its probability; measured on the default model,
# refining halves the disagreement of bfloat16 with float32 (top-1: 0.9885 -> 0.994).
REFINE_MARGIN = 4.0


@dataclass(frozen=True)
class Window:
    """Which earlier tokens a token sees: the last `tokens`, itself among them, and the first
    `sinks` (arXiv 2309.17453: without them a model that was not trained with a window falls
    apart). 0 tokens: all.
    """

    tokens: int = 0
    sinks: int = 0

    def hidden(self, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """bool `[positions, keys]`: what a token at a position does not see."""
        late = keys[None, :] > positions[:, None]
        if not self.tokens:
            return late
        early = keys[None, :] <= positions[:, None] - self.tokens
        return late | (early & (keys >= self.sinks)[None, :])

    def keys(self, start: int, end: int) -> torch.Tensor:
        """int64: what at least one of the tokens [start, end) sees, in order."""
        lit = start - self.tokens + 1 if self.tokens else 0
        if lit <= self.sinks:
            return torch.arange(end)
        return torch.cat([torch.arange(self.sinks), torch.arange(lit, end)])


class StepOps(Protocol):
    """`residual` is float32 `[T, hidden]` and updated in place; the rest has the engine's dtype."""

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """residual += delta; RMSNorm(residual) * weight."""
        ...

    def rope_store(self, qkv: torch.Tensor, step: StepInput, layer: int) -> None:
        """Rotate q and k of `[T, (heads + 2 kv_heads) * head_dim]` in place; write k, v."""
        ...

    def attend_rows(
        self, qkv: torch.Tensor, step: StepInput, layer: int, out: torch.Tensor
    ) -> None:
        """Attention of `step.rows` through their page tables, into `out[T, heads * head_dim]`."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        ...

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor) -> None:
        """Recompute in float32, in place, the logits within `REFINE_MARGIN` of their row's best.

        `logits` float32 `[rows, vocab]`, `hidden` float32 `[rows, hidden]`.
        """
        ...


def chunk_mask(
    window: Window, start: int, count: int, dtype: torch.dtype, device: str
) -> torch.Tensor | None:
    """`Segment.mask` of the tokens [start, start + count) of a turn."""
    end = start + count
    if not start and not 0 < window.tokens < end:
        return None
    keys = window.keys(start, end)
    hidden = window.hidden(torch.arange(start, end), keys)
    mask = torch.zeros(count, len(keys), dtype=dtype)
    return mask.masked_fill_(hidden, float("-inf")).to(device)


def rope_tables(geometry: ModelGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 `[context, head_dim / 2]`, for the rotate-half convention of Llama."""
    half = torch.arange(0, geometry.head_dim, 2, dtype=torch.int64).float() / geometry.head_dim
    frequencies = 1.0 / (geometry.rope_base**half)
    angles = torch.outer(torch.arange(geometry.context).float(), frequencies)
    return angles.cos(), angles.sin()


def attend_segment(
    qkv: torch.Tensor,
    segment: Segment,
    pages: KvPages,
    layer: int,
    geometry: ModelGeometry,
    out: torch.Tensor,
) -> None:
    """Causal attention of a chunk; its own and all earlier keys are already in the pages."""
    g = geometry
    group = g.heads // g.kv_heads
    q_width, kv_width = g.heads * g.head_dim, g.kv_heads * g.head_dim
    rows = qkv[segment.first : segment.first + segment.count]
    q = rows[:, :q_width].view(segment.count, g.kv_heads, group, g.head_dim).permute(1, 2, 0, 3)
    if segment.slots is None:
        k = rows[:, q_width : q_width + kv_width]
        v = rows[:, q_width + kv_width :]
        k = k.view(segment.count, g.kv_heads, g.head_dim).transpose(0, 1)
        v = v.view(segment.count, g.kv_heads, g.head_dim).transpose(0, 1)
    else:
        k = pages.k[layer].index_select(1, segment.slots)
        v = pages.v[layer].index_select(1, segment.slots)
    mask = segment.mask
    if mask is None and segment.start:
        # Not a tensor of zeros and -inf: the fused kernels of a card know this case.
        mask = causal_lower_right(segment.count, k.shape[1])
    shape = (g.kv_heads, group, k.shape[1], g.head_dim)
    attended = torch.nn.functional.scaled_dot_product_attention(
        q,
        k[:, None].expand(shape),
        v[:, None].expand(shape),
        attn_mask=mask,
        is_causal=segment.start == 0 and mask is None,
    )
    target = out[segment.first : segment.first + segment.count]
    target.view(segment.count, g.kv_heads, group, g.head_dim).copy_(attended.permute(2, 0, 1, 3))


class TorchOps:
    """The plain form, on any device."""

    def __init__(
        self, geometry: ModelGeometry, pages: KvPages, device: str, window: Window = Window()
    ) -> None:
        self._window = window
        self._geometry = geometry
        self._pages = pages
        self._device = device
        cos, sin = rope_tables(geometry)
        self._cos, self._sin = cos.to(device), sin.to(device)

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        if delta is not None:
            residual += delta.float()
        eps = self._geometry.norm_eps
        normed = torch.nn.functional.rms_norm(residual, (residual.shape[1],), weight, eps)
        return normed.to(self._pages.k[0].dtype)

    def rope_store(self, qkv: torch.Tensor, step: StepInput, layer: int) -> None:
        g = self._geometry
        tokens = qkv.shape[0]
        positions = torch.from_numpy(step.positions_np).to(self._device)
        slots = torch.from_numpy(step.slots_np).to(self._device)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        heads = qkv.view(tokens, g.heads + 2 * g.kv_heads, g.head_dim)
        rotated = heads[:, : g.heads + g.kv_heads]
        a, b = rotated.float().chunk(2, dim=-1)
        rotated.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
        k = heads[:, g.heads : g.heads + g.kv_heads].transpose(0, 1)
        v = heads[:, g.heads + g.kv_heads :].transpose(0, 1)
        self._pages.k[layer].index_copy_(1, slots, k)
        self._pages.v[layer].index_copy_(1, slots, v)

    def attend_rows(
        self, qkv: torch.Tensor, step: StepInput, layer: int, out: torch.Tensor
    ) -> None:
        g = self._geometry
        width = g.heads * g.head_dim
        for row, table, length in step.rows.tolist():
            hidden = self._window.hidden(torch.tensor([length - 1]), torch.arange(length))[0]
            seen = slots_of(step.tables[table])[:length][~hidden.numpy()]
            slots = torch.from_numpy(seen).to(self._device)
            q = qkv[row, :width].view(g.kv_heads, g.heads // g.kv_heads, g.head_dim)
            k = self._pages.k[layer].index_select(1, slots)
            v = self._pages.v[layer].index_select(1, slots)
            attended = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])
            out[row] = attended.reshape(width)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.float()).mul_(up.float()).to(gate_up.dtype)

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor) -> None:
        best = logits.max(dim=1, keepdim=True).values
        rows, ids = torch.nonzero(logits >= best - REFINE_MARGIN, as_tuple=True)
        logits[rows, ids] = (hidden[rows] * head[ids].float()).sum(dim=1)


class CompiledOps:
    """The fused CPU kernels over the same memory: arrays are views of the tensors."""

    def __init__(self, geometry: ModelGeometry, pages: KvPages, window: Window = Window()) -> None:
        from segue_cloud.engine.kernels import build_kernels

        self._geometry = geometry
        self.kernels = build_kernels(geometry.heads, geometry.kv_heads, geometry.head_dim)
        self._window = window
        self._k = [_array(k) for k in pages.k]
        self._v = [_array(v) for v in pages.v]
        self._dtype = pages.k[0].dtype
        self._eps = np.float32(geometry.norm_eps)
        self._scale = np.float32(geometry.head_dim**-0.5)
        cos, sin = rope_tables(geometry)
        self._cos, self._sin = cos.numpy(), sin.numpy()

    def load_kernels(self) -> None:
        """Load or compile every kernel for the kinds of arrays that steps will bring.

        Only before the first turn: it writes to the first slot.
        """
        g = self._geometry

        def store(width: int) -> NDArray[Any]:
            return _array(torch.zeros(1, width, dtype=self._dtype))

        one = np.zeros(1, np.int64)
        qkv, hidden = store((g.heads + 2 * g.kv_heads) * g.head_dim), store(g.hidden)
        residual, weight = np.zeros((1, g.hidden), np.float32), np.ones(g.hidden, np.float32)
        kernels, k, v = self.kernels, self._k[0], self._v[0]
        kernels.add_norm.load(residual, hidden, True, weight, self._eps, hidden)
        kernels.rope_store.load(qkv, one, one, self._cos, self._sin, k, v)
        tables, rows = np.zeros((1, 1), np.int32), np.array([[0, 0, 1]], np.int32)
        out = store(g.heads * g.head_dim)
        kernels.attend.load(qkv, k, v, tables, rows, self._scale, 0, 0, out)
        kernels.silu_mul.load(store(2 * g.ffn), store(g.ffn))
        if self._dtype == torch.bfloat16:
            logits = np.zeros((1, 1), np.float32)
            kernels.refine.load(logits, residual, hidden, np.float32(REFINE_MARGIN))

    def add_norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty(residual.shape, dtype=self._dtype)
        target = _array(out)
        added = target if delta is None else _array(delta)
        self.kernels.add_norm(
            3 * residual.numel(),
            residual.numpy(),
            added,
            delta is not None,
            weight.numpy(),
            self._eps,
            target,
        )
        return out

    def rope_store(self, qkv: torch.Tensor, step: StepInput, layer: int) -> None:
        self.kernels.rope_store(
            3 * qkv.numel(),
            _array(qkv),
            step.positions_np,
            step.slots_np,
            self._cos,
            self._sin,
            self._k[layer],
            self._v[layer],
        )

    def attend_rows(
        self, qkv: torch.Tensor, step: StepInput, layer: int, out: torch.Tensor
    ) -> None:
        self.kernels.attend(
            int(step.rows[:, 2].sum()) * 2 * out.shape[1],
            _array(qkv),
            self._k[layer],
            self._v[layer],
            step.tables,
            step.rows,
            self._scale,
            self._window.tokens,
            self._window.sinks,
            _array(out),
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=self._dtype)
        self.kernels.silu_mul(10 * out.numel(), _array(gate_up), _array(out))
        return out

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor) -> None:
        self.kernels.refine(
            logits.numel(), logits.numpy(), hidden.numpy(), _array(head), np.float32(REFINE_MARGIN)
        )


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """A view of the tensor's memory; bfloat16 as its bits, which numpy has no type for."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array
