"""Runs seeds: once or twice, in one process or several; prints what a failing one did."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from tests.sim import faults, scenarios
from tests.sim.faults import Fault
from tests.sim.patches import patched
from tests.sim.world import Violation, World

MAX_TRIES = 40  # runs to cut down one failing list of faults


@dataclass
class Outcome:
    """What became of one seed. `failure`: "" where all held."""

    seed: int
    faults: list[Fault]
    failure: str = ""
    digest: str = ""
    steps: int = 0
    seconds: float = 0.0
    trace: list[tuple[Any, ...]] = field(default_factory=list)


def twice(seed: int) -> Outcome:
    """As `run`, and again: a run that differs from its repetition is a failure."""
    first = run(seed)
    second = run(seed, first.faults, looks=False)
    if not first.failure and first.digest != second.digest:
        first.failure = f"Two runs of one seed differ: {_difference(first.trace, second.trace)}"
    return first


def _difference(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> str:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return f"event {place} is {left}, then {right}"
    return f"{len(one)} events, then {len(other)}, or other numbers of steps"


def minimise(outcome: Outcome) -> Outcome:
    """Leave out faults as long as the run still fails in the same way."""
    kind = outcome.failure.split("\n")[0]
    best, tried = outcome, 0
    place = 0
    while place < len(best.faults) and tried < MAX_TRIES:
        tried += 1
        fewer = run(outcome.seed, best.faults[:place] + best.faults[place + 1 :])
        if fewer.failure.split("\n")[0] == kind:
            best = fewer
        else:
            place += 1
    return best


def faults_of(seed: int) -> list[Fault]:
    kinds = faults.kinds_for(scenarios.has_edges(seed))
    return faults.draw(World(seed).rng("faults"), scenarios.BUSY_S, kinds)


def run(seed: int, given: list[Fault] | None = None, *, looks: bool = True) -> Outcome:
    """One life of one seed; `given` replaces the faults that it draws."""
    world = World(seed, looks=looks)
    outcome = Outcome(seed, faults_of(seed) if given is None else given)
    with _collected_at_the_end():
        with patched(world):
            try:
                world.run(scenarios.clouds_and_devices(world, outcome.faults))
            except Exception as error:
                outcome.failure = _words(error)
        outcome.digest, outcome.steps, outcome.trace = world.digest(), world.loop.steps, world.trace
        outcome.seconds = world.now_s
        _tidy(world)
    return outcome


@contextlib.contextmanager
def _collected_at_the_end() -> Iterator[None]:
    """What the collector ends must not depend on when it runs; and it takes time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _tidy(world: World) -> None:
    """End what a run left behind: the tasks of killed processes, whose last words do not count."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    configured = structlog.get_config()
    structlog.configure(processors=[_silent])
    # What closes while it is ended begins tasks: in a loop of asyncio's own they would be kept.
    asyncio._set_running_loop(world.loop)
    try:
        for task in world.loop.tasks:
            coroutine: Any = task.get_coro()
            if not task.done() and coroutine is not None:
                with contextlib.suppress(BaseException):
                    coroutine.close()
        world.loop.tasks.clear()
        gc.collect()  # while what it ends may say what it likes
    finally:
        asyncio._set_running_loop(None)
        sys.unraisablehook = hook
        structlog.configure(**configured)


def _silent(logger: Any, method: str, event: Any) -> Any:
    raise structlog.DropEvent


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _words(error.exceptions[0])
    if isinstance(error, Violation):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}, {frame.line})"
