"""`scripts/sim`: many seeds over all processors, or one of them again with all that happened."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

from tests.sim import run as runs
from tests.sim import scenarios
from tests.sim.patches import prepare

_CHUNK = 2  # seeds at once in a process
_SAY_EVERY = 500  # seeds
_TAIL = 40  # events of a failing run that are printed without -v


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--once", action="store_true", help="do not run each seed twice")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-edges", action="store_true", help="clouds and devices only")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every event")
    chosen = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != "0":
        print("Without PYTHONHASHSEED=0 a seed may run otherwise elsewhere.", file=sys.stderr)
    if chosen.no_edges:
        scenarios.EDGES_EVERY = 0
    if chosen.seed is not None:
        outcome = runs.run(chosen.seed)
        show(outcome, verbose=chosen.verbose)
        return bool(outcome.failure)
    return many(range(chosen.start, chosen.start + chosen.seeds), chosen.jobs, chosen.once)


def many(seeds: range, jobs: int, once: bool) -> int:
    began = time.perf_counter()
    done = failed = steps = 0
    work = runs.run if once else runs.twice
    prepare()  # once, before processes are made of this one
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for outcome in pool.imap_unordered(work, seeds, chunksize=_CHUNK):
            done += 1
            steps += outcome.steps
            if done % _SAY_EVERY == 0:
                passed_s = time.perf_counter() - began
                print(f"{done} seeds, {failed} failed, {passed_s:.0f} s", file=sys.stderr)
            if outcome.failure:
                failed += 1
                show(outcome)
                show(runs.minimise(outcome), verbose=False)
    print(
        f"{len(seeds)} seeds, {failed} failed, {steps} steps, {time.perf_counter() - began:.1f} s"
    )
    return min(failed, 1)


def show(outcome: runs.Outcome, *, verbose: bool = False) -> None:
    print(f"seed {outcome.seed}: {outcome.steps} steps, {outcome.seconds:.1f} s of its time")
    for fault in outcome.faults:
        print(f"  {fault}")
    for event in outcome.trace if verbose else outcome.trace[-_TAIL:] * bool(outcome.failure):
        at_s, process, *what = event
        print(f"  {at_s:10.6f}  {process:10}", *what)
    print(f"  {outcome.failure or 'all held'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
