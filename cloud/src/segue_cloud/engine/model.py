"""One step of a Llama over paged KV: token ids in, logits of chosen rows out."""

from __future__ import annotations

import torch

from segue_cloud.engine.attention import StepOps, attend_segment
from segue_cloud.engine.kv_pages import KvPages
from segue_cloud.engine.step_input import StepInput
from segue_cloud.engine.weights import Weights
from segue_contract.model.manifest import ModelGeometry


class LlamaModel:
    """Pre-norm decoder with grouped-query attention and a gated feed-forward.

    The residual stream is float32 whatever the dtype of the weights.
    """

    def __init__(
        self, geometry: ModelGeometry, weights: Weights, pages: KvPages, ops: StepOps
    ) -> None:
        self._geometry = geometry
        self._weights = weights
        self._pages = pages
        self._ops = ops

    @torch.inference_mode()
    def step(self, step: StepInput) -> torch.Tensor:
        """Write the KV of all rows; return logits `[len(step.logit_rows), vocab]`, float32."""
        ops, weights = self._ops, self._weights
        residual = torch.nn.functional.embedding(step.tokens, weights.embed).float()
        delta: torch.Tensor | None = None
        for index, layer in enumerate(weights.layers):
            qkv = layer.qkv(ops.add_norm(residual, delta, layer.input_norm))
            attended = layer.out(self._attend(qkv, step, index))
            gate_up = layer.gate_up(ops.add_norm(residual, attended, layer.ffn_norm))
            delta = layer.down(ops.silu_mul(gate_up))
        assert delta is not None, "a model has at least one layer"
        return self._logits(residual[step.logit_rows], delta[step.logit_rows])

    def _logits(self, residual: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        ops, weights = self._ops, self._weights
        hidden = ops.add_norm(residual, delta, weights.final_norm)
        logits = torch.nn.functional.linear(hidden, weights.head).float()
        if hidden.dtype == torch.bfloat16 and len(logits):
            # bfloat16 logits of size 16 lie 0.125 apart: ties among the best tokens are common.
            eps = self._geometry.norm_eps
            exact = torch.nn.functional.rms_norm(
                residual, residual.shape[1:], weights.final_norm, eps
            )
            ops.refine(logits, exact, weights.head)
        return logits

    def _attend(self, qkv: torch.Tensor, step: StepInput, layer: int) -> torch.Tensor:
        g = self._geometry
        self._ops.rope_store(qkv, step, layer)
        out = torch.empty((qkv.shape[0], g.heads * g.head_dim), dtype=qkv.dtype, device=qkv.device)
        if len(step.rows):
            self._ops.attend_rows(qkv, step, layer, out)
        for segment in step.segments:
            attend_segment(qkv, segment, self._pages, layer, g, out)
        return out
