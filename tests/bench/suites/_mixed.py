"""Rows of the load suite about the engine alone: 1 to 256 turns at once with mixed prompts.

Prompts of 50 to 3,000 tokens, most of them short, as in chats. Throughput counts prompt tokens and
new tokens alike. Each level has the same mix: whole rounds of `SIZES`, none of them cached. The
machine's speed drifts, so all levels are run in turn, `ROUNDS` times, and the medians compared;
tokens per second of this process' CPU time stand beside them, for machines that others use too.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.model.manifest import read_manifest
from tests.bench.harness import Report
from tests.bench.suites._prompts import random_prompts

SIZES = (50, 120, 300, 80, 600, 200, 50, 3000, 150, 90, 400, 50, 1000, 70, 250, 100)
LEVELS = (1, 8, 32, 64, 128, 256)
ROUNDS = 3
DEADLINE_S = 10


async def mixed_rows(report: Report, directory: Path, quick: bool) -> None:
    manifest = read_manifest(directory)
    engine = await TorchEngine.load(directory, manifest, EngineOptions(max_turns=512))
    sizes = SIZES[:4] if quick else SIZES
    levels = LEVELS[:2] if quick else LEVELS
    seen: dict[int, list[Level]] = {level: [] for level in levels}
    try:
        for number in range(1 if quick else ROUNDS):
            for level in levels:
                found = await _level(engine, number, level, sizes, manifest.geometry.vocab)
                seen[level].append(found)
        for level in levels:
            _report(report, level, seen[level])
        await _abort(engine, report, manifest.geometry.vocab)
    finally:
        await engine.close()
    engine.check_integrity()
    speeds = [statistics.median(one.speed for one in seen[level]) for level in levels]
    peak = speeds.index(max(speeds))
    floor = min(speeds[peak:]) / speeds[peak]
    report.row(
        "throughput_floor_share",
        floor,
        "",
        target=None if quick else 0.95,
        note="lowest level from the peak on, over the peak",
    )


@dataclass
class Level:
    """One run of a level; times in seconds."""

    speed: float  # tokens/s
    cpu_speed: float  # tokens per second of CPU time
    ttfts: list[float]
    gaps: list[float]
    lost: int


async def _level(
    engine: TorchEngine, number: int, turns: int, sizes: tuple[int, ...], vocab: int
) -> Level:
    """`turns` at once, at least 32 in all (twice `SIZES`)."""
    new = 32
    ttfts: list[float] = []
    gaps: list[float] = []
    lost = 0
    prompts = [
        random_prompts(1, sizes[i % len(sizes)], vocab, seed=(1000 * number + turns) * 1000 + i)[0]
        for i in range(max(turns, 2 * len(sizes)))
    ]
    waiting = asyncio.Semaphore(turns)

    async def one(number: int) -> None:
        nonlocal lost
        async with waiting:
            last = began = time.perf_counter()
            seen = 0
            turn = EngineTurn(turn=f"mixed{number}", prompt=prompts[number], max_tokens=new)
            async for output in engine.submit(turn):
                now = time.perf_counter()
                (gaps if seen else ttfts).append(now - (last if seen else began))
                seen += len(output.tokens)
                last = now
            lost += seen != new

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(len(prompts))))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    tokens = sum(map(len, prompts)) + new * len(prompts)
    return Level(tokens / seconds, tokens / cpu_s, ttfts, gaps, lost)


def _report(report: Report, turns: int, rounds: list[Level]) -> None:
    at = f"at_{turns}"
    note = f"prompts of 50 to 3,000, median of {len(rounds)}"
    speed = statistics.median(one.speed for one in rounds)
    report.row(f"engine_tokens_per_s_{at}", speed, "tokens/s", note=note)
    cpu_speed = statistics.median(one.cpu_speed for one in rounds)
    report.row(f"engine_tokens_per_cpu_s_{at}", cpu_speed, "tokens/s", note="of CPU time")
    for name in ("ttft", "gap"):
        ordered = sorted(value for one in rounds for value in getattr(one, name + "s"))
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        row = "ttft" if name == "ttft" else "inter_token"
        report.row(f"engine_{row}_ms_p50_{at}", statistics.median(ordered) * 1000, "ms")
        report.row(f"engine_{row}_ms_p99_{at}", p99 * 1000, "ms")
    lost = sum(one.lost for one in rounds)
    report.row(f"engine_lost_turns_{at}", float(lost), "turns", target=0, better="lower")


async def _abort(engine: TorchEngine, report: Report, vocab: int) -> None:
    """From leaving a turn to its pages being free, beside a long prompt that goes on."""
    other_prompt, prompt = random_prompts(2, 3000, vocab, seed=9)
    async with aclosing(engine.submit(EngineTurn("other", other_prompt, max_tokens=64))):
        stream = engine.submit(EngineTurn("leaves", prompt[:500], max_tokens=400))
        await anext(stream)
        await asyncio.sleep(0.05)  # into the middle of a step, where a cancel waits longest
        running = engine.stats().running
        began = time.perf_counter()
        await stream.aclose()
        async with asyncio.timeout(DEADLINE_S):
            while engine.stats().running >= running:  # noqa: ASYNC110 - the counts have no event
                await asyncio.sleep(0.001)
        seconds = time.perf_counter() - began
    report.row("engine_abort_ms", seconds * 1000, "ms", target=1000, better="lower")
