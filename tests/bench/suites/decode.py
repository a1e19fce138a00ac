"""The cloud's engine: tokens per second of 1 to 128 concurrent turns, beside Hugging Face.

A turn is a 128-token prompt and 64 new tokens. `tokens_per_s_N` is N * 64 over the time from the
first submit to the last token: prefill, batching, sampling and the way through the queues
included. Hugging Face computes the same turns one after another at batch 1, which is what a program
that calls `generate` per request does. vLLM and llama.cpp batch them, as we do; they run
where `scripts/peers` has built them. SEGUE_BENCH_DEVICE=cuda puts the engine and Hugging Face on a
card.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.model.manifest import DEFAULT_MODEL, model_home, read_manifest
from tests.bench.harness import ROOT, Report
from tests.bench.suites._device import bench_device
from tests.bench.suites._memory import memory_rows
from tests.bench.suites._peer_rows import peer_rows
from tests.bench.suites._prompts import random_prompts

PROMPT_TOKENS = 128
PEER_TIMEOUT_S = 600


def run(report: Report, quick: bool) -> None:
    directory = model_home() / DEFAULT_MODEL
    new_tokens = 8 if quick else 64
    at_32 = asyncio.run(_engine_rows(report, directory, new_tokens, quick))
    asyncio.run(memory_rows(report, directory, quick))
    peers = {
        dtype: _hf_generate(directory, dtype, 1 if quick else 4, new_tokens)
        for dtype in (("fp32",) if quick else ("fp32", "bf16"))
    }
    for dtype, value in peers.items():
        report.row(f"hf_generate_{dtype}", value, "tokens/s", note="one turn after another")
    report.row(
        "vs_hf_generate_32",
        at_32 / max(peers.values()),
        "x",
        target=5,
        note="tokens_per_s_32 over the better peer",
    )


async def _engine_rows(report: Report, directory: Path, new_tokens: int, quick: bool) -> float:
    manifest = read_manifest(directory)
    vocab = manifest.geometry.vocab
    began = time.perf_counter()
    engine = await TorchEngine.load(directory, manifest, EngineOptions(device=bench_device()))
    report.row("load_s", time.perf_counter() - began, "s", note="weights, kernels, warm-up")
    speeds: dict[int, float] = {}
    try:
        for tokens in (512,) if quick else (128, 512, 2048):
            speed = await _prefill(engine, tokens, vocab, repeats=1 if quick else 3)
            report.row(f"prefill_tokens_per_s_{tokens}", speed, "tokens/s")
        for batch in (1, 32) if quick else (1, 8, 32, 64, 128):
            busy = engine.busy_s
            speeds[batch], seconds, steps = await _turns(engine, batch, new_tokens, vocab)
            target = 200 if batch == 32 and not quick else None
            report.row(f"tokens_per_s_{batch}", speeds[batch], "tokens/s", target=target)
            report.row(f"decode_tokens_per_s_{batch}", steps, "tokens/s", note="without prefill")
            share = (engine.busy_s - busy) / seconds
            report.row(f"engine_busy_share_{batch}", share, "", note="rest: queues, delivery")
        if bench_device() == "cpu":
            await peer_rows(report, engine, directory, new_tokens, quick)
        else:
            report.missing("vllm, llama-cpp", "their environments are built for the CPU")
    finally:
        await engine.close()
    await _ahead_rows(report, directory, new_tokens, (32,) if quick else (32, 128))
    if not quick:
        rising = all(speeds[a] < speeds[b] for a, b in ((1, 8), (8, 32), (32, 64)))
        report.row("rising_1_8_32_64", float(rising), "", target=1)
    return speeds[32]


async def _ahead_rows(
    report: Report, directory: Path, new_tokens: int, batches: tuple[int, ...]
) -> None:
    """The same turns where the next step is planned, and the last one's tokens sent, meanwhile."""
    manifest = read_manifest(directory)
    engine = await TorchEngine.load(
        directory, manifest, EngineOptions(ahead=True, device=bench_device())
    )
    try:
        for batch in batches:
            busy = engine.busy_s
            vocab = manifest.geometry.vocab
            speed, seconds, _ = await _turns(engine, batch, new_tokens, vocab)
            share = (engine.busy_s - busy) / seconds
            report.row(f"ahead_tokens_per_s_{batch}", speed, "tokens/s")
            report.row(f"ahead_engine_busy_share_{batch}", share, "")
    finally:
        await engine.close()


async def _prefill(engine: TorchEngine, tokens: int, vocab: int, repeats: int) -> float:
    """Best of some prompts alone: prompt tokens over the time to the first token."""
    best = 0.0
    for prompt in random_prompts(repeats, tokens, vocab, seed=tokens):
        began = time.perf_counter()
        async for _ in engine.submit(EngineTurn(turn="prefill", prompt=prompt, max_tokens=1)):
            best = max(best, tokens / (time.perf_counter() - began))
    return best


async def _turns(
    engine: TorchEngine, batch: int, new_tokens: int, vocab: int
) -> tuple[float, float, float]:
    """Tokens/s of `batch` turns at once; their seconds; tokens/s once all have their first."""
    firsts: list[float] = []
    after: list[tuple[float, int]] = []

    async def one(index: int, prompt: tuple[int, ...]) -> None:
        turn = EngineTurn(turn=f"bench{index}", prompt=prompt, max_tokens=new_tokens)
        seen = 0
        async for output in engine.submit(turn):
            now = time.perf_counter()
            if seen == 0:
                firsts.append(now)
            after.append((now, len(output.tokens)))
            seen += len(output.tokens)
        assert seen == new_tokens, "a turn ended early"

    prompts = random_prompts(batch, PROMPT_TOKENS, vocab, seed=batch)
    began = time.perf_counter()
    await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    ended = time.perf_counter()
    all_started = max(firsts)
    decoded = sum(count for at, count in after if at > all_started)
    seconds = ended - began
    return batch * new_tokens / seconds, seconds, decoded / max(ended - all_started, 1e-9)


def _hf_generate(directory: Path, dtype: str, prompts: int, new_tokens: int) -> float:
    numbers = [str(n) for n in (prompts, PROMPT_TOKENS, new_tokens)]
    peer = subprocess.run(
        [sys.executable, "-m", "tests.bench.suites._hf_generate", str(directory), dtype, *numbers],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PEER_TIMEOUT_S,
        check=False,
    )
    if peer.returncode != 0:
        raise RuntimeError(f"The peer failed:\n{peer.stderr[-2000:]}")
    return float(json.loads(peer.stdout.splitlines()[-1])["tokens_per_s"])
