"""The command `scripts/card`: its arguments, what it shows, and one JSON of all steps."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.harness import ROOT, Row, machine_facts, machine_line, row_table
from tests.card import packages
from tests.card.plan import CPU_PATIENCE, STEPS, TOTAL_LIMIT_S, Step
from tests.card.runner import Outcome, run_steps, write_json

SOURCES = tuple(ROOT / part / "src" for part in ("protos", "client_sdk", "edge", "cloud"))
RESULTS = ROOT / ".card" / "results"


def main() -> int:
    given = _arguments()
    if given.pack:
        return packages.pack()
    try:
        import torch
    except ImportError:
        print("error: this Python has no PyTorch, and nothing here installs it.", file=sys.stderr)
        print(f"hint:  run it with one that has: PYTHON {sys.argv[0]}", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    chosen = [step for step in STEPS if not given.steps or step.name in given.steps]
    folder = given.json.resolve().parent if given.json else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    file = given.json.resolve() if given.json else RESULTS / "card.json"
    if card == "cpu" and not given.quick:
        print("error: PyTorch sees no CUDA card here, so there is nothing to measure.")
        print("hint:  scripts/card --quick runs every line of it on the CPU, with tiny shapes.")
        return 2
    total_s = TOTAL_LIMIT_S
    if card == "cpu":  # no loan runs out, and other programs may have the processor
        chosen = [replace(step, limit_s=CPU_PATIENCE * step.limit_s) for step in chosen]
        total_s *= CPU_PATIENCE
    with tempfile.TemporaryDirectory(prefix="segue-card-") as unpacked:
        environment = _Environment(Path(unpacked))
        return _run(chosen, card, file, given.quick, environment, total_s)


def _arguments() -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="scripts/card",
        description="Checks and measures the engine on a CUDA card, in six minutes at most.",
        epilog="Where there is a network: scripts/card --pack. Then, with the card and without a "
        "network: scripts/card --json FILE. Each step's JSON lies beside FILE as soon as it ends.",
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="all steps' results, in one file")
    parser.add_argument("--quick", action="store_true", help="tiny; without a card on the CPU")
    parser.add_argument("--pack", action="store_true", help="fill .card/wheels, and end")
    given = parser.parse_args()
    for name in given.steps:
        if name not in names:
            parser.error(f"there is no step {name!r}; there are {', '.join(names)}")
    return given


class _Environment:
    """What a step's process sees: the sources, then carried packages that this Python lacks."""

    def __init__(self, folder: Path) -> None:
        wheels = packages.wheels_in(packages.WHEELS)
        special = {one.partition("==")[0] for one in packages.FLASHINFER}
        self._usual, self._flashinfer = folder / "usual", folder / "flashinfer"
        plain = [wheel for wheel in wheels if wheel.name not in special]
        self.added = packages.unpack(plain, self._usual)
        more = packages.unpack([w for w in wheels if w.name in special], self._flashinfer)
        self.added += more

    def __call__(self, step: Step) -> Mapping[str, str]:
        paths = [ROOT, *SOURCES, self._usual]
        if step.flashinfer:
            paths.append(self._flashinfer)
        given = os.environ.get("PYTHONPATH", "")
        found = [*map(str, paths), *([given] if given else [])]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(found),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def _run(
    steps: Sequence[Step],
    card: str,
    file: Path,
    quick: bool,
    environment: _Environment,
    total_s: float,
) -> int:
    machine = machine_facts() | {"card": card}
    out = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    out.print(f"Segue on {card}{', tiny shapes' if quick else ''}")
    out.print(machine_line(machine), style="dim")
    if environment.added:
        out.print(f"carried packages in use: {', '.join(environment.added)}", style="dim")
    out.print()
    began, when = time.monotonic(), time.strftime("%Y-%m-%d %H:%M")
    outcomes: list[Outcome] = []
    run = run_steps(steps, file.parent, quick, environment, total_s)
    waiting = list(steps)
    try:
        while waiting:
            with _shown(waiting[0], len(outcomes), len(steps)):
                outcome = next(run)
            waiting.pop(0)
            outcomes.append(outcome)
            out.print(_line(outcome))
            found = _summary(outcomes, machine, card, quick, when, time.monotonic() - began)
            write_json(file, found)
    except KeyboardInterrupt:
        out.print(f"Stopped. What has ended is in {_named(file)}.")
        return 130
    finally:
        run.close()
    _tell(out, outcomes, file, time.monotonic() - began)
    return 0 if all(one.state == "ok" for one in outcomes) else 1


def _summary(
    outcomes: Sequence[Outcome],
    machine: Mapping[str, Any],
    card: str,
    quick: bool,
    when: str,
    seconds: float,
) -> dict[str, Any]:
    return {
        "card": card,
        "quick": quick,
        "began": when,
        "seconds": round(seconds, 1),
        "machine": dict(machine),
        "steps": [one.as_json() for one in outcomes],
    }


@contextlib.contextmanager
def _shown(step: Step, done: int, of: int) -> Iterator[None]:
    """What runs now; on a terminal with a sign of life, else one line."""
    text = f"{step.name}: {step.title} ({done + 1} of {of}, at most {step.limit_s:.0f} s)"
    errors = Console(stderr=True)
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield
        return
    with errors.status(text):
        yield


def _goals(rows: Sequence[Row]) -> tuple[int, int]:
    known = [row.met for row in rows if row.met is not None]
    return sum(map(bool, known)), len(known)


def _line(one: Outcome) -> str:
    mark = {"ok": "[green]ok[/]", "left out": "[yellow]left out[/]"}.get(one.state)
    mark = mark or f"[red]{one.state}[/]"
    wide = " " * (8 - len(one.state))
    met, of = _goals(one.rows)
    goals = f"{met} of {of} goals" if of else ""
    text = (
        f"  {one.step.name:<10} {mark}{wide} {one.seconds:4.0f} s  {len(one.rows):3d} rows  {goals}"
    )
    return text if one.state == "ok" else f"{text}\n             [dim]{_plain(one.reason)}[/]"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _tell(out: Console, outcomes: Sequence[Outcome], file: Path, seconds: float) -> None:
    """The figures of each step, then what is to be done next."""
    for one in outcomes:
        if not one.rows:
            continue
        out.print(f"\n[bold]{one.step.name}[/]: {one.step.title}")
        out.print(row_table(one.rows))
        for left in one.found.get("left_out", []):
            out.print(f"Not measured: {left['rows']}: {_plain(left['reason'])}", style="yellow")
    out.print()
    bad = [one for one in outcomes if one.state != "ok"]
    missed = [row.name for one in outcomes for row in one.rows if row.met is False]
    out.print(f"{len(outcomes) - len(bad)} of {len(outcomes)} steps ended well, {seconds:.0f} s.")
    for one in bad:
        where = _named(file.parent / f"{one.step.name}.json")
        out.print(f"  {one.step.name} {one.state}: last_lines in {where} say why", style="red")
    if missed:
        out.print("Goals missed; kernels of each under details.profile_* of its step's JSON:")
        for name in missed:
            out.print(f"  {name}", style="yellow")
    out.print(f"Everything is in {_named(file)}; its place is docs/performance.md, On a GPU.")


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
