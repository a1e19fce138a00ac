"""A tenant that asks for far more than others do: what is left for them.

Both ask again as soon as a turn has ended. The quiet tenant has four turns. The noisy one has as
many (ordinary use), or sixteen times as many (a flood), before the quiet one comes.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time

from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from tests.bench.harness import Report

QUIET, NOISY = 4, 64
PROMPT, NEW = 64, 64
_names = itertools.count()


async def noisy_tenant_rows(
    report: Report, engine: TorchEngine, vocabulary: int, quick: bool
) -> None:
    """What a flood costs, over rounds of both uses in turn, and what having company costs."""
    seconds = 2.0 if quick else 12.0
    ordinary, flooded, alone, of_flood = [], [], [], []
    for _ in range(1 if quick else 3):
        alone.append((await _rates(engine, vocabulary, 0, seconds))["quiet"])
        ordinary.append((await _rates(engine, vocabulary, QUIET, seconds))["quiet"])
        rates = await _rates(engine, vocabulary, NOISY, seconds)
        flooded.append(rates["quiet"])
        of_flood.append(rates["noisy"])
    usual, least = statistics.median(ordinary), statistics.median(flooded)
    note = f"of a tenant's tokens/s, when another goes from {QUIET} turns to {NOISY}"
    report.row("noisy_tenant_cost_share", max(0.0, 1 - least / usual), "", 0.10, "lower", note)
    report.row("quiet_alone", statistics.median(alone), "tokens/s", note=f"{QUIET} turns")
    report.row("quiet_beside_ordinary", usual, "tokens/s")
    report.row("quiet_beside_flood", least, "tokens/s")
    report.row("flood_itself", statistics.median(of_flood), "tokens/s", note=f"{NOISY} turns")


async def _rates(
    engine: TorchEngine, vocabulary: int, noisy: int, seconds: float
) -> dict[str, float]:
    """Tokens per second of both while both are there."""
    made = {"quiet": 0, "noisy": 0}
    tasks = [asyncio.create_task(_asking(engine, "noisy", vocabulary, made)) for _ in range(noisy)]
    try:
        await asyncio.sleep(seconds / 4)  # the flood has the engine to itself at first
        tasks += [
            asyncio.create_task(_asking(engine, "quiet", vocabulary, made)) for _ in range(QUIET)
        ]
        await asyncio.sleep(seconds / 4)
        before, began = dict(made), time.perf_counter()
        await asyncio.sleep(seconds)
        took = time.perf_counter() - began
        return {tenant: (made[tenant] - before[tenant]) / took for tenant in made}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _asking(engine: TorchEngine, tenant: str, vocabulary: int, made: dict[str, int]) -> None:
    while True:
        number = next(_names)
        rng = random.Random(number)
        prompt = tuple(rng.randrange(5, vocabulary) for _ in range(PROMPT))
        turn = EngineTurn(f"{tenant}{number}", prompt, max_tokens=NEW, tenant=tenant)
        stream = engine.submit(turn)
        try:
            async for output in stream:
                made[tenant] += len(output.tokens)
        finally:
            await stream.aclose()
