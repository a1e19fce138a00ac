"""Real processes that die, fall silent or stop as planned in mid-reply: what readers notice of it.

Rows: the reader's longest pause around each kind of fault, a follower's lag while the broker is
away, what was told and is not in the log, what is there twice; then what four settings of the
store lose. `SEGUE_BENCH_FAULTS` faults of each kind, else 100: 1,400 in all, some hours.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict

import segue
from tests.bench.harness import Report
from tests.bench.suites._fault_house import House, Kind, house
from tests.bench.suites._fault_store import store_rows
from tests.bench.suites._fault_turn import Outcome, one_fault

HOW = ("killed", "silent", "planned")
KINDS = (
    *(Kind(how, part) for part in ("edge", "cloud") for how in HOW),
    Kind("silent", "cloud", plan="text"),
    *(Kind(how, "cloud", direct=True) for how in HOW),
    *(Kind(how, part) for part in ("store", "broker") for how in ("killed", "silent")),
)
QUICK = (Kind("silent", "broker"), Kind("killed", "cloud"))
FAULTS = 100
APPENDS = 100_000
QUICK_APPENDS = 1_000
HOLD_S = 20.0
SILENT_MS = 2000.0
PLANNED_MS = 1000.0
BROKER_LAG_MS = 2000.0
# What was broken is known again to everybody who asks for it: a few rounds of an edge's probe.
SETTLE_S = 4.0


def faults_per_kind() -> int:
    """Raises ValueError where SEGUE_BENCH_FAULTS is no positive number."""
    asked = int(os.environ.get("SEGUE_BENCH_FAULTS", FAULTS))
    if asked < 1:
        raise ValueError(f"SEGUE_BENCH_FAULTS is {asked}; give 1 or more.")
    return asked


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(report: Report, quick: bool) -> None:
    asyncio.run(_run(report, quick))


async def _run(report: Report, quick: bool) -> None:
    kinds = QUICK if quick else KINDS
    count = 1 if quick else faults_per_kind()
    outcomes: dict[str, list[Outcome]] = {}
    async with house(edges=1 if quick else 2) as parts:
        await _warm_up(parts)
        for kind in kinds:
            found = []
            for number in range(count):
                last = kind is kinds[-1] and number == count - 1
                found.append(await one_fault(parts, kind, number, HOLD_S, last=last))
                if not last and not quick:
                    await asyncio.sleep(SETTLE_S)
            outcomes[kind.name] = found
            pause_rows(report, kind, found)
    total_rows(report, outcomes)
    report.details["faults"] = {
        name: [asdict(one) for one in found] for name, found in outcomes.items()
    }
    await store_rows(report, QUICK_APPENDS if quick else APPENDS)


async def _warm_up(parts: House) -> None:
    """One short reply by each edge, so that no first use is measured."""
    for edge in parts.edges:
        async with segue.Client(edge.address, device="warm") as client:
            session = await client.session(f"warm-{edge.name}")
            async with session.run("Hello!", max_tokens=8, plan="ship") as turn:
                await turn.result()


def pause_rows(report: Report, kind: Kind, found: Sequence[Outcome]) -> None:
    """The reader's pause around one kind of fault, and the follower's lag where it is the point."""
    pauses = [one.pause_s * 1000 for one in found]
    notes = [f"{len(found)} faults, {sum(one.taken_over for one in found)} taken over"]
    if held := sum(one.held_out for one in found):
        notes.append(f"{held} waited until the part was resumed after {HOLD_S:.0f} s")
    if broken := [one.broken for one in found if one.broken]:
        notes.append(f"{len(broken)} broken: {', '.join(sorted(set(broken)))}")
    report.row(f"{kind.name}_pause_ms_p50", quantile(pauses, 0.5), "ms")
    report.row(
        f"{kind.name}_pause_ms_p99",
        quantile(pauses, 0.99),
        "ms",
        SILENT_MS if kind.how == "silent" and kind.others_go_on else None,
        "lower",
        "; ".join(notes),
    )
    if kind.part == "broker":
        lags = [one.lag_s * 1000 for one in found]
        hang = kind.how == "silent"
        name = "broker_hang_lag_ms" if hang else "broker_killed_lag_ms"
        report.row(f"{name}_p50", quantile(lags, 0.5), "ms")
        report.row(
            f"{name}_p99",
            quantile(lags, 0.99),
            "ms",
            BROKER_LAG_MS if hang else None,
            "lower",
            "a follower's lag behind the log",
        )


def total_rows(report: Report, outcomes: dict[str, list[Outcome]]) -> None:
    """What holds over all faults."""
    every = [one for found in outcomes.values() for one in found]
    planned = [
        one.pause_s * 1000
        for name, found in outcomes.items()
        if name.startswith("planned")
        for one in found
    ]
    if planned:
        report.row(
            "planned_stop_pause_ms_p99",
            quantile(planned, 0.99),
            "ms",
            PLANNED_MS,
            "lower",
            "SIGTERM of an edge or a cloud, a second one at hand",
        )
    told = sum(one.tokens for one in every)
    values = sum(one.values for one in every)
    lost, doubled = sum(one.lost for one in every), sum(one.doubled for one in every)
    report.row("faults", len(every), "faults")
    note = f"of {told} tokens told as durable and {values} acknowledged values"
    report.row("lost_ops", lost, "ops", 0, "lower", note)
    report.row("doubled_ops", doubled, "ops", 0, "lower")
    broken = sum(bool(one.broken) for one in every)
    report.row("broken_replies", broken, "replies", 0, "lower", "ended with an error, or never")
