"""What lies between the matrix products, on a device: `TorchOps` with one upload a step.

A step's positions, slots and page tables go to the device once, before its layers, and the rows
attend together. Nothing in a layer waits for the device or depends on a value that the host has
to know, so that a step can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from segue_cloud.engine.attention import REFINE_MARGIN, TorchOps, Window
from segue_cloud.engine.cuda.attention import PagedAttention, Rows
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.step_input import StepInput
from segue_contract.limits import KV_PAGE_TOKENS
from segue_contract.model.manifest import ModelGeometry

# Logits of a row that are computed anew in float32, the largest ones. A captured step cannot have a
# number of them that depends on the values. Of 1,536 positions of the default model 90 % have no
# more within the margin; in the others, what is left out has 63 likelier tokens before it.
_REFINED = 64


@dataclass(frozen=True)
class StepTensors:
    """int64 `[tokens]` each, on the device. `rows`: which of them attend through page tables, in
    the order of the step's rows; None: all."""

    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor | None = None


class DeviceOps(TorchOps):
    """Implements `StepOps`. Steps come one after another, their layers in order."""

    def __init__(
        self,
        geometry: ModelGeometry,
        pages: DevicePages,
        device: str,
        attention: PagedAttention,
        window: Window,
    ) -> None:
        super().__init__(geometry, pages, device, window)
        self.attention = attention
        self._step: StepInput | None = None
        self._tensors = StepTensors(torch.empty(0), torch.empty(0))
        self._rotation = (torch.empty(0), torch.empty(0))

    def begin(self, step: StepInput) -> None:
        """Bring to the device what the layers of `step` read; before its first layer."""
        count = len(step.positions_np)
        rows = None
        if len(step.rows):
            self.attention.plan(rows_of(step), None)
            if len(step.rows) != count:
                rows = self._to_device(step.rows[:, 0].astype(np.int64))
        self.bind(
            step,
            StepTensors(self._to_device(step.positions_np), self._to_device(step.slots_np), rows),
        )

    def bind(self, step: StepInput, tensors: StepTensors) -> None:
        """Let `step` read `tensors`, which are on the device already; its rows are planned."""
        self._step, self._tensors = step, tensors

    def rope_store(self, qkv: torch.Tensor, step: StepInput, layer: int) -> None:
        g = self._geometry
        assert step is self._step, "a step begins before its layers"
        if layer == 0:
            positions = self._tensors.positions
            self._rotation = (self._cos[positions][:, None], self._sin[positions][:, None])
            if len(step.rows):
                self.attention.start()
        cos, sin = self._rotation
        heads = qkv.view(-1, g.heads + 2 * g.kv_heads, g.head_dim)
        rotated = heads[:, : g.heads + g.kv_heads]
        a, b = rotated.float().chunk(2, dim=-1)
        rotated.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
        k = heads[:, g.heads : g.heads + g.kv_heads].transpose(0, 1)
        v = heads[:, g.heads + g.kv_heads :].transpose(0, 1)
        self._pages.k[layer].index_copy_(1, self._tensors.slots, k)
        self._pages.v[layer].index_copy_(1, self._tensors.slots, v)

    def attend_rows(
        self, qkv: torch.Tensor, step: StepInput, layer: int, out: torch.Tensor
    ) -> None:
        g = self._geometry
        rows = self._tensors.rows
        shape = (-1, g.heads, g.head_dim)
        q = qkv[:, : g.heads * g.head_dim]
        if rows is None:
            self.attention.attend(q.contiguous().view(shape), layer, out.view(shape))
            return
        q = q.index_select(0, rows)
        attended = torch.empty_like(q)
        self.attention.attend(q.view(shape), layer, attended.view(shape))
        out.index_copy_(0, rows, attended)

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor) -> None:
        best, ids = logits.topk(min(_REFINED, logits.shape[1]), dim=1)
        exact = (head[ids].float() * hidden[:, None]).sum(dim=2)
        near = best >= best[:, :1] - REFINE_MARGIN
        logits.scatter_(1, ids, torch.where(near, exact, best))

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def rows_of(step: StepInput) -> Rows:
    """What the step's rows see; the tables cut at the longest."""
    lengths = step.rows[:, 2].astype(np.int64)
    width = int(-(-lengths.max() // KV_PAGE_TOKENS))
    return Rows(step.tables[step.rows[:, 1], :width], lengths)
