"""A model of 8B's shape on a card: decode at batch 1, 32, 128 beside the memory roof and Hugging
Face, and prefill.

Weights are random (the speed does not depend on them) and made on the card. The roof is what the
card's memory allows: a decode step must read every weight and the KV of all its turns once, so no
step is shorter than those bytes over the bandwidth of a large copy, measured in the same run.
`gpu_decode_tokens_per_s_N` counts from the moment when all N turns have their first token; their
prompts were computed before.

Without a CUDA card nothing is measured, and the suite says so; `--quick` then runs every line of it
on the CPU with a toy shape.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from segue_cloud.engine.cuda.memory import token_bytes, weight_bytes
from segue_cloud.engine.cuda.runner import DeviceRunner
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.sequence import pages_for
from segue_cloud.engine.worker import TorchEngine
from segue_contract.limits import KV_PAGE_TOKENS, MAX_GRAPH_BYTES
from segue_contract.model.manifest import ModelGeometry
from tests.bench.harness import Report, median_of
from tests.bench.suites._hf_batch import hf_decode, hf_model
from tests.bench.suites._prompts import random_prompts
from tests.bench.suites._random_llama import random_manifest, random_weights
from tests.support.shapes import LLAMA_8B
from tests.support.tiny_llama import TINY

Prompts = Sequence[tuple[int, ...]]
_BF16 = 2  # bytes
_RESERVE_BYTES = MAX_GRAPH_BYTES + (2 << 30)  # graphs, activations, workspaces


@dataclass(frozen=True)
class Plan:
    """What one run measures. Tokens: `context` a prompt (whole blocks, so that all of it can be in
    the cache), `new` a reply, `prefills` alone."""

    geometry: ModelGeometry
    device: str
    batches: Sequence[int]
    context: int
    new: int
    prefills: Sequence[int]
    copy_bytes: int
    rounds: int

    @property
    def pages(self) -> int:
        """Enough for the largest batch at its end, and the longest prompt beside it."""
        turns = max(self.batches) * (pages_for(self.context + self.new) + 1)
        return turns + pages_for(max(self.prefills)) + 1


FULL = Plan(LLAMA_8B, "cuda", (1, 32, 128), 1024, 128, (1024, 4096), 1 << 30, 3)
QUICK = Plan(LLAMA_8B, "cuda", (1, 4), 256, 16, (512,), 1 << 28, 1)
TOY = Plan(TINY, "cpu", (1, 3), 64, 6, (70,), 1 << 20, 1)


def run(report: Report, quick: bool) -> None:
    if torch.cuda.is_available():
        plan = QUICK if quick else FULL
        report.machine["card"] = torch.cuda.get_device_name()
    else:
        report.missing("all rows", "there is no CUDA card here, or this PyTorch cannot use it")
        if not quick:
            return
        plan = TOY
    plan = fitting(report, plan)
    if not plan.batches:
        return
    bandwidth = copy_bytes_per_s(plan)
    report.row("gpu_copy_gb_per_s", bandwidth / 1e9, "GB/s", note="read and write of a large copy")
    speeds = asyncio.run(engine_rows(report, plan, bandwidth))
    release()
    hf_rows(report, plan, speeds)
    release()


def fitting(report: Report, plan: Plan) -> Plan:
    """The plan without the batches that the card has no room for."""
    if plan.device == "cpu":
        return plan
    free, _ = torch.cuda.mem_get_info()
    room = free - weight_bytes(plan.geometry, _BF16) - _RESERVE_BYTES
    turn = (pages_for(plan.context + plan.new) + 1) * KV_PAGE_TOKENS
    each = turn * token_bytes(plan.geometry, _BF16)
    batches = [batch for batch in plan.batches if batch * each <= room]
    for batch in sorted(set(plan.batches) - set(batches)):
        report.missing(f"batch {batch}", f"the card has {free / 1e9:.0f} GB free, too few for it")
    fields = {**vars(plan), "batches": batches}
    return Plan(**fields)


def copy_bytes_per_s(plan: Plan) -> float:
    source = torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if plan.device != "cpu":
            torch.cuda.synchronize()

    return 2 * plan.copy_bytes / median_of(copy, repeats=10, warmup=3)


async def engine_rows(report: Report, plan: Plan, bandwidth: float) -> dict[int, float]:
    """Our engine alone on the card; returns decode tokens/s by batch."""
    options = EngineOptions(
        dtype="bf16",
        device=plan.device,
        max_batch=max(plan.batches),
        step_tokens=2048,
        mixed_tokens=1024,
    )
    runners: list[DeviceRunner] = []

    def build() -> DeviceRunner:
        runners.append(
            DeviceRunner(Path(), plan.geometry, plan.pages, options, load=random_weights)
        )
        return runners[0]

    began = time.perf_counter()
    engine = TorchEngine(random_manifest(plan.geometry), options, plan.pages, build)
    await engine.start()
    report.row("gpu_load_s", time.perf_counter() - began, "s", note="weights made, steps captured")
    speeds = {}
    try:
        prompts = random_prompts(max(plan.batches), plan.context + 1, plan.geometry.vocab)
        for tokens in plan.prefills:
            speed = await prefill(engine, plan, tokens)
            report.row(f"gpu_prefill_tokens_per_s_{tokens}", speed, "tokens/s")
        for prompt in prompts:
            async for _ in engine.submit(EngineTurn(turn="cache", prompt=prompt, max_tokens=1)):
                pass
        for batch in plan.batches:
            await decode(engine, plan, prompts[:batch])  # warm-up
            found = [await decode(engine, plan, prompts[:batch]) for _ in range(plan.rounds)]
            speeds[batch] = max(found)
            roof = roof_tokens_per_s(plan, batch, bandwidth)
            report.row(f"gpu_decode_tokens_per_s_{batch}", speeds[batch], "tokens/s")
            note = f"of {roof:,.0f} tokens/s that memory allows"
            report.row(f"gpu_decode_of_roof_{batch}", speeds[batch] / roof, "", note=note)
        replayed, eager = runners[0].replayed_steps, runners[0].eager_steps
        share = replayed / max(replayed + eager, 1)
        report.row("gpu_replayed_share", share, "", note="of steps; the rest had prompt tokens")
    finally:
        await engine.close()
    return speeds


def roof_tokens_per_s(plan: Plan, batch: int, bandwidth: float) -> float:
    """Every weight but the embedding table once, and each turn's KV, half-way through its reply."""
    g = plan.geometry
    table = 0 if g.tied_embeddings else g.vocab * g.hidden * _BF16
    kv = batch * (plan.context + plan.new / 2) * token_bytes(g, _BF16)
    return batch * bandwidth / (weight_bytes(g, _BF16) - table + kv)


async def prefill(engine: TorchEngine, plan: Plan, tokens: int) -> float:
    """Best of some prompts alone: prompt tokens over the time to the first token."""
    best = 0.0
    for prompt in random_prompts(plan.rounds, tokens, plan.geometry.vocab, seed=tokens):
        began = time.perf_counter()
        async for _ in engine.submit(EngineTurn(turn="prefill", prompt=prompt, max_tokens=1)):
            best = max(best, tokens / (time.perf_counter() - began))
    return best


async def decode(engine: TorchEngine, plan: Plan, prompts: Prompts) -> float:
    """Tokens/s of these turns from the moment when all have their first token.

    Their prompts are in the cache but for the last token, so all of them begin in one step.
    """
    firsts: list[float] = []
    after: list[tuple[float, int]] = []

    async def one(index: int, prompt: tuple[int, ...]) -> None:
        turn = EngineTurn(turn=f"bench{index}", prompt=prompt, max_tokens=plan.new)
        seen = 0
        async for output in engine.submit(turn):
            now = time.perf_counter()
            if not seen:
                firsts.append(now)
            seen += len(output.tokens)
            after.append((now, len(output.tokens)))
        assert seen == plan.new, "a turn ended early"

    await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    started, ended = max(firsts), max(at for at, _ in after)
    return sum(count for at, count in after if at > started) / max(ended - started, 1e-9)


def hf_rows(report: Report, plan: Plan, speeds: dict[int, float]) -> None:
    """The peer alone on the card, at the same shapes."""
    model = hf_model(plan.geometry, plan.device)
    measure = partial(hf_decode, model, plan.geometry.vocab, plan.device)
    for batch in plan.batches:
        try:
            theirs = measure(batch, plan.context, plan.new)
        except torch.OutOfMemoryError:
            report.missing(f"hf_decode_tokens_per_s_{batch}", "it needs more memory than there is")
            release()
            continue
        report.row(f"hf_decode_tokens_per_s_{batch}", theirs, "tokens/s", note="static batch")
        report.row(f"gpu_vs_hf_{batch}", speeds[batch] / theirs, "x")


def release() -> None:
    """Give what is no longer used back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
