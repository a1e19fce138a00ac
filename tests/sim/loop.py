"""An event loop without sockets, threads or waiting: time jumps to the next timer.

asyncio promises that callbacks of one loop run in the order in which they became ready, so that
order is kept. What a seed decides is everything that a real machine leaves open: the order of
timers that are due at one instant, how long a message is on its way (`network`), how long a thread
takes, and when a process stands still.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from random import Random
from typing import Any

from tests.sim.process import CURRENT, Process

START_S = 1000.0  # of the monotonic clock
_THREAD_S = (0.0005, 0.01)  # how long what runs in a thread takes


class Stuck(Exception):
    """Nothing is left to run, though the main task waits."""


class TooLong(Exception):
    """The bound of steps was reached."""


class Handle:
    """As asyncio.Handle and TimerHandle."""

    __slots__ = ("_args", "_callback", "_cancelled", "_when", "process", "run")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
        process: Process | None,
        when: float = 0.0,
    ) -> None:
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._when = when
        self.run = context.run
        self.process = process

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = _nothing, ()

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self._when


def _nothing() -> None:
    return None


class _Future(asyncio.Future[Any]):
    """Sets of futures iterate in the same order in each run: hashed by number, not by address."""

    __slots__ = ("number",)
    number: int

    def __hash__(self) -> int:
        return self.number


class _Task(asyncio.Task[Any]):
    __slots__ = ("number",)
    number: int

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.AbstractEventLoop):
    """`run(coroutine)` is a whole life. Not reusable.

    Attributes:
        then: called, each once, after the callback that runs now.

    Args:
        on_error: told what product code let fall through to the loop.
    """

    def __init__(
        self,
        rng: Random,
        *,
        max_steps: int,
        on_error: Callable[[str, BaseException | None], None] = lambda message, error: None,
    ) -> None:
        self._rng = rng
        self._max_steps = max_steps
        self._on_error = on_error
        self._now = START_S
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, float, int, Handle]] = []
        self._numbers = 1
        self._over = False
        self.steps = 0
        self.then: list[Callable[[], None]] = []
        # Kept to the end: when an abandoned task is destroyed must not depend on the collector.
        self.tasks: list[_Task] = []

    # -- running ------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run until `coroutine` ends.

        Raises:
            Stuck, TooLong, and whatever it raises.
        """
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=None, finalizer=self._close_generator)
        asyncio._set_running_loop(self)
        try:
            main = self.create_task(coroutine, name="main")
            self._run_until(main)
            return main.result()
        finally:
            self._over = True
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)
            for task in self.tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task._log_traceback = False  # type: ignore[attr-defined]
            self._ready.clear()
            self._timers.clear()

    def _run_until(self, main: _Task) -> None:
        """Steps, one after another; in one function, as calls would take longer than the rest."""
        ready, then, over, most = self._ready, self.then, main.done, self._max_steps
        while not over():
            while not ready:
                self._advance()
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle.process
            if process is not None:
                if not process.alive:
                    continue
                if process.paused:
                    process.held.append(handle)
                    continue
            self.steps = steps = self.steps + 1
            if steps > most:
                raise TooLong(f"{most} steps were not enough.")
            handle.run(handle._callback, *handle._args)
            if then:
                called = then[:]
                then.clear()
                for one in called:
                    one()

    def _advance(self) -> None:
        """On to the next timers; those due at one instant in an order that the seed decides."""
        timers = self._timers
        while timers and timers[0][3]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Stuck("Everything waits, and no timer runs.")
        if timers[0][0] > self._now:
            self._now = timers[0][0]
        now, pop, add = self._now, heapq.heappop, self._ready.append
        while timers and timers[0][0] <= now:
            handle = pop(timers)[3]
            if not handle._cancelled:
                add(handle)

    def requeue(self, handles: list[Handle]) -> None:
        """Callbacks that a pause held back."""
        self._ready.extend(handles)

    # -- what asyncio asks of a loop ----------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        if context is None:
            context = contextvars.copy_context()
        handle = Handle(callback, args, context, context.get(CURRENT))
        if not self._over:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        if context is None:
            context = contextvars.copy_context()
        handle = Handle(callback, args, context, context.get(CURRENT), when)
        if not self._over:
            self._numbers += 1
            heapq.heappush(self._timers, (when, self._rng.random(), self._numbers, handle))
        return handle

    def call_in(
        self, process: Process, when: float, callback: Callable[..., object], *args: Any
    ) -> None:
        """As `call_at` in the process's context, for what nobody takes back."""
        self._numbers += 1
        handle = Handle(callback, args, process.context, process, when)
        heapq.heappush(self._timers, (when, self._rng.random(), self._numbers, handle))

    def _timer_handle_cancelled(self, handle: Handle) -> None:
        return None

    def create_future(self) -> _Future:
        future = _Future(loop=self)
        self._numbers += 1
        future.number = self._numbers
        return future

    def create_task(  # type: ignore[override]
        self,
        coroutine: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> _Task:
        # The base class hashes the task while it makes it.
        self._numbers += 1
        task = _Task.__new__(_Task)
        task.number = self._numbers
        task.__init__(coroutine, loop=self, name=name or f"task-{self._numbers}", context=context)  # type: ignore[misc]
        self.tasks.append(task)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, function: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Runs at once, as far as others can see; the result comes after a while."""
        future = self.create_future()

        def finish() -> None:
            if future.done():
                return
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(self._rng.uniform(*_THREAD_S), finish)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._over:
            self._on_error(context.get("message", ""), context.get("exception"))

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._over

    def is_closed(self) -> bool:
        return self._over

    def _close_generator(self, generator: AsyncGenerator[Any, None]) -> None:
        if not self._over:
            self.call_soon(self.create_task, generator.aclose())
