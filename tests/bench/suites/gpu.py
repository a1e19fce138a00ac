"""A model of 8B's shape on a card: decode at batch 1, 8, 32, 128 beside the memory roof and Hugging
Face, and prefill beside the compute roof.

Weights are random (the speed does not depend on them) and made on the card. The roof is what the
card's memory allows: a decode step must read every weight and the KV of all its turns once, so no
step is shorter than those bytes over the bandwidth of a large copy, measured in the same run. That
of a prompt is its products over the speed of a large bfloat16 product.
`gpu_decode_tokens_per_s_N` counts from the moment when all N turns have their first token; their
prompts were computed before. What misses its goal is profiled at once: the JSON's `details`.

Without a CUDA card nothing is measured, and the suite says so; `--quick` then runs every line of it
on the CPU with a toy shape.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from segue_cloud.engine.cuda.runner import DeviceRunner
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from tests.bench.harness import Report
from tests.bench.suites._card_plan import (
    Plan,
    copy_bytes_per_s,
    plan_here,
    product_flops_per_s,
    roof_prefill_s,
    roof_step_s,
)
from tests.bench.suites._hf_batch import hf_decode, hf_model
from tests.bench.suites._profile import profiled
from tests.bench.suites._prompts import random_prompts
from tests.bench.suites._random_llama import random_manifest, random_weights

Prompts = Sequence[tuple[int, ...]]

# One turn alone must get four fifths of what memory allows; at 32, a token may come 15 % later.
GOAL_OF_ROOF_1 = 0.8
GOAL_STEP_32 = 1.15


@dataclass(frozen=True)
class Decoded:
    """Of some turns while all of them decode: tokens/s, and seconds between a turn's tokens."""

    tokens_per_s: float
    gaps_s: list[float]

    def gap_ms(self, percentile: int) -> float:
        if len(self.gaps_s) < 2:
            return 1e3 * sum(self.gaps_s)
        return 1e3 * statistics.quantiles(self.gaps_s, n=100, method="inclusive")[percentile - 1]


def run(report: Report, quick: bool) -> None:
    plan = plan_here(report, quick)
    if plan is None:
        return
    speeds = asyncio.run(decode_rows(report, plan))
    release()
    asyncio.run(prefill_rows(report, plan))
    release()
    hf_rows(report, plan, speeds)
    release()


@asynccontextmanager
async def engine_of(
    plan: Plan, *, graphs: bool = True
) -> AsyncIterator[tuple[TorchEngine, DeviceRunner]]:
    """Our engine alone on the card, and its runner."""
    options = EngineOptions(
        dtype="bf16",
        device=plan.device,
        max_batch=max(plan.batches),
        step_tokens=2048,
        mixed_tokens=1024,
        graphs=graphs,
    )
    runners: list[DeviceRunner] = []

    def build() -> DeviceRunner:
        runners.append(
            DeviceRunner(Path(), plan.geometry, plan.pages, options, load=random_weights)
        )
        return runners[0]

    engine = TorchEngine(random_manifest(plan.geometry), options, plan.pages, build)
    await engine.start()
    try:
        yield engine, runners[0]
    finally:
        await engine.close()


async def decode_rows(report: Report, plan: Plan) -> dict[int, float]:
    """Returns tokens/s by batch."""
    bandwidth = copy_bytes_per_s(plan)
    report.row("gpu_copy_gb_per_s", bandwidth / 1e9, "GB/s", note="read and write of a large copy")
    release()
    speeds = {}
    began = time.perf_counter()
    async with engine_of(plan) as (engine, runner):
        seconds = time.perf_counter() - began
        report.row("gpu_load_s", seconds, "s", note="weights made, steps captured")
        report.row("gpu_captured_shapes", len(runner.captured_shapes), "")
        prompts = random_prompts(max(plan.batches), plan.context + 1, plan.geometry.vocab)
        for batch in plan.batches:
            for prompt in prompts[:batch]:  # into the cache
                async for _ in engine.submit(EngineTurn("cache", prompt=prompt, max_tokens=1)):
                    pass
            speeds[batch] = await _decode_row(report, plan, bandwidth, engine, prompts[:batch])
        replayed, eager = runner.replayed_steps, runner.eager_steps
        share = replayed / max(replayed + eager, 1)
        report.row("gpu_replayed_share", share, "", note="of steps; the rest had prompt tokens")
    return speeds


async def _decode_row(
    report: Report, plan: Plan, bandwidth: float, engine: TorchEngine, prompts: Prompts
) -> float:
    batch, on_card = len(prompts), plan.device != "cpu"
    await decode(engine, plan, prompts)  # warm-up
    found = [await decode(engine, plan, prompts) for _ in range(plan.rounds)]
    best = max(found, key=lambda one: one.tokens_per_s)
    step_s = roof_step_s(plan, batch, bandwidth)
    roof = batch / step_s
    report.row(f"gpu_decode_tokens_per_s_{batch}", best.tokens_per_s, "tokens/s")
    share, late = best.tokens_per_s / roof, best.gap_ms(50) / (1e3 * step_s)
    report.row(
        f"gpu_decode_of_roof_{batch}",
        share,
        "",
        GOAL_OF_ROOF_1 if on_card and batch == 1 else None,
        note=f"of {roof:,.0f} tokens/s that memory allows",
    )
    report.row(f"gpu_intertoken_ms_p50_{batch}", best.gap_ms(50), "ms")
    report.row(f"gpu_intertoken_ms_p99_{batch}", best.gap_ms(99), "ms")
    report.row(
        f"gpu_intertoken_of_roof_{batch}",
        late,
        "x",
        GOAL_STEP_32 if on_card and batch == 32 else None,
        "lower",
        f"p50 over the {1e3 * step_s:.2f} ms that memory allows",
    )
    if share < GOAL_OF_ROOF_1 or late > GOAL_STEP_32:
        with profiled(plan.device) as kernels:
            await decode(engine, plan, prompts)
        report.details[f"profile_decode_{batch}"] = kernels
    return best.tokens_per_s


async def decode(engine: TorchEngine, plan: Plan, prompts: Prompts) -> Decoded:
    """These turns from the moment when all have their first token.

    Their prompts are in the cache but for the last token, so all of them begin in one step.
    """
    firsts: list[float] = []
    after: list[list[tuple[float, int]]] = [[] for _ in prompts]

    async def one(index: int, prompt: tuple[int, ...]) -> None:
        turn = EngineTurn(turn=f"bench{index}", prompt=prompt, max_tokens=plan.new)
        async for output in engine.submit(turn):
            now = time.perf_counter()
            if not after[index]:
                firsts.append(now)
            after[index].append((now, len(output.tokens)))
        assert sum(count for _, count in after[index]) == plan.new, "a turn ended early"

    await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    started, ended = max(firsts), max(turn[-1][0] for turn in after)
    tokens = sum(count for turn in after for at, count in turn if at > started)
    gaps = [
        (at - before) / count
        for turn in after
        for (before, _), (at, count) in itertools.pairwise(turn)
        if before >= started and count
    ]
    return Decoded(tokens / max(ended - started, 1e-9), gaps)


async def prefill_rows(report: Report, plan: Plan) -> None:
    """Prompts alone, in steps of 2,048 tokens, to the first token."""
    flops = product_flops_per_s(plan)
    report.row("gpu_product_tflops", flops / 1e12, "TFLOP/s", note="a large bfloat16 product")
    release()
    async with engine_of(plan, graphs=False) as (engine, _):
        for tokens in plan.prefills:
            await prefill(engine, plan, tokens, rounds=1, seed=1)  # warm-up
            speed = await prefill(engine, plan, tokens, plan.rounds, seed=tokens)
            roof = tokens / roof_prefill_s(plan, tokens, flops)
            report.row(f"gpu_prefill_tokens_per_s_{tokens}", speed, "tokens/s")
            note = f"of {roof:,.0f} tokens/s that the products allow"
            report.row(f"gpu_prefill_of_roof_{tokens}", speed / roof, "", note=note)
        with profiled(plan.device) as kernels:
            await prefill(engine, plan, max(plan.prefills), rounds=1, seed=2)
        report.details[f"profile_prefill_{max(plan.prefills)}"] = kernels


async def prefill(engine: TorchEngine, plan: Plan, tokens: int, rounds: int, seed: int) -> float:
    """Best of some prompts alone: prompt tokens over the time to the first token."""
    best = 0.0
    for prompt in random_prompts(rounds, tokens, plan.geometry.vocab, seed):
        began = time.perf_counter()
        async for _ in engine.submit(EngineTurn(turn="prefill", prompt=prompt, max_tokens=1)):
            best = max(best, tokens / (time.perf_counter() - began))
    return best


def hf_rows(
    report: Report, plan: Plan, speeds: dict[int, float], batches: Sequence[int] = ()
) -> None:
    """The peer alone on the card, at the same shapes; `batches`: at these only."""
    model = hf_model(plan.geometry, plan.device)
    measure = partial(hf_decode, model, plan.geometry.vocab, plan.device)
    for batch in batches or plan.batches:
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
