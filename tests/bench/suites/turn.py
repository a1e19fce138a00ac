"""Turns through real processes: what a device waits for, and how much of it is not the model.

The edge's uplink is paced to 1 Gbps, so that loopback behaves like the link of the figures.
Every long prompt is new from its first word on: no cache helps, but for the rows that say so.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

import segue
from segue.testing import LocalStack
from segue_contract.plan import PlanReport
from tests.bench.harness import Report

SEED = 20
LINK_MBPS = 1000
LONG_WORDS = 480  # 520 to 540 tokens with the chat template
QUICK_WORDS = 300  # two chunks of the prefill, as the long ones have
REPLY_TOKENS = 24

WORDS = (
    "river", "stone", "window", "garden", "letter", "morning", "engine", "silver", "bridge",
    "market", "winter", "island", "paper", "candle", "forest", "signal", "harbour", "theatre",
    "mountain", "village", "captain", "picture", "yellow", "quiet", "distant", "answer", "travel",
    "number", "station", "copper", "kitchen", "summer", "ladder", "blanket", "orchard", "compass",
    "lantern",
)  # fmt: skip


@dataclass
class Timed:
    """One turn as its device saw it: seconds from asking; tokens after the first per second."""

    ttft_s: float
    tokens: int
    tokens_per_s: float
    made_by: str
    plan: PlanReport


async def timed(session: segue.Session, prompt: str, shape: str, tokens: int) -> Timed | None:
    """None where the model ended its reply before a second token."""
    began = time.perf_counter()
    first = last = 0.0
    count = 0
    made_by = ""
    plan: PlanReport | None = None
    async with session.run(prompt, max_tokens=tokens, seed=1, plan=shape) as turn:
        async for event in turn:
            if isinstance(event, segue.Frame):
                last = time.perf_counter()
                if not count:
                    first, made_by = last, event.made_by
                count += len(event.tokens)
            elif isinstance(event, segue.Ended):
                plan = event.plan
    if count < 2 or plan is None:
        return None
    rate = (count - 1) / max(last - first, 1e-9)
    return Timed(first - began, count, rate, made_by, plan)


class Bench:
    """Asks through one client, each prompt in a session of its own."""

    def __init__(self, client: segue.Client, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self._sessions = 0

    async def session(self) -> segue.Session:
        self._sessions += 1
        return await self._client.session(f"turn-{self._sessions}")

    def prompt(self, words: int) -> str:
        notes = " ".join(self._rng.choice(WORDS) for _ in range(words))
        return f"Notes: {notes}. Write a long story with all of these words."

    async def ask(self, shape: str, words: int, turns: int, tokens: int) -> list[Timed]:
        found = []
        for _ in range(turns):
            one = await timed(await self.session(), self.prompt(words), shape, tokens)
            if one is not None:
                found.append(one)
        return found


def median_ms(values: list[float]) -> float:
    return statistics.median(values) * 1000 if values else 0.0


def ship_rows(report: Report, turns: list[Timed]) -> None:
    """The figures of the hand-over: overhead and how early the KV goes up."""
    edge_first = [one for one in turns if one.made_by == "edge"]
    # as the device sees it: its own RPC counts, too
    overhead = [one.ttft_s - one.plan.prefill_s for one in edge_first]
    shares = [
        one.plan.shipped_before_prefill_end_bytes / one.plan.shipped_bytes
        for one in turns
        if one.plan.shipped_bytes
    ]
    report.row(
        "overhead_ms_p50",
        median_ms(overhead),
        "ms",
        target=15,
        better="lower",
        note="time to first token on the device that is not the model",
    )
    report.row(
        "upload_share_before_prefill_end",
        statistics.median(shares) if shares else 0.0,
        "of KV bytes",
        target=0.8,
        note=f"{LINK_MBPS} Mbps, {turns[0].plan.prompt_tokens if turns else 0} prompt tokens",
    )
    report.row("overhead_ms_worst", max(overhead, default=0.0) * 1000, "ms")
    report.row("edge_overhead_ms_p50", median_ms([o.plan.overhead_s for o in edge_first]), "ms")
    report.row("bridge_tokens_p50", _median([float(o.plan.bridge_tokens) for o in turns]), "tokens")
    report.row(
        "wire_vs_fp16",
        _median([o.plan.shipped_bytes / max(1, o.plan.shipped_fp16_bytes) for o in turns]),
        "ratio",
    )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def shape_rows(report: Report, name: str, turns: list[Timed]) -> None:
    report.row(f"ttft_ms_p50_{name}", median_ms([one.ttft_s for one in turns]), "ms")
    report.row(f"tokens_per_s_{name}", _median([one.tokens_per_s for one in turns]), "tokens/s")
    gaps = [one.plan.actual.gap_s for one in turns if one.plan.actual is not None]
    report.row(f"first_gap_ms_p50_{name}", median_ms(gaps), "ms")


async def second_turns(report: Report, bench: Bench, turns: int, words: int) -> None:
    """A follow-up in a session whose KV both sides hold."""
    waits, reused = [], []
    for _ in range(turns):
        session = await bench.session()
        if await timed(session, bench.prompt(words), "ship", REPLY_TOKENS) is None:
            continue
        one = await timed(session, "And then? Go on with the story.", "ship", REPLY_TOKENS)
        if one is not None:
            waits.append(one.ttft_s)
            reused.append(one.plan.edge_cached_blocks / max(1, one.plan.prompt_blocks))
    report.row("ttft_ms_p50_second_turn", median_ms(waits), "ms")
    report.row("edge_blocks_reused_second_turn", _median(reused), "of blocks")


async def _run(report: Report, quick: bool) -> None:
    turns, words = (2, QUICK_WORDS) if quick else (10, LONG_WORDS)
    rng = random.Random(SEED)
    async with (
        LocalStack(edge_args=("--link-mbps", str(LINK_MBPS))) as stack,
        segue.Client(stack.edge_address, device="bench") as client,
    ):
        bench = Bench(client, rng)
        for shape in ("ship", "text", "edge"):  # every path once before it counts
            await bench.ask(shape, 120, 1 if quick else 2, 8)
        shipped = await bench.ask("ship", words, turns, REPLY_TOKENS)
        ship_rows(report, shipped)
        shape_rows(report, "ship", shipped)
        others = max(1, turns // 2)
        for shape in ("text", "edge"):
            asked = await bench.ask(shape, words, others, REPLY_TOKENS)
            shape_rows(report, shape, asked)
        shape_rows(report, "auto", await bench.ask("", words, others, REPLY_TOKENS))
        short = await bench.ask("ship", 12, others, REPLY_TOKENS)
        report.row("ttft_ms_p50_short_prompt", median_ms([one.ttft_s for one in short]), "ms")
        await second_turns(report, bench, others, words)


def run(report: Report, quick: bool) -> None:
    """Needs the built model; `quick` asks for a few shorter turns only."""
    asyncio.run(_run(report, quick))
