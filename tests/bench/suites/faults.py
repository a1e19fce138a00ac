"""Real processes that die, fall silent or stop as planned in mid-reply: what readers notice of it.

Rows: the readers' longest pause around each kind of fault, a follower's lag while the broker is
away, what was told and is not in the log, what is there twice; then what four settings of the
store lose. A fault strikes several replies, so it gives several samples; each row says how many.

`SEGUE_BENCH_FAULTS` faults of each of the ten kinds, else 100, so 1,000 in all: about an hour on
two quiet cores. The kinds take turns, and after `SEGUE_BENCH_MINUTES`, or Ctrl-C, the rows are
those of the faults that were seen by then. `SEGUE_BENCH_SEED` repeats a run's choices.
`SEGUE_BENCH_REPLIES`: so many at once, else one for each two cores. Whoever takes a reply over
computes its prompt and text again, so with more of them the pauses are those of the machine.
`SEGUE_BENCH_APPENDS`: written to each store, else 100,000; 0 leaves the stores out.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random

import segue
from segue_contract.errors import SegueError
from tests.bench.harness import Report
from tests.bench.suites._fault_house import House, Kind, house
from tests.bench.suites._fault_round import HOLD_S, STRIKES, WAYS, Fault, Round
from tests.bench.suites._fault_stock import Stock
from tests.bench.suites._fault_store import store_rows
from tests.bench.suites._fault_turn import Found

HOW = ("killed", "silent", "planned")
KINDS = (
    *(Kind(how, part) for part in ("edge", "cloud") for how in HOW),
    *(Kind(how, part) for part in ("store", "broker") for how in ("killed", "silent")),
)
QUICK = (Kind("silent", "broker"), Kind("killed", "cloud"))
FAULTS = 100
APPENDS = 100_000
QUICK_APPENDS = 1_000
SILENT_MS = 2000.0
PLANNED_MS = 1000.0
BROKER_LAG_MS = 2000.0
FAILED_ROUNDS = 3  # one after another: nothing more is to be learned
EVENLY = 2  # no kind is so many faults ahead of another


def number_from(name: str, default: int, least: int) -> int:
    """Raises ValueError where the environment's `name` is no such number."""
    text = os.environ.get(name, "")
    try:
        asked = int(text) if text else default
    except ValueError:
        asked = least - 1
    if asked < least:
        raise ValueError(f"{name} is {text!r}; give a number, {least} or more.")
    return asked


@dataclass
class Seen:
    """What all rounds saw so far."""

    faults: list[Fault] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    replies: int = 0
    broken: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, done: Round) -> None:
        self.faults += done.faults
        self.found = self.found + done.found
        self.replies += sum(done.ended.values())
        self.broken += done.broken
        self.ended += done.ended


class Campaign:
    """Which kind comes next: each `count` times, evenly, until `until` (monotonic)."""

    def __init__(
        self, stock: Stock, kinds: Sequence[Kind], count: int, until: float, random: Random
    ) -> None:
        self._stock = stock
        self._kinds = list(kinds)
        self._count = count
        self._until = until
        self._random = random
        self._done: Counter[str] = Counter()
        self._chosen: Counter[str] = Counter()  # in the round under way

    @property
    def over(self) -> bool:
        return not self._open() or time.monotonic() > self._until

    def saw(self, faults: Sequence[Fault]) -> None:
        """A round is over: what it chose and could not strike comes again."""
        self._done.update(fault.kind for fault in faults)
        self._chosen.clear()

    async def next(self) -> Kind | None:
        """The next one that is possible now, once there is one; None where all are done."""
        if self.over:
            return None
        kind = await self._stock.until_possible(self._open())
        self._chosen[kind.name] += 1
        return kind

    def _open(self) -> list[Kind]:
        chosen = self._done + self._chosen
        left = [kind for kind in self._kinds if chosen[kind.name] < self._count]
        least = min((chosen[kind.name] for kind in left), default=0)
        left = [kind for kind in left if chosen[kind.name] < least + EVENLY]
        self._random.shuffle(left)
        return sorted(left, key=lambda kind: chosen[kind.name])


def run(report: Report, quick: bool) -> None:
    asyncio.run(_run(report, quick))


async def _run(report: Report, quick: bool) -> None:
    kinds = QUICK if quick else KINDS
    count = 1 if quick else number_from("SEGUE_BENCH_FAULTS", FAULTS, 1)
    minutes = 0 if quick else number_from("SEGUE_BENCH_MINUTES", 0, 0)
    appends = QUICK_APPENDS if quick else number_from("SEGUE_BENCH_APPENDS", APPENDS, 0)
    replies = number_from("SEGUE_BENCH_REPLIES", max(1, (os.cpu_count() or 1) // 2), 1)
    seed = number_from("SEGUE_BENCH_SEED", int.from_bytes(os.urandom(4)), 0)
    print(f"SEGUE_BENCH_SEED={seed}", file=sys.stderr)
    report.details["seed"] = seed
    seen = Seen()
    try:
        async with house(edges=1 if quick else 3, clouds=2 if quick else 3) as parts:
            await _warm_up(parts)
            async with Stock(parts) as stock:
                until = time.monotonic() + (60.0 * minutes or float("inf"))
                at_once = 2 if quick else min(replies, len(WAYS))
                await _strike_all(stock, kinds, count, until, Random(seed), seen, at_once)
    finally:
        rows(report, kinds, seen)
    if appends:
        await store_rows(report, appends)


async def _strike_all(
    stock: Stock,
    kinds: Sequence[Kind],
    count: int,
    until: float,
    random: Random,
    seen: Seen,
    at_once: int,
) -> None:
    campaign = Campaign(stock, kinds, count, until, random)
    began = time.monotonic()
    number = failed = 0
    while not campaign.over:
        number += 1
        ways = [WAYS[(number * at_once + place) % len(WAYS)] for place in range(at_once)]
        one = Round(stock, number, random, ways)
        try:
            await one.run(campaign.next, STRIKES)
            failed = 0
        except SegueError as error:  # a device could not go on: that is a finding, not an accident
            print(f"round {number}: {error!r}", file=sys.stderr)
            one.broken, failed = max(1, one.broken), failed + 1
            if failed == FAILED_ROUNDS:
                raise
        finally:
            seen.add(one)
            seen.seconds = time.monotonic() - began
        campaign.saw(one.faults)


async def _warm_up(parts: House) -> None:
    """One short reply by each edge, so that no first use is measured."""
    for edge in parts.edges:
        async with segue.Client(edge.address, device="warm") as client:
            session = await client.session(f"warm-{edge.name}")
            async with session.run("Hello!", max_tokens=8, plan="ship") as turn:
                await turn.result()


def rows(report: Report, kinds: Sequence[Kind], seen: Seen) -> None:
    """All rows but the stores'; those of kinds that no fault was seen of are left out."""
    for kind in kinds:
        found = [one for one in seen.faults if one.kind == kind.name]
        if any(one.samples for one in found):
            pause_rows(report, kind, found)
        else:
            report.missing(f"{kind.name}_*", "no such fault was reached")
    total_rows(report, seen)
    report.details["faults"] = [asdict(one) for one in seen.faults]
    report.details["lost_or_doubled"] = list(seen.found.what)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def pause_rows(report: Report, kind: Kind, found: Sequence[Fault]) -> None:
    """The readers' pause around one kind of fault, and the follower's lag where it is the point."""
    samples = [one for fault in found for one in fault.samples]
    pauses = [one.pause_s * 1000 for one in samples]
    report.row(f"{kind.name}_pause_ms_p50", quantile(pauses, 0.5), "ms")
    goal = {"silent": SILENT_MS, "planned": PLANNED_MS}.get(kind.how)
    report.row(
        f"{kind.name}_pause_ms_p99",
        quantile(pauses, 0.99),
        "ms",
        goal if kind.others_go_on else None,
        "lower",
        _note(found, pauses),
    )
    if kind.part == "cloud":
        for way in dict.fromkeys(one.name for one in WAYS):
            some = [one.pause_s * 1000 for one in samples if one.way == way]
            if some:
                note = f"{len(some)} samples, worst {max(some):,.0f}"
                name = f"{kind.name}_{way}_pause_ms_p99"
                report.row(name, quantile(some, 0.99), "ms", note=note)
    if kind.part == "broker":
        lags = [lag * 1000 for fault in found for lag in fault.lags_s]
        hang = kind.how == "silent"
        name = "broker_hang_lag_ms" if hang else "broker_killed_lag_ms"
        report.row(f"{name}_p50", quantile(lags, 0.5), "ms")
        report.row(
            f"{name}_p99",
            quantile(lags, 0.99),
            "ms",
            BROKER_LAG_MS if hang else None,
            "lower",
            f"a follower's lag behind the log: {len(found)} faults, {len(lags)} followers, "
            f"worst {max(lags):,.0f}",
        )


def _note(found: Sequence[Fault], pauses: Sequence[float]) -> str:
    samples = [one for fault in found for one in fault.samples]
    notes = [
        f"{len(found)} faults, {len(samples)} samples, worst {max(pauses):,.0f}",
        f"{sum(one.taken_over for one in samples)} taken over",
    ]
    if held := sum(one.held_out for one in found):
        notes.append(f"{held} waited until the part went on after {HOLD_S:.0f} s")
    if broken := [one.broken for one in samples if one.broken]:
        notes.append(f"{len(broken)} broken: {', '.join(sorted(set(broken)))}")
    return "; ".join(notes)


def total_rows(report: Report, seen: Seen) -> None:
    """What holds over all faults."""
    planned = [
        one.pause_s * 1000
        for fault in seen.faults
        if fault.kind.startswith("planned")
        for one in fault.samples
    ]
    if planned:
        report.row(
            "planned_stop_pause_ms_p99",
            quantile(planned, 0.99),
            "ms",
            PLANNED_MS,
            "lower",
            f"SIGTERM of an edge or a cloud, others at hand: {len(planned)} samples, "
            f"worst {max(planned):,.0f}",
        )
    found = seen.found
    samples = sum(len(one.samples) for one in seen.faults)
    note = f"{samples} samples in {seen.replies} replies, {seen.seconds / 60:.1f} minutes"
    report.row("faults", len(seen.faults), "faults", note=note)
    note = f"of {found.tokens} tokens told as durable and {found.values} acknowledged values"
    report.row("lost_ops", found.lost, "ops", 0, "lower", note)
    report.row("doubled_ops", found.doubled, "ops", 0, "lower")
    ends = ", ".join(f"{count} {reason}" for reason, count in sorted(seen.ended.items()))
    note = f"ended with an error, or never; ends: {ends}"
    report.row("broken_replies", seen.broken, "replies", 0, "lower", note)
