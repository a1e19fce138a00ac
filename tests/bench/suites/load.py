"""Many turns at once over real processes: nothing lost, refusals at once, memory flat.

Rows: 128 turns through one edge, each in a session of its own, checked against the log token by
token; what a caller beyond the bound waits for its refusal; memory of edge and cloud over turns;
what 10,000 followed sessions cost.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field

import psutil

import segue
from segue.testing import LocalStack
from segue_contract.errors import Overloaded
from segue_contract.model.manifest import DEFAULT_MODEL, model_home
from tests.bench.harness import Report
from tests.bench.suites._followed import followed_rows
from tests.bench.suites._mixed import mixed_rows

CONCURRENT = 128
REFUSED = 64
AT_ONCE = 10  # turns in the memory test
REPLY_TOKENS = 32
PROMPT = "Write one sentence about the number {number}."


@dataclass
class Seen:
    """One turn as its device saw it."""

    tokens: int = 0
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    text: str = ""
    reason: str = ""


async def one_turn(client: segue.Client, name: str, prompt: str, tokens: int) -> Seen:
    seen = Seen()
    session = await client.session(name)
    began = last = time.monotonic()
    async with session.run(prompt, max_tokens=tokens, seed=1) as turn:
        async for event in turn:
            now = time.monotonic()
            if isinstance(event, segue.Frame):
                if not seen.tokens:
                    seen.ttft_s = now - began
                else:
                    seen.gaps_s.append(now - last)
                seen.tokens += len(event.tokens)
                seen.text += event.text
                last = now
            elif isinstance(event, segue.Ended):
                seen.reason = event.reason
    return seen


async def lost(client: segue.Client, name: str, seen: Seen) -> bool:
    """Whether the log's reply differs from what the device got, or the turn did not end well."""
    state = await (await client.session(name)).state()
    turn = state.turns[0]
    whole = turn.text == seen.text and len(turn.tokens) == seen.tokens
    return not (whole and turn.reason in ("stop", "length") and seen.reason == turn.reason)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def level(stack: LocalStack, report: Report, turns: int, tokens: int, most: int) -> None:
    """`turns` at once; prints throughput, waiting and what was lost."""
    async with segue.Client(stack.edge_address, device="load") as client:
        names = [f"load-{turns}-{number}" for number in range(turns)]
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(one_turn(client, name, PROMPT.format(number=i), tokens))
                for i, name in enumerate(names)
            ]
        seconds = time.monotonic() - began
        seen = [task.result() for task in tasks]
        gone = [await lost(client, name, one) for name, one in zip(names, seen, strict=True)]
    ttfts = [one.ttft_s * 1000 for one in seen]
    gaps = [gap * 1000 for one in seen for gap in one.gaps_s]
    report.row(f"tokens_per_s_at_{turns}", sum(one.tokens for one in seen) / seconds, "tokens/s")
    report.row(f"ttft_ms_p50_at_{turns}", statistics.median(ttfts), "ms")
    report.row(f"ttft_ms_p99_at_{turns}", percentile(ttfts, 0.99), "ms")
    report.row(f"inter_frame_ms_p50_at_{turns}", statistics.median(gaps), "ms")
    report.row(f"inter_frame_ms_p99_at_{turns}", percentile(gaps, 0.99), "ms")
    if turns == most:
        report.row("lost_turns", float(sum(gone)), "turns", target=0, better="lower")


async def refusals(stack: LocalStack, report: Report, bound: int) -> None:
    """Fill the node to its bound, then ask `REFUSED` times more, one after another."""
    waits: list[float] = []
    hints: list[float] = []
    async with (
        segue.Client(stack.edge_address, device="full") as client,
        segue.Client(stack.edge_address, device="beyond") as beyond,
    ):
        asking = [await beyond.session(f"beyond-{number}") for number in range(REFUSED)]
        held = [await client.session(f"full-{number}") for number in range(bound)]
        turns = [
            session.run("Go on and on.", max_tokens=4000, temperature=2.0, seed=number)
            for number, session in enumerate(held)
        ]  # so hot that hardly any of them finds its end
        async with asyncio.TaskGroup() as group:
            for turn in turns:
                group.create_task(turn.__aenter__())
        for session in asking:
            began = time.monotonic()
            error = await _refusal(session)
            if error is not None:
                waits.append((time.monotonic() - began) * 1000)
                hints.append(float(error.fields.get("retry_after_s", 0.0)))
        for session in held:
            await session.stop()
        for turn in turns:
            await turn.result()
    report.row("refused", float(len(waits)), "turns", note=f"of {REFUSED} beyond {bound}")
    if waits:
        report.row("refusal_ms_p50", statistics.median(waits), "ms")
        report.row("refusal_ms_p99", percentile(waits, 0.99), "ms", target=50.0, better="lower")
        report.row("refusal_retry_hint_s", statistics.median(hints), "s")


async def _refusal(session: segue.Session) -> Overloaded | None:
    """The error of a turn that is refused; None where it was served (a place was free)."""
    try:
        async with session.run("Me too.", max_tokens=1) as turn:
            await turn.result()
    except Overloaded as error:
        return error
    return None


async def memory(stack: LocalStack, report: Report, turns: int) -> None:
    """Growth of resident memory once a fifth of the turns has filled caches and allocators.

    The KV caches are small here, so that they are full by then: what grows on would be a leak.
    """
    programs = {
        "edge": psutil.Process(stack.edges[0].pid),
        "cloud": psutil.Process(stack.cloud.pid),
    }
    warm: dict[str, int] = {}
    done = 0
    async with segue.Client(stack.edge_address, device="memory") as client:
        while done < turns:
            async with asyncio.TaskGroup() as group:
                for number in range(done, done + AT_ONCE):
                    prompt = PROMPT.format(number=number) + " Keep it short and kind. " * 8
                    group.create_task(one_turn(client, f"memory-{number}", prompt, 4))
            done += AT_ONCE
            if not warm and done >= turns // 5:
                warm = {name: process.memory_info().rss for name, process in programs.items()}
    for name, process in programs.items():
        now = process.memory_info().rss
        report.row(f"rss_{name}_mb", now / 2**20, "MiB", note=f"after {turns} turns")
        report.row(
            f"rss_growth_{name}",
            now / warm[name] - 1,
            "share",
            note=f"from turn {turns // 5} to turn {turns}",
        )


async def _run(report: Report, quick: bool) -> None:
    bound = 16 if quick else CONCURRENT
    args = ("--max-turns", str(bound))
    async with LocalStack(edge_args=args) as stack:
        for turns in (4, bound) if quick else (1, 8, 32, CONCURRENT):
            await level(stack, report, turns, 8 if quick else REPLY_TOKENS, bound)
        await refusals(stack, report, bound)
    small = ("--pool-mb", "128", "--host-mb", "32")
    async with LocalStack(cloud_args=small, edge_args=("--cache-mb", "32")) as stack:
        await memory(stack, report, 40 if quick else 1000)


def run(report: Report, quick: bool) -> None:
    asyncio.run(mixed_rows(report, model_home() / DEFAULT_MODEL, quick))
    asyncio.run(_run(report, quick))
    asyncio.run(followed_rows(report, quick))
