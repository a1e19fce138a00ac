"""Decode of an 8B shape at batch 1, 8, 32, 128 with a context of 1,024, beside the memory roof; at
batch 1 beside transformers' `generate` and a plain torch loop over the same model."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch

from tests.bench.harness import Report
from tests.bench.suites._card_plan import Plan, plan_here, synchronize
from tests.bench.suites._hf_batch import hf_decode, hf_model
from tests.bench.suites._prompts import random_prompts
from tests.bench.suites.gpu import decode_rows, release


def run(report: Report, quick: bool) -> None:
    plan = plan_here(report, quick)
    if plan is None:
        return
    speeds = asyncio.run(decode_rows(report, plan))
    release()
    model = hf_model(plan.geometry, plan.device)
    note = "transformers, the same shape, batch 1"
    theirs = hf_decode(model, plan.geometry.vocab, plan.device, 1, plan.context, plan.new)
    report.row("hf_generate_tokens_per_s_1", theirs, "tokens/s", note=note)
    plain = plain_loop(model, plan)
    note = "its model, one call a token, no generate"
    report.row("plain_loop_tokens_per_s_1", plain, "tokens/s", note=note)
    if 1 in speeds:
        report.row("gpu_vs_hf_generate_1", speeds[1] / theirs, "x")
        report.row("gpu_vs_plain_loop_1", speeds[1] / plain, "x")


@torch.inference_mode()
def plain_loop(model: Any, plan: Plan) -> float:
    """Tokens/s of one turn: the model called token by token, the best logit taken on the card."""

    def seconds(new: int) -> float:
        (prompt,) = random_prompts(1, plan.context, plan.geometry.vocab, seed=3)
        out = model(torch.tensor([prompt], device=plan.device), use_cache=True, logits_to_keep=1)
        past, token = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        synchronize(plan.device)
        began = time.perf_counter()
        for _ in range(new):
            out = model(token, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        token.cpu()
        return time.perf_counter() - began

    seconds(2)  # warm-up
    return plan.new / seconds(plan.new)
