"""A simulated operating-system process: what runs under its name dies or stands still with it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from tests.sim.loop import Handle, SimLoop

CURRENT: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


class Process:
    """Callbacks and tasks begun inside it belong to it.

    Attributes:
        alive: False from `kill` on; whatever it still had to do is never done.
        paused: as by SIGSTOP; what becomes due meanwhile waits in `held`.
        skew_s: how far its wall clock is off.
        on_kill: called once when it is killed; how its connections break.
    """

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.skew_s = 0.0
        self.held: list[Handle] = []
        self.on_kill: list[Callable[[], None]] = []
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)
        self._loop = loop

    def start(self, coroutine: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Run a coroutine as this process."""
        context = self.context.copy()
        return context.run(
            self._loop.create_task, coroutine, name=name or self.name, context=context
        )

    def kill(self) -> None:
        """As kill -9."""
        if self.alive:
            self.alive = False
            self.held.clear()
            hooks, self.on_kill = self.on_kill, []
            for hook in hooks:
                hook()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """What had become due runs now, in the order in which it did."""
        if self.paused:
            self.paused = False
            held, self.held = self.held, []
            self._loop.requeue(held)

    def __repr__(self) -> str:
        return self.name


def current() -> Process | None:
    return CURRENT.get(None)
