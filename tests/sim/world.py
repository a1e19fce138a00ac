"""One simulated run: its seed, clocks, random numbers, network and trace."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Coroutine, Iterator
from random import Random
from typing import Any
from unittest.mock import patch

import structlog

from tests.sim.loop import START_S, SimLoop
from tests.sim.network import Network
from tests.sim.process import Process, current

EPOCH_S = 1_795_000_000.0  # the wall clock at the start
MAX_STEPS = 400_000  # of one run; a healthy one needs a tenth of it

_RANDOM_BYTES = 1024


class Violation(AssertionError):
    """An invariant does not hold."""


class World:
    """Everything of one run hangs here.

    Attributes:
        trace: (seconds since the start, what, ...) of every event; two runs of one seed have equal
            ones.
        looks: whether structures of the product are looked at after each step that used them; that
            changes nothing of a run.
    """

    def __init__(self, seed: int, *, max_steps: int = MAX_STEPS, looks: bool = True) -> None:
        self.seed = seed
        self.looks = looks
        self.trace: list[tuple[Any, ...]] = []
        self._changed: dict[int, Any] = {}  # by id, structures in this step
        self._measured = 0
        self._bytes = self.rng("os.urandom")
        self.loop = SimLoop(
            self.rng("loop"),
            max_steps=max_steps,
            on_error=self._fell_through,
        )
        self.network = Network(self.loop, self.rng, self.say)

    # -- chance, time, words ------------------------------------------------------------------

    def rng(self, purpose: str) -> Random:
        """Random numbers of their own for each purpose: one more draw here moves none there."""
        return Random(f"{self.seed} {purpose}")

    @property
    def now_s(self) -> float:
        """Since the start."""
        return self.loop.time() - START_S

    def wall_s(self) -> float:
        process = current()
        return EPOCH_S + self.now_s + (process.skew_s if process is not None else 0.0)

    def random_bytes(self, size: int) -> bytes:
        """Of what only has to be long, as a payload that measures a link, most repeats."""
        some = self._bytes.randbytes(min(size, _RANDOM_BYTES))
        return (some * (size // max(len(some), 1) + 1))[:size]

    def _measured_s(self) -> float:
        """What is measured within one step of the loop takes a while, too."""
        self._measured += 1
        return self.loop.time() + self._measured * 0.004

    def say(self, *what: Any) -> None:
        process = current()
        self.trace.append((round(self.now_s, 6), process.name if process else "", *what))

    def digest(self) -> str:
        """Of all that happened: events, steps, and how far chance was used."""
        ends = (self.loop.steps, self.loop._rng.random(), self._bytes.random())
        return hashlib.sha256(repr((self.trace, ends)).encode()).hexdigest()

    def process(self, name: str) -> Process:
        return Process(self.loop, name)

    def require(self, holds: bool, message: str, *details: Any) -> None:
        """Raises Violation where an invariant does not hold."""
        if not holds:
            raise Violation(message + "".join(f"\n    {detail}" for detail in details))

    # -- running ------------------------------------------------------------------------------

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        with self._patched():
            return self.loop.run(main)

    def changed(self, structure: Any) -> None:
        """A structure with a `check_integrity` was used: it is looked at after this step."""
        if not self._changed:
            self.loop.then.append(self._look)
        self._changed[id(structure)] = structure

    def _look(self) -> None:
        structures = list(self._changed.values())
        self._changed.clear()
        for structure in structures:
            self._look_at(structure)

    def fail(self, message: str) -> None:
        """The run ends with a Violation after this step."""

        def end() -> None:
            raise Violation(message)

        self.loop.then.append(end)

    def _look_at(self, structure: Any) -> None:
        try:
            structure.check_integrity()
        except AssertionError as error:
            kind = type(structure).__name__
            raise Violation(f"The integrity of a {kind} is broken.\n    {error!r}") from error

    def _fell_through(self, message: str, error: BaseException | None) -> None:
        self.fail(f"{message}: {error!r}")

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        """Clocks and chance of the whole interpreter come from here while the loop runs."""
        monotonic = self.loop.time
        with (
            patch.object(time, "time", self.wall_s),
            patch.object(time, "time_ns", lambda: int(self.wall_s() * 1e9)),
            patch.object(time, "monotonic", monotonic),
            patch.object(time, "perf_counter", self._measured_s),
            patch.object(os, "fsync", lambda file: None),
            patch.object(os, "urandom", self.random_bytes),
        ):
            configured = structlog.get_config()
            structlog.configure(processors=[self._log], cache_logger_on_first_use=False)
            try:
                yield
            finally:
                structlog.configure(**configured)

    def _log(self, logger: Any, method: str, event: dict[str, Any]) -> Any:
        self.say("log", method, event.pop("event", ""), str(sorted(event.items(), key=str))[:300])
        raise structlog.DropEvent
