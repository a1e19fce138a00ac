"""What a run on a card measures, what of it fits, and the card's roofs: bytes and products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from segue_cloud.engine.cuda.memory import token_bytes, weight_bytes
from segue_cloud.engine.sequence import pages_for
from segue_contract.limits import KV_PAGE_TOKENS, MAX_GRAPH_BYTES
from segue_contract.model.manifest import ModelGeometry
from tests.bench.harness import Report, median_of
from tests.support.shapes import LLAMA_8B
from tests.support.tiny_llama import TINY

BF16 = 2  # bytes
_RESERVE_BYTES = MAX_GRAPH_BYTES + (2 << 30)  # graphs, activations, workspaces


@dataclass(frozen=True)
class Plan:
    """What one run measures. Tokens: `context` a prompt (whole blocks, so that all of it can be in
    the cache), `new` a reply, `prefills` alone. `matmul`: rows and columns of the roof's product.
    """

    geometry: ModelGeometry
    device: str
    batches: Sequence[int]
    context: int
    new: int
    prefills: Sequence[int]
    copy_bytes: int
    matmul: int
    rounds: int

    @property
    def pages(self) -> int:
        """Enough for the largest batch at its end, and the longest prompt beside it."""
        turns = max(self.batches) * (pages_for(self.context + self.new) + 1)
        return turns + pages_for(max(self.prefills)) + 1


FULL = Plan(LLAMA_8B, "cuda", (1, 8, 32, 128), 1024, 128, (1024, 4096), 4 << 30, 8192, 3)
QUICK = Plan(LLAMA_8B, "cuda", (1, 4), 256, 16, (512,), 1 << 28, 4096, 1)
TOY = Plan(TINY, "cpu", (1, 3), 64, 6, (70,), 1 << 20, 128, 1)


def plan_here(report: Report, quick: bool) -> Plan | None:
    """What can be measured on this machine; None: nothing, and the report says why."""
    if torch.cuda.is_available():
        plan = QUICK if quick else FULL
        report.machine["card"] = torch.cuda.get_device_name()
    else:
        report.missing("the 8B shape", "there is no CUDA card here, or this PyTorch cannot use it")
        if not quick:
            return None
        plan = TOY
    plan = _fitting(report, plan)
    return plan if plan.batches else None


def _fitting(report: Report, plan: Plan) -> Plan:
    """The plan without the batches that the card has no room for."""
    if plan.device == "cpu":
        return plan
    free, _ = torch.cuda.mem_get_info()
    room = free - weight_bytes(plan.geometry, BF16) - _RESERVE_BYTES
    turn = (pages_for(plan.context + plan.new) + 1) * KV_PAGE_TOKENS
    each = turn * token_bytes(plan.geometry, BF16)
    batches = tuple(batch for batch in plan.batches if batch * each <= room)
    for batch in sorted(set(plan.batches) - set(batches)):
        report.missing(f"batch {batch}", f"the card has {free / 1e9:.0f} GB free, too few for it")
    return replace(plan, batches=batches)


def copy_bytes_per_s(plan: Plan) -> float:
    """Bytes read and written per second by a large copy of random bytes."""
    source = torch.empty(plan.copy_bytes, dtype=torch.uint8, device=plan.device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronize(plan.device)

    return 2 * plan.copy_bytes / median_of(copy, repeats=10, warmup=3)


def product_flops_per_s(plan: Plan) -> float:
    """Floating-point operations per second of a large bfloat16 product of random numbers."""
    size = plan.matmul
    left, right = (
        torch.empty(size, size, dtype=torch.bfloat16, device=plan.device).normal_()
        for _ in range(2)
    )
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)
        synchronize(plan.device)

    return 2 * size**3 / median_of(multiply, repeats=10, warmup=3)


def roof_step_s(plan: Plan, batch: int, bandwidth: float) -> float:
    """The least time of a decode step: every weight but the embedding table is read once, and each
    turn's KV, half-way through its reply."""
    g = plan.geometry
    table = 0 if g.tied_embeddings else g.vocab * g.hidden * BF16
    kv = batch * (plan.context + plan.new / 2) * token_bytes(g, BF16)
    return (weight_bytes(g, BF16) - table + kv) / bandwidth


def roof_prefill_s(plan: Plan, tokens: int, flops_per_s: float) -> float:
    """The least time of a prompt: two operations per weight and token, without the embedding table
    and with the head for one token only, and causal attention (half of all pairs, QK and PV)."""
    g = plan.geometry
    tables = (1 if g.tied_embeddings else 2) * g.vocab * g.hidden
    layers = weight_bytes(g, 1) - tables
    attention = 4 * g.layers * g.heads * g.head_dim * tokens * tokens / 2
    return (2 * layers * tokens + attention + 2 * g.vocab * g.hidden) / flops_per_s


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
